"""How often the interval holds the true rate, and whether chance is laid to run-to-run.

    PYTHONPATH=kernels python -m bench.measurement.statistics_coverage results/statistics

Simulates runs through the plan, the analysis and the verdicts that `ndcheck run` uses: only the
completions are made up. Writes coverage.csv and attribution.csv there. One process; about half an
hour on one core. The same seed gives the same tables.
"""

from __future__ import annotations

import csv
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ndcheck.analysis.summary import ProbeSummary
from ndcheck.findings import find
from ndcheck.plan.confirmations import plan_confirmations
from ndcheck.plan.faults import plant_fault
from ndcheck.plan.grid import ALONE
from ndcheck.plan.trials import plan_trials
from ndcheck.records import Decoding, Endpoint, Environment, Run, RunSpec, Sample, Trial, Witness
from ndcheck.request import DEFAULTS

N_RUNS = 5000
N_TOKENS = 2
PROMPT_TOKENS = 9
IN_PROCESS = replace(
    DEFAULTS, arms=("stock",), decoding=Decoding(N_TOKENS), mode="mixed", n_samples=60
)
SERVER = replace(IN_PROCESS, endpoint=Endpoint("http://host/v1"))
SPECS = {"in process": IN_PROCESS, "server": SERVER}

IsOdd = Callable[[Trial], int]
"""0 for the completion that is due, else the number of another."""


@dataclass(frozen=True)
class Fault:
    """``draw`` makes a run's fault from its random numbers; ``truth`` is the rate it has."""

    name: str
    truth: float
    draw: Callable[[random.Random], IsOdd]


def by_chance(rate: float, *, alike: bool) -> Fault:
    """Any trial is odd, whatever its load: all in the same way, or each in its own."""

    def draw(rng: random.Random) -> IsOdd:
        return lambda trial: (1 if alike else trial.trial_id + 1) * (rng.random() < rate)

    return Fault(f"by chance, odd ones {'alike' if alike else 'all different'}", rate, draw)


def by_load(rate: float) -> Fault:
    """A share of the loads is odd, each every time that it runs; the probe alone never is."""

    def draw(rng: random.Random) -> IsOdd:
        seed = rng.random()

        def is_odd(trial: Trial) -> int:
            odd = random.Random(f"{seed}/{trial.load}").random() < rate
            return int(odd and trial.load != ALONE)

        return is_odd

    return Fault("by load, every time", rate, draw)


def neighbours_only(rate: float) -> Fault:
    """Fillers of other lengths make a share of the loads odd, every time."""

    def draw(rng: random.Random) -> IsOdd:
        is_odd = by_load(rate).draw(rng)
        return lambda trial: is_odd(trial) * bool({*trial.load.filler_lengths} - {PROMPT_TOKENS})

    return Fault("by neighbours, every time", rate, draw)


def complete(trial: Trial, odd: int) -> Iterator[Sample]:
    token_ids = (odd, 0)
    if trial.role == "control":
        fault = plant_fault(N_TOKENS)
        trial, token_ids = replace(trial, fault=fault), (0, 1)
    for nth in range(trial.n_samples):
        sample = Sample.of(trial, nth, Witness(trial.load.batch_size), "length", 1.0)
        yield replace(sample, token_ids=token_ids, token_texts=tuple(map(str, token_ids)))


def simulate(spec: RunSpec, trials: list[Trial], is_odd: IsOdd) -> list[Sample]:
    """What `ndcheck.runner.run_trials` would store."""
    samples = [sample for trial in trials for sample in complete(trial, is_odd(trial))]
    rows_of: dict[int, dict[int, tuple[int, int]]] = {}
    for sample in samples:
        rows_of.setdefault(sample.trial_id, {})[sample.slot] = hash(sample.token_ids), 0
    for trial in plan_confirmations(trials, rows_of):
        samples += complete(trial, is_odd(trial))
    return samples


def runs(spec: RunSpec, fault: Fault, n_runs: int) -> Iterator[tuple[ProbeSummary, dict[str, str]]]:
    """Each run's summary, and its verdicts: of the run, and of each property judged."""
    trials = plan_trials(spec, {"p1": PROMPT_TOKENS}, 1000)
    rng = random.Random(f"{fault.name}/{fault.truth}/{spec.endpoint}/{spec.n_samples}")
    record = Run("r", "0", spec, Environment(), "", status="finished")
    for _ in range(n_runs):
        findings = find(record, simulate(spec, trials, fault.draw(rng)))
        judgement = findings.judgement
        axes = {axis: v.outcome for axis, v in judgement.probes[0].axes.items()}
        yield findings.summary.probes[0], {"run": judgement.verdict.outcome, **axes}


def coverage(where: str, fault: Fault, n_samples: int, n_runs: int) -> dict[str, object]:
    """Of the run's rate over all draws, and of run-to-run's."""
    spec = replace(SPECS[where], n_samples=n_samples)
    held, too_low, of_repeats, n_draws, n_odd_references = 0, 0, 0, 0, 0
    for probe, _ in runs(spec, fault, n_runs):
        low, high = probe.rate_ci_low or 0.0, probe.rate_ci_high or 1.0
        held += low <= fault.truth <= high
        too_low += high < fault.truth
        n_draws += probe.n_draws
        repeats = probe.axes[0]
        of_repeats += (repeats.rate_ci_low or 0) <= fault.truth <= (repeats.rate_ci_high or 1)
        n_odd_references += int(probe.completions[probe.completions.reference].token_ids[0]) != 0
    return {
        "where": where,
        "fault": fault.name,
        "true_rate": fault.truth,
        "samples": n_samples,
        "mean_draws": round(n_draws / n_runs, 1),
        "runs": n_runs,
        "coverage": held / n_runs,
        "true_rate_above_the_interval": too_low / n_runs,
        "run_to_run_coverage": of_repeats / n_runs if "chance" in fault.name else None,
        "odd_references": n_odd_references,
    }


def attribution(where: str, fault: Fault, n_runs: int) -> dict[str, object]:
    """To what the failing runs are laid."""
    laid: Counter[str] = Counter()
    n_failed = 0
    for _, outcomes in runs(SPECS[where], fault, n_runs):
        if outcomes.pop("run") != "FAIL":
            continue
        n_failed += 1
        failing = {axis for axis, outcome in outcomes.items() if outcome == "FAIL"}
        if failing == {"run-to-run"}:
            laid["run-to-run"] += 1
        else:
            laid["others" if failing else "none"] += 1
    return {
        "where": where,
        "fault": fault.name,
        "true_rate": fault.truth,
        "runs": n_runs,
        "failed": n_failed,
        "to_run_to_run_alone": laid["run-to-run"],
        "to_no_property": laid["none"],
        "to_another_property": laid["others"],
        "share_to_another": laid["others"] / n_failed if n_failed else None,
    }


def write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows:
            writer = writer or csv.DictWriter(file, list(row), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(*row.values(), sep=", ", flush=True)


def write_attribution(folder: Path, n_runs: int = N_RUNS) -> None:
    points = [("in process", by_chance(rate, alike=True)) for rate in (0.01, 0.05, 0.2)]
    points += [("server", by_chance(rate, alike=True)) for rate in (0.02, 0.1)]
    # The control: what is no chance must not be laid to it.
    points += [("in process", neighbours_only(0.3))]
    write(folder / "attribution.csv", (attribution(*point, n_runs) for point in points))


def write_coverage(folder: Path, n_runs: int = N_RUNS) -> None:
    points = [
        ("server", by_chance(0.05, alike=True), 60),
        ("in process", by_load(0.1), 60),
        ("server", by_chance(0.2, alike=True), 60),
        ("in process", by_chance(0.05, alike=True), 60),
        ("in process", by_load(0.5), 60),
        ("server", by_chance(0.2, alike=False), 60),
    ]
    write(folder / "coverage.csv", (coverage(*point, n_runs) for point in points))


def main(folder: Path, *n_runs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_attribution(folder, *n_runs)
    write_coverage(folder, *n_runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
