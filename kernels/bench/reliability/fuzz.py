"""Does anything crash, hang, lie or get lost?

    PYTHONPATH=kernels python -m bench.reliability.fuzz PART

PART is `readers` (mutations of every file that is read), `options` (mutated command lines), or
`kills` (kill -9 at random points, then --resume), each for `--count` cases from `--seed`, shared
out over `--jobs` processes (each with a seed of its own, counted up from `--seed`). What a
case may end with is known from outside: a verdict or one line, never an uncaught exception; a run
that passes may be refused or doubted but not accused by its run.json, and one that fails may not
pass. The counts go to `results/reliability/PART.json`, with a few lines to see each failure again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from bench.reliability.mutations import (
    ODD_NUMBERS,
    ODD_TEXTS,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    replace_file,
)
from bench.reliability.processes import in_processes

RESULTS = Path(__file__).parents[3] / "results" / "reliability"
CODES = {0, 1, 2, 3, 4, 130}
HANG_S = 60
SCRIPTED = ("--max-tokens", "8", "--loads", "1,4", "-n", "40", "-q")


class Findings:
    """Counts of what cases ended with, and of each kind of failure the first few."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, other: Findings) -> None:
        self.outcomes += other.outcomes
        for kind, count in other.failures.items():
            self.failures[kind] += count
            kept = self.examples.setdefault(kind, [])
            kept += other.examples[kind][: 3 - len(kept)]

    def fail(self, kind: str, example: str) -> None:
        self.failures[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < 3:
            kept.append(example[-1500:])


class Hang(BaseException):
    """A case took longer than HANG_S."""


@contextlib.contextmanager
def time_limit(seconds: int | None = None) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds or HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def text_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")


class Corpus:
    """Files that are read, as ndcheck writes them, and what reads each of them."""

    def __init__(self, folder: Path) -> None:
        from ndcheck.cli.app import run_command_line

        self.folder = folder
        for name, code in (("clean", 0), ("batch-dependent", 1)):
            options = ("--model", f"scripted:{name}", *SCRIPTED, "--out", str(folder / name))
            with contextlib.redirect_stdout(text_stream()):
                assert run_command_line(["run", *options]) == code
            steps = [{"step": 1, "advice": ["look"]}]
            explanation = {"schema_version": 1, "sample_id": 3, "steps": steps}
            (folder / name / "explanation.json").write_text(json.dumps(explanation))
        (folder / "p.jsonl").write_text('{"id": "a", "prompt": "class Queue:"}\n"def f():"\n')
        (folder / "p.txt").write_text("class Queue:\n\ndef f():\n")
        config = (
            '[checks.a]\nmodel = "scripted:clean"\nloads = [1, 4]\n'
            '[checks.a.rules]\narms = ["stock"]\n'
        )
        (folder / "ndcheck.toml").write_text(config)
        (folder / "pyproject.toml").write_text(config.replace("[checks", "[tool.ndcheck.checks"))

    def files(self) -> list[Path]:
        names = ("run.json", "samples.jsonl", "explanation.json", "summary.csv")
        runs = [self.folder / run / name for run in ("clean", "batch-dependent") for name in names]
        # Samples and records first: they are what a gate is decided by.
        return [*runs[:2], *runs[4:6], *runs, *(self.folder / name for name in
                ("p.jsonl", "p.txt", "ndcheck.toml", "pyproject.toml"))]  # fmt: skip

    def mutate(self, path: Path, rng: random.Random) -> None:
        """Change a file in place."""
        content = path.read_bytes()
        kind = rng.random()
        if kind < 0.02:
            replace_file(path, rng)
        elif kind < 0.65 and path.suffix == ".json":
            path.write_bytes(mutate_json(content, rng))
        elif kind < 0.65 and path.suffix == ".jsonl" and path.name != "p.jsonl":
            path.write_bytes(mutate_lines(content, rng))
        else:
            path.write_bytes(mutate_bytes(content, rng))

    def read(self, path: Path, *, fully: bool) -> str:
        """What became of reading a mutated file: a verdict, or the word for a refusal."""
        from ndcheck.config import read_checks
        from ndcheck.errors import NdcheckError
        from ndcheck.request import make_probes

        try:
            if path.suffix == ".toml":
                read_checks(path)
            elif path.name.startswith("p."):
                make_probes([], path)
            elif path.name == "summary.csv":
                from ndcheck.cli.runs_session import read_runs

                list(read_runs(self.folder))
            else:
                return read_run_and_judge(path.parent, fully=fully)
            return "read"
        except NdcheckError as error:
            if error.exit_code not in (2, 4) or "\n" in str(error):
                raise AssertionError(f"{error.exit_code}: {error}") from error
            return f"refused {error.exit_code}"


def read_run_and_judge(path: Path, *, fully: bool) -> str:
    """The gate's outcome; ``fully`` renders everything too."""
    from rich.console import Console

    from ndcheck.api import Run
    from ndcheck.errors import UsageError
    from ndcheck.explain.failing import find_failure
    from ndcheck.judging.comparison import compare
    from ndcheck.judging.rules import RuleSet, judge_gate
    from ndcheck.reports.document import make_document
    from ndcheck.reports.gate import CheckResult, gate_markdown
    from ndcheck.reports.junit import junit_xml

    run = Run(path)
    verdict = judge_gate(run.record, run.summary, RuleSet())
    document = make_document(run.findings)
    json.dumps(document, allow_nan=False)
    if fully:
        run.write_reports()
        run.print(Console(file=io.StringIO(), width=80))
        result = CheckResult("check", run.command, str(path), verdict=verdict)
        gate_markdown([result])
        junit_xml([result])
        compare(run.findings.measured, run.findings.measured)
        with contextlib.suppress(UsageError):
            find_failure(path, None)
    if document["verdict"] == "PASS" and verdict.outcome != "PASS":
        raise AssertionError("the report passes and the gate does not")
    return verdict.outcome


def fuzz_readers(count: int, seed: int, findings: Findings, fully_every: int = 50) -> None:
    """Mutate one file at a time, read it as a gate would, and put it back."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ndcheck-fuzz-") as name:
        corpus = Corpus(Path(name))
        files = corpus.files()
        originals = {path: path.read_bytes() for path in files}
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
            for number in range(count):
                path = files[number % len(files)]
                corpus.mutate(path, rng)
                case = f"{path.parent.name}/{path.name} (case {number}, seed {seed})"
                try:
                    with time_limit():
                        outcome = corpus.read(path, fully=number % fully_every == 0)
                    findings.outcomes[outcome] += 1
                    is_accused = path.name != "samples.jsonl" and outcome == "FAIL"
                    if path.parent.name == "clean" and is_accused:
                        findings.fail("wrong exit code: a run that passes was accused", case)
                    if path.parent.name == "batch-dependent" and outcome == "PASS":
                        findings.fail("wrong exit code: a run that fails passed", case)
                except Hang:
                    findings.fail("hang", case)
                except Exception as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    kind = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
                    findings.fail(f"uncaught: {kind}", f"{case}\n{traceback.format_exc()}")
                said.seek(said.truncate(0))
                restore(path, originals[path])


def restore(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not path.is_file() or path.is_symlink():
        path.unlink(missing_ok=True)
    path.write_bytes(content)


OPTION_VALUES = (
    *map(str, ODD_NUMBERS), *(text for text in ODD_TEXTS if "\x00" not in text), "1,2,4", "1,1",
    "8", "0.95", "slot", "run-to-run,cache", "mixed", "copies", "stock", "stock,invariant", "1-3",
    "scripted:clean", "scripted:none", "builtin", "fp32", "cpu", "cuda:9", "http://[::1", "run",
    "http://127.0.0.1:9/v1", "a.jsonl", "ndcheck.toml", "missing", ".", "/", "poisson:1", "auto",
    "poisson:0", "bursts:1:1", "closed", "words", "A: b", "x=y", "tokens,bits", "pass", "vllm",
    "9" * 5000, "1," * 3000, "torch:sum", "mm",
)  # fmt: skip
ONE_OP = ("--op", "rms_norm", "--rows", "1,2", "--dtype", "fp32", "-q")
BASES: dict[str, tuple[str, ...]] = {
    "run": ("--model", "scripted:clean", *SCRIPTED, "--dry-run"),
    "gate": ("run",),
    "report": ("run",),
    "compare": ("run", "run"),
    "runs": (".",),
    "trace": ("--model", "scripted:clean"),
    "shrink": ("--run", "run"),
    "order": ("mm", "--rows", "1,2", "--terms", "4", "--columns", "2", "--kernels", "invariant"),
    "score": ("recorded.jsonl", "--file", "scored.jsonl"),
    "bisect": ("--good", "lock.txt", "--bad", "lock.txt", "true"),
    "kernels manifest": ("out.json", *ONE_OP),
    "kernels compare": ("manifest.json", "manifest.json"),
}
"""Commands that end at once, and without a finding: 1 would be a false accusation."""
JUDGED_OTHERWISE = {"--inconclusive", "--fail-on", "stock"}
"""With one of these a 1 may be right: torch's own order follows the rows at some sizes."""


def fuzz_options(count: int, seed: int, findings: Findings) -> None:
    """Random command lines, in this process."""
    import typer

    from ndcheck.cli.app import app, run_command_line

    rng = random.Random(seed)

    def parameters_of(verb: str) -> Any:
        command: Any = typer.main.get_command(app)
        for name in verb.split():
            command = command.commands[name]
        return command.params

    parameters = {verb: parameters_of(verb) for verb in BASES}
    names = {v: [n for p in ps for n in p.opts if n[:1] == "-"] for v, ps in parameters.items()}
    flags = {
        n for ps in parameters.values() for p in ps if getattr(p, "is_flag", 0) for n in p.opts
    }
    with tempfile.TemporaryDirectory(prefix="ndcheck-fuzz-") as name, contextlib.chdir(name):
        with contextlib.redirect_stdout(io.StringIO()):
            run_command_line(["run", *BASES["run"][:-1], "--out", "run"])
            run_command_line(["kernels", "manifest", "manifest.json", *ONE_OP])
            write_scores()
        Path("lock.txt").write_text("torch==2.11.0\n")
        Path("ndcheck.toml").write_text('[checks.a]\nmodel = "scripted:clean"\nsamples = 4\n')
        for number in range(count):
            verb = rng.choice(list(BASES))
            arguments = [*verb.split(), *BASES[verb]]
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                option = rng.choice(names[verb])
                arguments += [option] if option in flags else [option, rng.choice(OPTION_VALUES)]
            if rng.random() < 0.05:
                rng.shuffle(arguments)
            run_one_command_line(arguments, number, seed, findings)


def write_scores() -> None:
    """A recording of two completions, and a file that has its numbers and those of its control."""
    from ndcheck.cli.app import run_command_line

    lines = [
        {"prompt_ids": [1, i], "completion_ids": [2, 3, 4], "logprobs": [-0.5, -1.25, -2.0]}
        for i in range(2)
    ]
    Path("recorded.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run_command_line(["score", "recorded.jsonl", "--requests", "asked.jsonl", "-q"])
    for each in (scored := [json.loads(x) for x in Path("asked.jsonl").read_text().splitlines()]):
        recorded = next((x for x in lines if {**x, **each} == x), None)
        each["logprobs"] = [-3.0, -3.5, -4.0] if recorded is None else recorded["logprobs"]
    Path("scored.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in scored))


def run_one_command_line(arguments: list[str], number: int, seed: int, findings: Findings) -> None:
    from ndcheck.cli.app import run_command_line

    case = f"case {number}, seed {seed}: ndcheck {' '.join(map(ascii, arguments))[:600]}"
    said, shown = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown), time_limit(60):
            code = run_command_line(arguments)
    except Hang:
        findings.fail("hang", case)
        return
    except BaseException:
        findings.fail("uncaught", f"{case}\n{traceback.format_exc()}")
        return
    findings.outcomes[str(code)] += 1
    words = said.getvalue()
    if "please report it" in words:
        kind = re.sub(r"[^A-Za-z].*", "", words.partition(": unexpected ")[2])
        findings.fail(f"uncaught: {kind}", f"{case}\n{words}")
    elif code not in CODES:
        findings.fail(f"wrong exit code: {code}", case)
    elif code == 1 and JUDGED_OTHERWISE.isdisjoint(arguments):
        findings.fail("wrong exit code: 1 without a finding", f"{case}\n{shown.getvalue()[:500]}")
    elif code in (2, 4) and not words:
        findings.fail("wrong exit code: without a line", case)


def kill(count: int, seed: int, findings: Findings) -> None:
    from bench.reliability.kills import kill_and_resume

    def passed(kind: str) -> None:
        findings.outcomes[kind] += 1

    kill_and_resume(count, seed, passed, findings.fail)


PARTS: dict[str, tuple[Callable[[int, int, Findings], None], int]] = {
    "readers": (fuzz_readers, 100_000),
    "options": (fuzz_options, 5_000),
    "kills": (kill, 200),
}


def work(part: str, count: int, seed: int) -> Findings:
    findings = Findings()
    PARTS[part][0](count, seed, findings)
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    count = options.count or PARTS[options.part][1]
    findings, started = Findings(), time.monotonic()
    for share in in_processes(partial(work, options.part), count, options.seed, options.jobs):
        findings.add(share)
    from ndcheck import environment

    document = {
        "part": options.part, "cases": count, "seed": options.seed, "jobs": options.jobs,
        "elapsed_s": round(time.monotonic() - started, 1),
        "outcomes": dict(sorted(findings.outcomes.items())),
        "failures": dict(findings.failures), "examples": findings.examples,
        "environment": dataclasses.asdict(environment.capture({})),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.part}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps({name: document[name] for name in ("outcomes", "failures")}, indent=2))
    sys.exit(bool(findings.failures))


if __name__ == "__main__":
    main()
