"""Two servers under the same loads, compared as two arms: one with speculation, one without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import typer

from ndcheck.api import Run, measure_spec
from ndcheck.cli.console import EXIT_CODES, note
from ndcheck.cli.progress import ProgressLine
from ndcheck.errors import BackendError, UsageError
from ndcheck.judging.comparison import FailOn, compare, judge_comparison
from ndcheck.judging.verdict import worst
from ndcheck.records import RunSpec
from ndcheck.reports.comparison import comparison_document, print_comparison
from ndcheck.reports.terminal import print_verdict
from ndcheck.reports.wording.reproduction import argument, resume_command
from ndcheck.request import check
from ndcheck.runner import new_directory, slug
from ndcheck.samplers.endpoint.private import Private
from ndcheck.storage.reading import exists
from ndcheck.storage.run_directory import RUN_FILE


def start(
    spec: RunSpec,
    against: str,
    private: Private,
    out: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure both, one after the other, each into a directory of its own. Returns the exit code.

    It is the worst of three verdicts: on each server by itself, and on their completions of the
    probes alone, token by token and, where both give log-probabilities, bit by bit.
    """
    if spec.endpoint is None:
        raise UsageError("--against: it is compared with another server: give --endpoint too")
    sides = {"a": spec, "b": replace(spec, endpoint=replace(spec.endpoint, url=against))}
    check(sides["b"])
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        places = {
            name: stack.enter_context(
                closing(new_directory(f"{slug(spec.model)}-{name}", out and out / name))
            )
            for name in sides
        }
        for name, side in sides.items():
            note(f"{name.upper()}: {side.endpoint.url if side.endpoint else ''}", quiet=quiet)
            try:
                with ProgressLine(quiet=quiet) as progress:
                    runs[name] = measure_spec(side, places[name], progress.show, private)
            except (KeyboardInterrupt, BackendError):
                _say_how_to_go_on(side, places[name].path, runs)
                raise
    comparison = compare(*(run.findings.measured for run in runs.values()))
    has_bits = any(d.bits_recorded or d.kind == "latent" for d in comparison.drifts)
    kinds: tuple[FailOn, ...] = ("tokens",)
    if has_bits and not spec.allow_latent:
        kinds = ("tokens", "bits")
    verdicts = judge_comparison(comparison, kinds, spec.confidence)
    outcomes = [v.outcome for v in verdicts.values()] + [run.verdict for run in runs.values()]
    code = EXIT_CODES[worst(outcomes)]
    names = (str(runs["a"].path), str(runs["b"].path))
    if as_json:
        document = comparison_document(names, comparison, verdicts, code)
        document["runs"] = {
            name: {"verdict": run.verdict, "reasons": list(run.reasons)}
            for name, run in runs.items()
        }
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return code
    from rich.console import Console

    console = Console(highlight=False)
    for name, run in runs.items():
        print_verdict(console, run.judgement.verdict, name.upper())
    print_comparison(console, names, comparison, verdicts)
    return code


def _say_how_to_go_on(side: RunSpec, path: Path, runs: Mapping[str, Run]) -> None:
    """With the run at ``path``, which ended early, and to the comparison with what is there."""
    if not exists(path / RUN_FILE):
        return
    note(f"it ended early; go on with: {resume_command(side, str(path))}")
    for run in runs.values():
        names = f"{argument(str(run.path))} {argument(str(path))}"
        note(f"and then with: ndcheck compare {names} --fail-on tokens,bits")
