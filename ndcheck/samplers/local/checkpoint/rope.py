"""Rotary positions that follow the longest row of a batch, by a model's config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ndcheck.records import CacheState

SWITCHING_ROPES = ("longrope", "su", "dynamic")


def rope_reason(
    config: Any, lengths: Sequence[int], n_new: int, cache_state: CacheState
) -> str | None:
    """Why a row's length decides another's positions; None if it does not."""
    switch = rope_switch(config)
    if switch is None or max(lengths) + n_new <= switch[1]:
        return None
    kind, limit = switch
    if "dynamic" not in kind and cache_state == "whole" and min(lengths) > limit:
        return None
    return (
        f"its {kind} positions change for the whole batch once the longest row passes {limit} "
        f"tokens, so rows of {min(lengths)} to {max(lengths) + n_new} tokens change one another, "
        f"and what they computed before, by design: no rounding. Stay below {limit} tokens, "
        "prompt, completion and fillers"
    )


def rope_switch(config: Any) -> tuple[str, int] | None:
    """The kind of a rope that follows the longest row, and the length from which it does."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return None
    switches = []
    for entry in (parameters, *(v for v in parameters.values() if isinstance(v, dict))):
        kind = str(entry.get("rope_type", entry.get("type")))
        name = "original_max_position_embeddings"
        limit = entry.get(name) or getattr(config, name, None)
        limit = limit or getattr(config, "max_position_embeddings", None)
        if limit and any(known in kind for known in SWITCHING_ROPES):
            switches.append((kind, int(limit)))
    return min(switches, key=lambda switch: switch[1], default=None)
