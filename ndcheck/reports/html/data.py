"""What the scripts of the HTML report draw: JSON, with each token once for every path it is on."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ndcheck.reports.figures import bins, histogram, series_name
from ndcheck.reports.html.views import ArmView, ProbeView
from ndcheck.reports.trees.trunks import Trunk, walk
from ndcheck.reports.untrusted import without_controls

MAX_TOKENS = 1_200_000
"""Tokens embedded for the comparison of any two completions: about 3 bytes each."""


def make_data(probes: list[ProbeView], unit: str) -> dict[str, Any]:
    """Plain JSON values, without control characters; positions count ``unit``s."""
    arms = [arm for probe in probes for arm in probe.arms]
    budget = MAX_TOKENS // max(1, len(arms))
    stored = [_stored_trunks(arm, budget) for arm in arms]
    counts: Counter[tuple[int, str]] = Counter()
    for trunks, n_with_tokens in stored:
        for trunk, _ in trunks[:n_with_tokens]:
            counts.update(_own_tokens(trunk))
    ranks = {token: rank for rank, (token, _) in enumerate(counts.most_common())}
    codes = {token: _varint(rank) for token, rank in ranks.items()}
    of_arm = iter(
        _arm_data(arm, trunks, n_with_tokens, codes)
        for arm, (trunks, n_with_tokens) in zip(arms, stored, strict=True)
    )
    return {
        "unit": unit,
        "vocabulary": [without_controls(text) for _, text in ranks],
        "probes": [
            {"arms": [next(of_arm) for _ in probe.arms], "charts": _charts(probe)}
            for probe in probes
        ],
    }


def _own_tokens(trunk: Trunk) -> Iterable[tuple[int, str]]:
    """Those that its parent does not have: from where it leaves."""
    completion = trunk.completion
    ids = completion.token_ids[trunk.start :].tolist()
    return zip(ids, completion.token_texts[trunk.start :], strict=True)


def _stored_trunks(arm: ArmView, budget: int) -> tuple[list[tuple[Trunk, int]], int]:
    """Trunks with their parents' indices (-1: none), and how many of them come with tokens.

    The most frequent first, so that a trunk comes after its parent.
    """
    pairs = list(walk(arm.figures.trunk)) if arm.figures.trunk else []
    pairs.sort(key=lambda pair: (pair[1] is not None, -pair[0].n_samples))
    indices = {id(trunk): index for index, (trunk, _) in enumerate(pairs)}
    trunks = [(trunk, indices[id(parent)] if parent else -1) for trunk, parent in pairs]
    n_with_tokens = 0
    for trunk, _ in trunks:
        budget -= trunk.completion.n_tokens - trunk.start
        if budget < 0:
            break
        n_with_tokens += 1
    return trunks, n_with_tokens


def _varint(number: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first."""
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _arm_data(
    arm: ArmView,
    trunks: list[tuple[Trunk, int]],
    n_with_tokens: int,
    codes: Mapping[tuple[int, str], bytes],
) -> dict[str, Any]:
    places = {trunk.completion.completion_id: i for i, (trunk, _) in enumerate(trunks)}
    in_strip = walk(arm.figures.trunk) if arm.figures.trunk else ()
    order = {trunk.completion.completion_id: place for place, (trunk, _) in enumerate(in_strip)}
    loads = sorted({row.load for row in arm.figures.rows})
    tokens = b"".join(
        codes[token] for trunk, _ in trunks[:n_with_tokens] for token in _own_tokens(trunk)
    )
    return {
        "arm": arm.arm,
        "n_samples": arm.figures.probe.n_samples,
        "reference": next((t.completion.completion_id for t, _ in trunks if t.is_reference), None),
        "trunks": [
            {
                "completion": trunk.completion.completion_id,
                "parent": parent,
                "start": trunk.start,
                "end": trunk.completion.n_tokens,
                "count": trunk.completion.count,
                "colour": arm.colours[trunk.completion.completion_id],
                "place": order[trunk.completion.completion_id],
            }
            for trunk, parent in trunks
        ],
        "n_with_tokens": n_with_tokens,
        "tokens": base64.b64encode(tokens).decode("ascii"),
        "loads": loads,
        "rows": [
            {
                "sample": row.sample_id,
                "trial": row.trial_id,
                "load": loads.index(row.load),
                "size": row.batch_size,
                "slot": row.slot,
                "latent": row.latent,
                "trunk": places[row.completion_id],
            }
            for row in arm.figures.rows
        ],
    }


def _charts(probe: ProbeView) -> dict[str, Any]:
    figures = [arm.figures for arm in probe.arms]
    edges = bins(figures)
    series = [(arm, copies) for arm in figures for copies in arm.fillings]
    unique = [arm.unique_by_batch_size(copies=copies) for arm, copies in series]
    speeds = [arm.tokens_per_s(copies=copies) for arm, copies in series]
    sizes = sorted(set().union(*unique, *speeds))
    # The first arm that forks: its reference's margins are what its forks are seen against.
    main = next((arm for arm in figures if arm.forks), figures[0])
    return {
        "sizes": sizes,
        "edges": edges,
        "margins": [_rounded(margin) for margin in main.reference_margins],
        "series": [
            {
                "arm": arm.probe.arm,
                "label": series_name(arm, copies=copies),
                "hollow": len(arm.fillings) > 1 and not copies,
                "unique": _at(sizes, counts),
                "speed": _at(sizes, speed),
            }
            for (arm, copies), counts, speed in zip(series, unique, speeds, strict=True)
        ],
        "arms": [
            {
                "arm": arm.probe.arm,
                "histogram": histogram(arm, edges),
                "forks": [
                    {"position": position, "margin": _rounded(margin)}
                    for position, margin in arm.forks
                ],
            }
            for arm in figures
        ],
    }


def _at(sizes: list[int], values: Mapping[int, float]) -> list[float | None]:
    return [_rounded(values.get(size, math.nan)) for size in sizes]


def _rounded(number: float) -> float | None:
    """Four significant digits: as many as a picture shows."""
    return float(f"{number:.4g}") if math.isfinite(number) else None
