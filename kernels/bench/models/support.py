"""Measure which model families are invariant, and write the support table.

    PYTHONPATH=kernels python -m bench.models.support

Every family goes through the load grid of `ndcheck run`, once per dtype and arm, on a model with
random weights; the invariant arm gets a verdict per property, or the line that refuses it. Results
are kept by device in results/families/, and kernels/README.md shows all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.models.families import FAMILIES, SHAPES, save_model
from ndcheck import __version__, environment
from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.errors import BackendError
from ndcheck.findings import read_findings
from ndcheck.plan.trials import plan_trials
from ndcheck.records import AXES, Arm, Axis, Decoding, Probe, Run, RunSpec
from ndcheck.runner import run_trials
from ndcheck.samplers.local.loading import DTYPES
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.storage.run_directory import RunDirectory

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results" / "families"
README = ROOT / "kernels" / "README.md"
TABLE = re.compile(r"(?<=<!-- support table -->\n).*?(?=<!-- end -->)", re.DOTALL)

REFUSED = "refused"
CODE = "def insert(self, key, value): node = self.root; while node is not None: pass "


@dataclass(frozen=True)
class Grid:
    """The loads: batch sizes times the properties, each for one round."""

    batch_sizes: tuple[int, ...]
    prompt: str
    max_tokens: int
    n_samples: int


# Long enough for more than one split of the keys; 44 is one round.
FULL = Grid((1, 2, 3, 5, 8), CODE * 6, max_tokens=8, n_samples=44)
QUICK = Grid((1, 3), CODE, max_tokens=4, n_samples=14)


def measure(
    family: str,
    dtype: str,
    device: str,
    arm: Arm,
    grid: Grid = FULL,
    axes: tuple[Axis, ...] = AXES,
) -> dict[str, Any]:
    """Outcomes by property with trials and divergences, or the line that refuses the model."""
    with tempfile.TemporaryDirectory() as scratch:
        model, path = Path(scratch) / "model", Path(scratch) / "run"
        save_model(family, DTYPES[dtype], device, model, MODEL_DIRECTORY)
        spec = RunSpec(
            model=str(model),
            probes=(Probe("p1", grid.prompt),),
            decoding=Decoding(grid.max_tokens),
            batch_sizes=grid.batch_sizes,
            axes=axes,
            mode="mixed",
            n_samples=grid.n_samples,
            arms=(arm,),
            device=device,
        )
        return run_loads(TransformersSampler(spec), spec, path)[arm]


def run_loads(sampler: TransformersSampler, spec: RunSpec, path: Path) -> dict[Arm, dict[str, Any]]:
    """By arm its outcomes by property, or the line that refuses the model."""
    (probe,), refused = spec.probes, dict(sampler.refused_axes)
    lengths = {probe.probe_id: sampler.count_tokens(probe.content)}
    spec = replace(spec, axes=tuple(axis for axis in spec.axes if axis not in refused))
    trials = plan_trials(spec, lengths, sampler.context, cache_states=sampler.cache_states)
    here = environment.capture(sampler.describe())
    run = Run(path.name, __version__, spec, here, started_at="", n_trials_planned=len(trials))
    with closing(RunDirectory.create(path, run)) as directory:
        try:
            run_trials(trials, sampler, directory)
        except BackendError as error:
            reason = str(error).removeprefix("invariant arm: ").split(". Run")[0]
            return {arm: {"refused": reason} for arm in spec.arms}
    findings = read_findings(path)
    return {
        summary.arm: {
            "outcome": verdict.verdict.outcome,
            "axes": {
                finding.axis: {
                    "outcome": verdict.axes[finding.axis].outcome,
                    "n_trials": finding.n_trials,
                    "diverged": finding.diverged_trials,
                    "latent": finding.latent_trials,
                }
                for finding in summary.axes
                if finding.axis in spec.axes
            },
        }
        for summary, verdict in zip(findings.summary.probes, findings.judgement.probes, strict=True)
    }


def measure_row(
    device: str, grid: Grid, axes: tuple[Axis, ...], model: tuple[str, str]
) -> dict[str, Any]:
    """Both arms of a family in a dtype; an arm that ends with an error has its line in place."""
    quiet()
    family, dtype = model
    row: dict[str, Any] = {"family": family, "dtype": dtype}
    for arm in ("stock", "invariant"):
        try:
            row[arm] = measure(family, dtype, device, arm, grid, axes)  # type: ignore[arg-type]
        except Exception as error:
            # One family that fails must not cost the others their time on a GPU.
            return row | {"error": f"{arm}: {type(error).__name__}: {error}"}
    return row


def measure_all(
    device: str, families: Iterable[str], grid: Grid, axes: tuple[Axis, ...], jobs: int = 1
) -> Iterator[dict[str, Any]]:
    """The rows of every family in bf16 and fp32, as they come, from so many processes."""
    models = [
        (family, dtype)
        for family in families
        for dtype in (("bf16", "fp32") if family in FAMILIES else ("bf16",))
    ]
    row_of = partial(measure_row, device, grid, axes)
    if jobs == 1:
        yield from map(row_of, models)
        return
    # Not forked: CUDA does not outlive a fork.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed(pool.submit(row_of, model) for model in models):
            yield done.result()


def quiet() -> None:
    """In each process."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def render(results: list[dict[str, Any]]) -> str:
    """The table and the refusals, as Markdown; dtypes with the same outcome share a line."""
    head = ["family", "device", "dtype", *AXES, "properties that stock lacks"]
    lines, refusals = [head, ["---"] * len(head)], []
    for result in results:
        device = result["hardware"]["gpu"] if result["device"] == "cuda" else result["device"]
        for family in dict.fromkeys(row["family"] for row in result["rows"]):
            alike: dict[str, list[dict[str, Any]]] = {}
            for row in result["rows"]:
                if row["family"] == family:
                    alike.setdefault(cells(row["invariant"]), []).append(row)
            for outcome, same in alike.items():
                dtypes = ", ".join(row["dtype"] for row in same)
                if outcome == REFUSED:
                    reason = same[0]["invariant"]["refused"]
                    refusals.append(f"- {family} ({device}; {dtypes}): {reason}")
                else:
                    stock = "; ".join(f"{row['dtype']}: {failures(row['stock'])}" for row in same)
                    lines.append([family, device, dtypes, outcome, stock])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nRefused, in the words of the first dtype:\n\n" + "\n".join(refusals) + "\n"


def cells(outcome: dict[str, Any]) -> str:
    """One per property: its verdict, and how many of its trials diverged in tokens or bits."""
    if "refused" in outcome:
        return REFUSED
    return " | ".join(cell(outcome["axes"].get(axis)) for axis in AXES)


def cell(finding: dict[str, Any] | None) -> str:
    """None: the result is older than the property."""
    if finding is None:
        return "not run"
    n_diverged = finding["diverged"] + finding["latent"]
    return f"{finding['outcome'].lower()} ({n_diverged}/{finding['n_trials']})"


def failures(outcome: dict[str, Any]) -> str:
    axes = outcome["axes"]
    failed = [axis for axis in AXES if axis in axes and axes[axis]["outcome"] == "FAIL"]
    return ", ".join(failed) or "none here, so only the planted fault is the control"


def load_results() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def join(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One arm's outcomes, of which the new ones replace those of the same properties."""
    if "refused" in old or "refused" in new:
        return new
    axes = {**old["axes"], **new["axes"]}
    failed = any(finding["outcome"] == "FAIL" for finding in axes.values())
    return {"outcome": "FAIL" if failed else new["outcome"], "axes": axes}


def write(about: dict[str, Any], row: dict[str, Any]) -> None:
    """One row a line, so that a change shows in a diff; other families and properties stay."""
    path = RESULTS / f"{about['device']}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    by_model = {(row["family"], row["dtype"]): row for row in kept}
    old = by_model.setdefault((row["family"], row["dtype"]), row)
    for arm in ("stock", "invariant"):
        old[arm] = join(old[arm], row[arm])
    rows = list(by_model.values())
    rows.sort(key=lambda row: ([*FAMILIES, *SHAPES].index(row["family"]), row["dtype"]))
    lines = ",\n".join(map(json.dumps, rows))
    RESULTS.mkdir(exist_ok=True)
    path.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')


def main() -> int:
    """1 if a family ended with an error, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    names = [*FAMILIES, *SHAPES]
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=names)
    parser.add_argument("--axes", nargs="+", default=AXES, choices=AXES)
    parser.add_argument("--quick", action="store_true", help="with the fewer loads of the tests")
    parser.add_argument("--jobs", type=int, default=1, help="processes, all on the one device")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    options = parser.parse_args()
    n_failed = 0
    if not options.render:
        here = environment.capture({})
        about = {"device": options.device, "hardware": here.hardware, "software": here.software}
        grid, axes = QUICK if options.quick else FULL, tuple(options.axes)
        for row in measure_all(options.device, options.families, grid, axes, options.jobs):
            said = row.get("error") or row["invariant"].get("refused") or cells(row["invariant"])
            print(f"{row['family']} {row['dtype']}: {said}", flush=True)
            n_failed += "error" in row
            if "error" not in row:
                write(about, row)
    README.write_text(TABLE.sub(lambda _: render(load_results()), README.read_text()))
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
