"""What torchrun says of this process: which of how many ranks it is, and who speaks for them."""

from __future__ import annotations

import os
from collections.abc import Callable

from ndcheck.errors import UsageError
from ndcheck.records import RunSpec

_is_first: Callable[[], bool] | None = None


def rank() -> int:
    """0 outside torchrun."""
    return _number("RANK") if _is_launched() else 0


def n_ranks() -> int:
    """1 outside torchrun."""
    return _number("WORLD_SIZE") if _is_launched() else 1


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(
            f"{variable}={text}: torchrun sets a whole number; unset it without torchrun"
        )
    return int(text)


def _is_launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def program(spec: RunSpec) -> str:
    """``ndcheck run`` as a shell starts it on as many ranks as the spec wants."""
    n = spec.tensor_parallel
    return "ndcheck run" if n == 1 else f"torchrun --nproc-per-node {n} -m ndcheck run"


def check_request(spec: RunSpec) -> None:
    """Raise UsageError for what ranks cannot do together."""
    n, groups = spec.tensor_parallel, spec.tp_groups
    if n < 1:
        raise UsageError(f"--tp {n}: give 1 or more")
    if groups is not None:
        if groups < 2 or groups & (groups - 1) or groups % n:
            divided = f" that --tp {n} divides" if n > 1 else ""
            raise UsageError(f"--tp-groups {groups}: give a power of two{divided}, such as 8")
        if "invariant" not in spec.arms:
            raise UsageError("--tp-groups is for ndcheck's own kernels: give --kernels invariant")
    if n == 1 and groups is None:
        return
    option = "--tp" if n > 1 else "--tp-groups"
    if spec.batching != "exact":
        raise UsageError(f"--batching {spec.batching}: with {option} a trial is one exact batch")
    if n > 1 and ":" in spec.device:
        raise UsageError(f"--device {spec.device}: with --tp each rank takes a GPU of its own")
    if n > 1 and not spec.batch_sizes:
        raise UsageError("--loads auto: with --tp each rank has memory of its own: give numbers")


def check_ranks(spec: RunSpec) -> None:
    """Raise UsageError where torchrun has not started one process for each rank of the spec."""
    wanted, started = spec.tensor_parallel, n_ranks()
    if wanted == started:
        return
    if wanted == 1:
        raise UsageError(
            f"torchrun started {started} processes and the run wants 1: give --tp {started}, or "
            "start it without torchrun"
        )
    raise UsageError(
        f"--tp {wanted} takes {wanted} processes and here {'is' if started == 1 else 'are'} "
        f"{started}: start them with {program(spec)} --tp {wanted} and the other options"
    )


def set_speaker(is_first: Callable[[], bool]) -> None:
    """From now on the rank that asks first speaks, not rank 0: it knows best what went wrong."""
    global _is_first
    _is_first = is_first


def may_speak() -> bool:
    """Whether this rank is the one to print what ended the run; the others keep silent."""
    return rank() == 0 if _is_first is None else _is_first()
