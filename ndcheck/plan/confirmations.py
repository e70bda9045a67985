"""Loads that diverged, once more: a repeat tells a load that always parts from chance."""

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
    """The first loads that parted from their baselines along each axis, once more.

    ``rows_of`` holds, by trial and slot, what stands for the tokens and for the bits of a row.
    Only a repeat tells a load that always parts from chance. Where tokens parted, bits are not
    looked at; loads that ran more than once have been repeated.
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
