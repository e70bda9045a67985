"""A gate from checks to exit code: make the runs, judge them, publish what was found."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import typer

from ndcheck.api import Run, find_run, measure_spec, save_baseline
from ndcheck.cli.console import (
    DEBUG,
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    describe,
    note,
    note_bad_lines,
    prints_apart,
)
from ndcheck.cli.progress import ProgressLine
from ndcheck.config import Check, ScoreCheck, find_file, read_checks
from ndcheck.errors import BackendError, UsageError, did_you_mean, doing
from ndcheck.findings import read_findings
from ndcheck.judging.comparison import FAIL_ON, compare
from ndcheck.judging.rules import Rules, RuleSet, judge_gate
from ndcheck.judging.scores import Limits, judge_score
from ndcheck.judging.verdict import Verdict
from ndcheck.records import ARMS, RunSpec
from ndcheck.reports.gate import (
    CheckResult,
    Inconclusive,
    gate_document,
    gate_markdown,
    github_annotations,
    print_gate,
)
from ndcheck.reports.junit import junit_xml
from ndcheck.reports.untrusted import without_workflow_commands
from ndcheck.reports.wording.reproduction import argument, reproduce_command, resume_command
from ndcheck.request import DEFAULTS, parse_names
from ndcheck.runner import fit_spec, new_directory, plan
from ndcheck.samplers.base import open_sampler
from ndcheck.stack.manifests import compare_manifests, judge_manifests, read_manifest
from ndcheck.stack.taking import take_like
from ndcheck.storage.gate_verdict import save_gate_verdict
from ndcheck.storage.reading import exists
from ndcheck.storage.run_directory import RUN_FILE, replacing, write_failure
from ndcheck.storage.scores import holds_score, read_score

STOPPED = "the gate was interrupted"
SURVIVED = (Exception, SystemExit)
"""What ends one check and not the gate: a library may end the process too."""


@dataclass(frozen=True, slots=True)
class Demands:
    """Rules given as flags; they win over those of a file. ``of_scores`` are those of a score."""

    limits: Rules
    of_scores: Limits
    arms: str | None
    baseline: str | None
    fail_on: str | None
    manifest: Path | None

    def over(self, rules: RuleSet, spec: RunSpec) -> RuleSet:
        """Raises UsageError for a rule that the run cannot be judged by."""
        rules = dataclasses.replace(rules, general=self.limits.over(rules.general))
        if self.arms is not None:
            rules = dataclasses.replace(rules, arms=parse_names("--arms", self.arms, ARMS))
        if self.baseline is not None:
            rules = dataclasses.replace(rules, baseline=self.baseline)
        if self.manifest is not None:
            rules = dataclasses.replace(rules, manifest=str(self.manifest))
        if self.fail_on is not None:
            if rules.baseline is None:
                raise UsageError("--fail-on: it needs a --baseline to compare with")
            rules = dataclasses.replace(
                rules, fail_on=parse_names("--fail-on", self.fail_on, FAIL_ON)
            )
        try:
            rules.check(spec)
        except UsageError as error:
            raise self._name_flag(error) from error
        return rules

    def check_kinds(self, *, any_run: bool, any_score: bool) -> None:
        """Raise UsageError for a flag about what is not judged: it could not fail."""
        flags = ("arms", "baseline", "fail_on", "manifest")
        of_runs = (*self.limits.given, *(f for f in flags if getattr(self, f) is not None))
        for names, is_judged, what in (
            (of_runs, any_run, "a run, and what is judged is a score"),
            (self.of_scores.given, any_score, "what ndcheck score --out DIR leaves"),
        ):
            if names and not is_judged:
                raise UsageError(f"--{names[0].replace('_', '-')}: this is for {what}")

    def _name_flag(self, error: UsageError) -> UsageError:
        """A line that begins with a rule begins with its flag instead, where that gave it."""
        name, colon, rest = str(error).partition(":")
        if getattr(self.limits, name, None) is not None:
            name = f"--{name.replace('_', '-')}"
        elif self.arms is not None and name in self.arms.split(","):
            name = f"--arms {name}"
        return UsageError(f"{name}{colon}{rest}")


def parse_inconclusive(text: str | None) -> Inconclusive:
    """``pass`` or ``fail``; exit code 3 if not given."""
    if text is None:
        return "exit-3"
    accepted: tuple[Inconclusive, ...] = ("pass", "fail")
    outcome, *others = parse_names("--inconclusive", text, accepted)
    if others:
        raise UsageError(f"--inconclusive {text}: give one of {', '.join(accepted)}")
    return outcome


def judge_runs(
    paths: Sequence[Path],
    config: Path | None,
    names: Sequence[str] | None,
    demands: Demands,
    baseline_name: str | None,
) -> list[CheckResult]:
    """Judge finished runs by the flags, and by a check's rules where one is named."""
    is_score = [holds_score(path) for path in paths]
    demands.check_kinds(any_run=not all(is_score), any_score=any(is_score))
    rules, limits, folder = RuleSet(), Limits(), Path()
    if config is not None or names:
        checks = _select(config, names)
        if len(checks) != 1:
            raise UsageError("--check: name the one check whose rules to judge by")
        (check,) = checks
        folder = check.file.parent
        for path, is_one in zip(paths, is_score, strict=True):
            if is_one != isinstance(check, ScoreCheck):
                kind, other = ("a score", "a run") if is_one else ("a run", "a score")
                raise UsageError(f"--check {check.name}: it judges {other}, and {path} is {kind}")
        if isinstance(check, ScoreCheck):
            limits = check.limits
        else:
            rules = check.rules
    if demands.baseline is not None:
        folder = Path()
    if baseline_name is not None and (len(paths) != 1 or any(is_score)):
        raise UsageError("--save-baseline: give one RUN")
    results = []
    for path, is_one in zip(paths, is_score, strict=True):
        if is_one:
            results.append(_judge_score(str(path), path, demands.of_scores.over(limits)))
            continue
        try:
            with doing(f"judging {path}"):
                run = Run(path)
                note_bad_lines(run.findings.bad_lines)
                results.append(_judge(str(path), run, demands.over(rules, run.record.spec), folder))
        except UsageError:
            raise
        except SURVIVED as error:
            command = f"ndcheck gate {argument(str(path))}"
            results.append(_failed(str(path), command, error))
        else:
            if baseline_name is not None:
                note(f"saved {save_baseline(run, baseline_name)}")
    return results


def run_checks(
    config: Path | None,
    names: Sequence[str] | None,
    demands: Demands,
    out: Path | None,
    *,
    quiet: bool,
) -> list[CheckResult]:
    """Make the run of every check and judge it; a mistake in any is found before the first.

    What ends one, be it Ctrl-C, takes the findings of the others away from no output.
    """
    checks = _select(config, names)
    of_runs = [check for check in checks if isinstance(check, Check)]
    demands.check_kinds(any_run=bool(of_runs), any_score=len(of_runs) < len(checks))
    rules = {check.name: demands.over(check.rules, check.spec) for check in of_runs}
    for check in checks:
        if isinstance(check, Check):
            _rehearse(check, rules[check.name])
        else:
            read_score(check.directory)
    if out is not None and exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: it is not empty; choose a new folder")
    results = []
    for number, check in enumerate(checks, 1):
        if isinstance(check, ScoreCheck):
            limits = demands.of_scores.over(check.limits)
            results.append(_judge_score(check.name, check.directory, limits))
            continue
        new = new_directory(check.name, None if out is None else out / check.name)
        path = new.path
        note(f"check {check.name} ({number} of {len(checks)}): {path}", quiet=quiet)
        try:
            with closing(new), prints_apart(), ProgressLine(quiet=quiet) as progress:
                run = measure_spec(check.spec, new, progress.show, check.private)
            results.append(_judge(check.name, run, rules[check.name], check.file.parent))
        except KeyboardInterrupt:
            command = reproduce_command(check.spec, DEFAULTS)
            if (path / RUN_FILE).exists():
                command = resume_command(check.spec, str(path))
            results.append(CheckResult(check.name, command, error=STOPPED, error_code=INTERRUPTED))
            results += [
                CheckResult(
                    later.name,
                    f"ndcheck gate --check {argument(later.name)}",
                    error=f"not begun: {STOPPED}",
                    error_code=INTERRUPTED,
                )
                for later in checks[number:]
            ]
            break
        except UsageError as error:
            command = reproduce_command(check.spec, DEFAULTS)
            refusal = check.locate(error)
            results.append(
                CheckResult(check.name, command, error=str(refusal), error_code=refusal.exit_code)
            )
        except SURVIVED as error:
            results.append(_failed(check.name, reproduce_command(check.spec, DEFAULTS), error))
    return results


def _failed(name: str, command: str, error: BaseException) -> CheckResult:
    """An error that ends this check and not the gate."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    return CheckResult(name, command, error=describe(error))


def exit_code(results: Sequence[CheckResult], inconclusive: Inconclusive = "exit-3") -> int:
    """130 where it was interrupted, else 1 where a check failed, else 4 where a run did, else 2
    where one was refused, else 3 where one was inconclusive, else 0."""
    codes = dict(EXIT_CODES)
    if inconclusive != "exit-3":
        codes["INCONCLUSIVE"] = EXIT_CODES["PASS" if inconclusive == "pass" else "FAIL"]
    found = {r.error_code if r.verdict is None else codes[r.verdict.outcome] for r in results}
    return next(code for code in (INTERRUPTED, 1, FAILED, 2, 3, 0) if code in found)


def publish(
    results: Sequence[CheckResult],
    inconclusive: Inconclusive,
    junit: Path | None,
    *,
    as_json: bool,
) -> int:
    """Show the results, here and where a CI system looks for them. Returns the exit code."""
    from rich.console import Console

    code = exit_code(results, inconclusive)
    on_github = os.environ.get("GITHUB_ACTIONS") == "true"
    if as_json:
        document = json.dumps(gate_document(results, code), indent=2, allow_nan=False)
        typer.echo(document.replace("##[", "##\\u005b") if on_github else document)
    elif on_github:
        console = Console(highlight=False)
        with console.capture() as screen:
            print_gate(console, results)
        typer.echo(without_workflow_commands(screen.get()), nl=False)
    else:
        print_gate(Console(highlight=False), results)
    if on_github:
        for line in github_annotations(results):
            typer.echo(line, err=as_json)  # GitHub reads both streams
    if junit is not None:
        try:
            junit.parent.mkdir(parents=True, exist_ok=True)
            with replacing(junit) as file:
                file.write(junit_xml(results, inconclusive))
        except OSError as error:
            code = _unpublished(code, junit, error)
    summary_page = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary_page:
        try:
            with Path(summary_page).open("a", encoding="utf-8") as file:
                file.write(gate_markdown(results))
        except OSError as error:
            code = _unpublished(code, Path(summary_page), error)
    return code


def _unpublished(code: int, path: Path, error: OSError) -> int:
    """The exit code where a report cannot be written: what was found is found all the same."""
    note(str(write_failure(path, error)))
    return code if code in (1, INTERRUPTED) else FAILED


def _select(config: Path | None, names: Sequence[str] | None) -> list[Check | ScoreCheck]:
    file = config or find_file()
    checks = read_checks(file)
    known = [check.name for check in checks]
    for name in names or ():
        if name not in known:
            hint = did_you_mean(name, known) or ";"
            raise UsageError(f"--check {name}: unknown{hint} {file} has {', '.join(known)}")
    return [check for check in checks if not names or check.name in names]


def _rehearse(check: Check, rules: RuleSet) -> None:
    """Plan without measuring: raises UsageError for what only the model and the disk can tell."""
    try:
        if rules.baseline is not None:
            find_run(rules.baseline, check.file.parent)
        if rules.manifest is not None:
            read_manifest(Path(rules.manifest))
        # What fits beside the weights is only known with them.
        load_weights = not check.spec.batch_sizes
        with (
            prints_apart(),
            closing(
                open_sampler(check.spec, load_weights=load_weights, private=check.private)
            ) as sampler,
        ):
            spec = fit_spec(check.spec, sampler)
            rules.check(spec)
            plan(spec, sampler)
    except UsageError as error:
        raise check.locate(error) from error
    except SURVIVED:
        pass  # the run itself will say so, as a result


@functools.cache
def _judge_stack(file: Path) -> Verdict:
    """Whether this machine has the bits of a manifest; measured once for all checks."""
    kept = read_manifest(file)
    return judge_manifests(compare_manifests(kept, take_like(kept, lambda _: None)))


def _judge(name: str, run: Run, rules: RuleSet, folder: Path) -> CheckResult:
    comparison = None
    if rules.baseline is not None:
        baseline = read_findings(find_run(rules.baseline, folder))
        note_bad_lines(baseline.bad_lines)
        comparison = compare(baseline.measured, run.findings.measured)
    stack = None if rules.manifest is None else _judge_stack(Path(rules.manifest))
    verdict = judge_gate(run.record, run.summary, rules, comparison, stack)
    try:
        save_gate_verdict(run.path, verdict.label, verdict.reasons)
    except BackendError as error:
        note(f"the verdict is not kept for ndcheck runs: {error}")  # a gate only has to read
    return CheckResult(
        name,
        run.command,
        directory=str(run.path),
        started_at=run.record.started_at,
        elapsed_s=run.record.elapsed_s,
        verdict=verdict,
    )


def _judge_score(name: str, directory: Path, limits: Limits) -> CheckResult:
    command = f"ndcheck gate {argument(str(directory))}{limits.flags}"
    return CheckResult(name, command, verdict=judge_score(read_score(directory), limits))
