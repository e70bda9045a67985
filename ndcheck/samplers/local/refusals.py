"""What of a run would measure the model's own code, and so is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.plan.grid import CACHE_STATES
from ndcheck.records import Axis, CacheState, Decoding, RunSpec
from ndcheck.samplers.base import NOT_FED
from ndcheck.samplers.local.checkpoint.rope import rope_reason
from ndcheck.samplers.local.checkpoint.thresholds import Rows
from ndcheck.samplers.local.faithful import (
    ALONE,
    IN_PASSES,
    PATHS,
    SCORED,
    Examination,
    Path,
)


def paths_of(spec: RunSpec) -> list[Path]:
    """What the run will send through the model; continuous batching takes other ways."""
    if spec.batching == "continuous":
        return []
    wanted = {"whole"} | ({*CACHE_STATES} if "cache" in spec.axes else set())
    fed = {IN_PASSES} if spec.feeds else set()
    scored = {SCORED} if "scoring" in spec.axes else set()
    return [
        path
        for path in PATHS
        if (path[1] in wanted or path in fed | scored)
        and ("neighbours" in spec.axes or not path[0])
    ]


def longest_rows(lengths: Sequence[tuple[int, int]], decoding: Decoding) -> Rows:
    """The run's, of ``lengths`` as `find_refusals` takes them."""
    return Rows(max(n for n, _ in lengths), max(n for _, n in lengths), decoding.max_tokens)


@dataclass(frozen=True, slots=True)
class Refusals:
    """What of a run would measure the model's own code: cache states and axes, and why."""

    states: dict[CacheState, str] = field(default_factory=dict)
    axes: dict[Axis, str] = field(default_factory=dict)


def find_refusals(
    spec: RunSpec, config: Any, findings: Examination | None, lengths: Sequence[tuple[int, int]]
) -> Refusals:
    """What to leave out of ``spec``'s run.

    ``lengths`` are, in tokens, those of every prompt and of the longest filler beside it.
    ``findings`` None: the weights are not there, so nothing is known but the config.
    Raises UsageError where the prompt alone cannot be measured.
    """
    n_new = spec.decoding.max_tokens

    def find(path: Path) -> str | None:
        is_padded, cache_state = path
        for prompt, longest in lengths:
            rows = [prompt, longest] if is_padded else [prompt]
            entry = "whole" if cache_state == "scored" else cache_state
            if reason := rope_reason(config, rows, n_new, entry):
                return reason
        return findings.reason(path) if findings is not None else None

    if reason := find(ALONE):
        raise UsageError(f"--model {spec.model}: {reason}")
    refusals = Refusals()
    for state in CACHE_STATES:
        if reason := find((False, state)):
            refusals.states[state] = reason
    if len(refusals.states) == len(CACHE_STATES):
        refusals.axes["cache"] = refusals.states[CACHE_STATES[0]]
    if reason := find((True, "whole")):
        refusals.axes["neighbours"] = reason
    if reason := find(IN_PASSES):
        refusals.axes["width"] = reason
    if reason := find(SCORED):
        refusals.axes["scoring"] = reason
    if spec.batching == "continuous":
        refusals.axes.update(NOT_FED)
    return refusals
