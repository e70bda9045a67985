"""Run some of the loads that diverged once more, to tell chance from a load that always diverges.

One that diverges again is laid to its axis; one that does not may have been chance.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ndcheck.records import Arm, Purpose, Trial

CONFIRMED_LOADS = 2
"""Loads of an axis, in a probe's arm, that are run again where they diverged."""


def plan_confirmations(
    trials: Sequence[Trial], rows_of: Mapping[int, Mapping[int, tuple[int, int]]]
) -> list[Trial]:
    """A repeat of up to `CONFIRMED_LOADS` loads of each axis that differed from their baselines.

    ``rows_of`` holds two numbers for each trial and slot: rows with equal tokens have the same
    first number, and if their bits are equal too, the same second. Where some loads of a probe and
    arm differed in tokens, those that differed in bits alone are not repeated, and no load is that
    ran more than once.
    """
    done = [trial for trial in trials if trial.trial_id in rows_of and trial.role != "control"]
    n_run = Counter((trial.arm, trial.probe_id, trial.load) for trial in done)
    parted: dict[tuple[Arm, str], list[list[Trial]]] = defaultdict(lambda: [[], []])
    for trial in done:
        if trial.baseline is None or trial.baseline not in rows_of:
            continue
        rows, baseline = rows_of[trial.trial_id], rows_of[trial.baseline]
        pairs = [(rows[s], baseline[s]) for s in rows.keys() & baseline.keys()]
        pairs = pairs or [(rows[min(rows)], baseline[min(baseline)])]
        found = parted[trial.arm, trial.probe_id]
        if any(here[0] != there[0] for here, there in pairs):
            found[0].append(trial)
        elif any(here != there for here, there in pairs):
            found[1].append(trial)
    again: list[Trial] = []
    end = max((trial.first_sample_id + trial.n_samples for trial in trials), default=0)
    for in_tokens, in_bits in parted.values():
        n_of: Counter[Purpose] = Counter()
        for trial in in_tokens or in_bits:
            is_single = n_run[trial.arm, trial.probe_id, trial.load] == 1
            if not is_single or n_of[trial.purpose] == CONFIRMED_LOADS:
                continue
            n_of[trial.purpose] += 1
            repeat = replace(
                trial,
                trial_id=len(trials) + len(again),
                purpose="run-to-run",
                first_sample_id=end,
                baseline=trial.trial_id,
            )
            again.append(repeat)
            end += repeat.n_samples
    return again
