"""From a recording and the options of a scorer to a verdict on the screen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ndcheck.cli.console import EXIT_CODES, note, prints_apart
from ndcheck.errors import UsageError, doing
from ndcheck.judging.scores import Limits, judge_arm
from ndcheck.judging.verdict import count, worst
from ndcheck.records import ARMS
from ndcheck.request import add_headers, make_spec
from ndcheck.samplers.backends import OPTIONS
from ndcheck.samplers.endpoint.private import Private
from ndcheck.samplers.options import TRANSFORMERS, parse_names
from ndcheck.scoring.comparing import compare, summarise
from ndcheck.scoring.completions import Recording, read_recording
from ndcheck.scoring.scorers import FileScorer, Scorer, score_all, write_requests
from ndcheck.storage.outputs import check_outputs
from ndcheck.storage.run_directory import replacing, replacing_bytes, write_failure
from ndcheck.storage.scores import check_new, save_score

N_PROGRESS_LINES = 10


@dataclass(frozen=True, slots=True)
class Outputs:
    """What is written beside the screen."""

    out: Path | None
    csv: Path | None
    plot: Path | None
    as_json: bool
    quiet: bool

    def __post_init__(self) -> None:
        if self.out is not None:
            check_new(self.out)
        if self.plot is not None:
            from ndcheck.reports.scoring.figure import check_figure

            check_figure(self.plot)


def read(path: Path, arms: str | None) -> Recording:
    """The completions of a run, those of the arms asked for, or of a file. Raises UsageError."""
    chosen = None if arms is None else parse_names("--arms", arms, ARMS)
    return read_recording(path, chosen)


def request(recording: Recording, path: Path, *, quiet: bool) -> int:
    """Write what another program has to score. Returns the exit code."""
    n_lines = write_requests(path, recording.completions)
    note(
        f"wrote {count(n_lines, 'line')} to {path}: add logprobs to each, then give it as --file",
        quiet=quiet,
    )
    return 0


@prints_apart()
def open_scorer(
    recording: Recording,
    typed: Mapping[str, Any],
    given: set[str],
    private: Private,
    file: Path | None,
    *,
    quiet: bool,
) -> Scorer:
    """The scorer that the options ask for; ``given`` are those that were typed, not defaults."""
    if file is not None:
        if given:
            name = sorted(given)[0].replace("_", "-")
            raise UsageError(f"--file holds the scores already: leave out --{name}")
        return FileScorer(file)
    options = {"loads": "1", "axes": "run-to-run", **typed}
    if typed["endpoint"] is not None and "kernels" not in given:
        options["kernels"] = None
    if "model" not in given:
        options |= _of_run(
            recording, given, engine=typed["engine"], is_served=typed["endpoint"] is not None
        )
    spec = add_headers(make_spec(**options), private.headers)
    if len(spec.arms) > 1:
        raise UsageError(f"--kernels {typed['kernels']}: give one of {', '.join(ARMS)}")
    note(f"opening {spec.model}", quiet=quiet)
    with doing(f"opening {spec.model}"):
        if spec.endpoint is not None:
            from ndcheck.scoring.endpoint import EndpointScorer

            return EndpointScorer(spec, spec.endpoint, private)
        if spec.engine is not None:
            from ndcheck.samplers.vllm.sampler import EngineSampler
            from ndcheck.scoring.engine import EngineScorer

            return EngineScorer(EngineSampler(spec, spec.engine), spec.arms[0])
        if spec.model.startswith("scripted:"):
            raise UsageError(f"--model {spec.model}: scripted streams come of no model: give one")
        from ndcheck.samplers.local.sampler import TransformersSampler
        from ndcheck.scoring.local import LocalScorer

        return LocalScorer(TransformersSampler(spec), spec.arms[0])


def _of_run(
    recording: Recording, given: set[str], *, engine: str, is_served: bool
) -> dict[str, Any]:
    """The run's own model, for what was not typed. Code to run is never taken from there."""
    spec = recording.spec
    if spec is None:
        raise UsageError(f"{recording.source}: it names no model: give --model, or --file")
    found: dict[str, Any] = {"model": spec.model}
    if not is_served:
        found |= {"random_weights": spec.random_weights, "dtype": spec.dtype}
        found["adapter"] = None if spec.adapter is None else Path(spec.adapter)
    if engine == TRANSFORMERS and spec.kv_cache_dtype != "auto":
        raise UsageError(
            f"{recording.source}: it kept keys and values as {spec.kv_cache_dtype}, and scoring "
            "keeps them as the model's dtype: run with --axes scoring instead"
        )
    if engine == TRANSFORMERS and not is_served:
        found |= {"attn": spec.attention, "dequantise": spec.dequantise}
    found = {k: value for k, value in found.items() if k not in given and value is not None}
    for name, value in found.items():
        needs_trust = OPTIONS[name].needs_trust
        if needs_trust is not None and needs_trust(value):
            flag = OPTIONS[name].flag
            raise UsageError(
                f"{recording.source}: what runs code comes from the command line alone: if you "
                f"trust this run, add {flag} {shlex.quote(str(value))}"
            )
    return found


def score(recording: Recording, scorer: Scorer, limits: Limits, outputs: Outputs) -> int:
    """Score, compare, judge and show. Returns the exit code."""
    check_outputs(outputs.csv, outputs.plot)
    with closing(scorer), doing(f"scoring {recording.source}"), prints_apart():
        scored = score_all(recording.completions, scorer, _progress(quiet=outputs.quiet))
    comparisons = list(compare(recording.completions, scored))
    kept = summarise(recording, scored, comparisons)
    judged = [
        (found, judge_arm(arm, kept, limits))
        for found, arm in zip(comparisons, kept.arms, strict=True)
    ]
    code = EXIT_CODES[worst([verdict.outcome for _, verdict in judged])]

    from rich.console import Console

    from ndcheck.reports.scoring import figure
    from ndcheck.reports.scoring import score as report

    if outputs.out is not None:
        save_score(outputs.out, kept)
        note(f"ndcheck gate {shlex.quote(str(outputs.out))} judges it", quiet=outputs.quiet)
    if outputs.csv is not None:
        try:
            with replacing(outputs.csv) as file:
                file.writelines(report.token_lines(judged))
        except OSError as error:
            raise write_failure(outputs.csv, error) from error
    if outputs.plot is not None:
        content = figure.draw(comparisons, outputs.plot.suffix)
        try:
            with replacing_bytes(outputs.plot) as file:
                file.write(content)
        except OSError as error:
            raise write_failure(outputs.plot, error) from error
    if outputs.as_json:
        document = report.score_document(recording, scored, judged, code)
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        report.print_score(Console(highlight=False), recording, scored, judged)
    return code


def _progress(*, quiet: bool) -> Any:
    def show(n_done: int, n_all: int) -> None:
        if n_done % max(1, n_all // N_PROGRESS_LINES) == 0:
            note(f"{n_done} of {count(n_all, 'completion')} scored", quiet=quiet)

    return show
