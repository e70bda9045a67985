"""The smallest set of ops whose invariant kernels make a probe's row independent of its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ndcheck.explain.alignment import equal_bits
from ndcheck.explain.modules import ModulePath, without_numbers
from ndcheck.explain.recording import Place, op_name
from ndcheck.explain.traced import OpGroup
from ndcheck.explain.tracing import Tracer
from ndcheck.records import Decoding, Load, Probe
from ndcheck.samplers.local.sampler import TransformersSampler


@dataclass(frozen=True, slots=True)
class Swaps:
    """What swapping showed, over every step up to the traced one and every load.

    ``tried`` are the introducers, ``enough_alone`` those of which one suffices. ``smallest`` is a
    set of which no member can be left out; None if even all introducers together do not suffice.
    """

    tried: tuple[Place, ...]
    enough_alone: tuple[Place, ...]
    smallest: tuple[Place, ...] | None
    reason: str = ""


class _NothingSwappedError(Exception):
    """A swap left every op stock: what was measured with it would prove nothing."""


class _Swap(TorchDispatchMode):
    """Lets ops at ``places`` through to the invariant kernels, and runs all others stock."""

    def __init__(self, places: set[Place], path: ModulePath, stock_keys: tuple[Any, Any]) -> None:
        super().__init__()
        self._places = places
        self._path = path
        self._stock_keys = stock_keys

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        is_swapped = (op_name(func), without_numbers(self._path.path)) in self._places
        if is_swapped or func.is_view:  # As for the recorder, a view is made once.
            return func(*args, **(kwargs or {}))
        with torch._C._ForceDispatchKeyGuard(*self._stock_keys):
            return func(*args, **(kwargs or {}))


def find_swaps(
    sampler: TransformersSampler,
    probe: Probe,
    step: int,
    groups: Sequence[OpGroup],
    loads: Sequence[tuple[Load, int]],
    decoding: Decoding,
) -> Swaps:
    """Swap the introducers one at a time, then leave out of all what is not needed.

    ``loads`` come with the slot of the probe that is watched.
    """
    from ndcheck_kernels import UncoveredOpError

    guilty = [group for group in groups if group.introduces and group.cause != "chance"]
    places = tuple((group.op, group.module) for group in guilty if not group.is_module)
    if len(places) < len(guilty):
        return Swaps(places, (), None, "kernels replace ops, not the work of whole modules")
    if not places:
        return Swaps((), (), None, "")

    def is_invariant(chosen: Sequence[Place]) -> bool:
        swapped = partial(_swapped, sampler, set(chosen))
        tracer = Tracer(sampler, probe, step, decoding=decoding, kernels=swapped)
        alone = tracer.logits(Load(1), None)
        return all(
            equal_bits(ours, theirs)
            for load, slot in loads
            for ours, theirs in zip(tracer.logits(load, slot), alone, strict=True)
        )

    try:
        alone = tuple(place for place in places if is_invariant([place]))
        if alone:
            return Swaps(places, alone, alone[:1])
        if not is_invariant(places):
            reason = "the introducers at this step are not all that differs on the way to it"
            return Swaps(places, (), None, reason)
        needed = list(places)
        for place in places:
            rest = [other for other in needed if other != place]
            if rest and is_invariant(rest):
                needed = rest
    except (UncoveredOpError, _NothingSwappedError) as error:
        return Swaps(places, (), None, str(error).splitlines()[0])
    return Swaps(places, (), tuple(needed))


@contextmanager
def _swapped(sampler: TransformersSampler, places: set[Place]) -> Iterator[None]:
    import ndcheck_kernels

    stock_keys = (
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set(),
    )
    with (
        ndcheck_kernels.invariant_kernels() as scope,
        ModulePath(sampler.model) as path,
        _Swap(places, path, stock_keys),
    ):
        yield
    if not scope.fires:
        raise _NothingSwappedError(
            f"no invariant kernel ran in place of {', '.join(sorted({op for op, _ in places}))}"
        )
