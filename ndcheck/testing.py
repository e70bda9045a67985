"""Assertions for tests: is a model deterministic, is an op batch-invariant?

Bits are compared, never values within a tolerance. Each assertion has a control: it has to find a
fault of one bit that it plants itself, or it fails as vacuous.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

BATCH_SIZES = (1, 2, 3, 4, 5, 8, 16, 17, 32)
N_CALLS = 10


def assert_deterministic(
    model: str | Path | Callable[..., Any], *inputs: Any, n: int = N_CALLS, **options: Any
) -> None:
    """Fail unless equal inputs give equal bits.

    A model (a name as in `ndcheck run --model`) is measured with ``options``, those of
    `ndcheck.measure`; anything but a PASS fails. A function is called ``n`` times with ``inputs``
    and ``options``, of tensors, arrays, generators of random numbers and transformers' caches a
    copy each time, since it may change them; it returns tensors, arrays, numbers, text, caches, or
    lists, dictionaries and dataclasses of these. Raises TypeError for anything else, for tensors
    that are not dense, and for iterators as inputs.

    >>> assert_deterministic("scripted:clean", loads=[1, 4], samples=40, max_tokens=8)
    >>> assert_deterministic(sorted, [3, 1, 2])
    """
    __tracebackhide__ = True
    if not callable(model):
        _assert_passes(str(model), options)
        return
    if n < 2:
        raise ValueError(f"n = {n}: give 2 or more calls to compare")
    calls = [dict(_leaves(model(*_fresh(inputs), **_fresh(options)))) for _ in range(n)]
    if not any(leaf.bits for leaf in calls[0].values()):
        raise AssertionError("vacuous: the function returned nothing to compare")
    faulty = {place: leaf.with_fault() for place, leaf in calls[0].items()}
    if _compare_calls([calls[0], faulty]) is None:
        raise AssertionError("vacuous: a planted fault went unseen")
    difference = _compare_calls(calls)
    if difference is not None:
        raise AssertionError(difference)


def assert_batch_invariant(
    op: Callable[..., torch.Tensor],
    rows: torch.Tensor,
    *shared: Any,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> None:
    """Fail unless each row's result has the same bits in every batch.

    ``op(batch, *shared)`` maps a tensor of shape [B, ...] to one of shape [B, ...], row by row;
    ``rows`` has shape [N, ...]. Each row alone (B = 1) is its reference, and it has to keep its
    bits in batches of ``batch_sizes``, in every slot, among the other rows (repeated where there
    are too few), and alone once more. The op may write into its batch, which is a copy.

    >>> import torch
    >>> assert_batch_invariant(torch.relu, torch.randn(4, 8))
    """
    __tracebackhide__ = True
    sizes = sorted(batch_sizes)
    _check_tensor("rows: give", rows)
    if len(rows) < 2:
        raise ValueError("rows: give at least 2, so that a row can have another as its neighbour")
    if not sizes or sizes[0] < 1 or sizes[-1] < 2:
        raise ValueError(f"batch_sizes {sizes}: give numbers of 1 or more, and one above 1")

    def faulty(batch: torch.Tensor, *shared: Any) -> torch.Tensor:
        result = op(batch, *shared)
        return result if len(batch) == 1 else _flip_one_bit(result)

    alone = _find_alone(op, rows, shared)
    if not alone[0].bits or len(set(alone)) == 1:
        raise AssertionError("vacuous: the op gives every row the same result")
    if _find_variance(faulty, rows, shared, sizes, alone) is None:
        raise AssertionError("vacuous: a planted fault went unseen")
    difference = _find_variance(op, rows, shared, sizes, alone)
    for row, (first, again) in enumerate(zip(alone, _find_alone(op, rows, shared), strict=True)):
        if (changed := _difference(again, first)) is not None:
            difference = f"row {row} alone is another when the call is repeated: {changed}"
            break
    if difference is not None:
        raise AssertionError(difference)


def _assert_passes(model: str, options: dict[str, Any]) -> None:
    __tracebackhide__ = True
    from ndcheck.api import measure

    with tempfile.TemporaryDirectory(prefix="ndcheck-") as folder:
        run = measure(model, out=Path(folder) / "run", **options)
        if run.verdict != "PASS":
            raise AssertionError("\n".join((run.command, run.verdict, *run.reasons)))


class _Leaf(NamedTuple):
    """A value as bytes: a copy, since its buffer may be the next call's too."""

    kind: str
    bits: bytes

    def with_fault(self) -> _Leaf:
        return _Leaf(self.kind, bytes([self.bits[0] ^ 1]) + self.bits[1:]) if self.bits else self


def _fresh(value: Any) -> Any:
    """Copies of what a call may change in ``value``: tensors and arrays, with their strides, and
    generators of random numbers; all else as it is."""
    if isinstance(value, MutableMapping):
        fresh = copy.copy(value)
        fresh.update((key, _fresh(item)) for key, item in value.items())
        return fresh
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_fresh, value))
    if type(value) in (list, tuple):
        return type(value)(map(_fresh, value))
    if isinstance(value, Iterator):
        raise TypeError(
            f"an input that is read once ({type(value).__name__}) is used up by the first call: "
            "give a list of its items"
        )
    if _is_torchs(value, "Generator"):
        own = type(value)(value.device)
        own.set_state(value.get_state())
        return own
    kind = type(value).__module__.partition(".")[0]
    # Arrays and single numbers; generators.
    is_numpys = kind == "numpy" and (hasattr(value, "tobytes") or hasattr(value, "normal"))
    if is_numpys or isinstance(value, random.Random) or _is_cache(value):
        return copy.deepcopy(value)
    if _is_tensor(value):
        own = value if value.is_leaf else value.detach().requires_grad_(value.requires_grad)
        return copy.deepcopy(own)
    return value


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, _Leaf]]:
    """Everything in ``value`` with where it is, such as ``[0]['logits']``."""
    if isinstance(value, Mapping):
        yield place, _Leaf(f"{type(value).__name__} of {len(value)}", b"")
        for key, item in value.items():
            yield from _leaves(item, f"{place}[{key!r}]")
    elif _is_cache(value):
        held = {k: v for k, v in vars(value).items() if _is_state(v)}
        yield from _leaves(held, place)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        yield from _leaves(fields, place)
    elif isinstance(value, (list, tuple, deque)):
        yield place, _Leaf(f"{type(value).__name__} of {len(value)}", b"")
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}[{index}]")
    elif getattr(getattr(value, "dtype", None), "hasobject", False):
        # Its bytes are where the objects are, not what they are.
        yield from _leaves(value.tolist(), place)
    else:
        yield place, _Leaf("None", b"") if value is None else _leaf(value)


def _is_tensor(value: Any) -> bool:
    return _is_torchs(value, "Tensor")


def _is_torchs(value: Any, name: str) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, name))


def _is_cache(value: Any) -> bool:
    """Is it one of transformers' key-value caches, or a layer of one?"""
    return any(c.__module__ == "transformers.cache_utils" for c in type(value).__mro__)


def _is_state(value: Any) -> bool:
    """Is it what a cache keeps of tokens, not how it was made?"""
    return isinstance(value, (int, list, dict)) or _is_tensor(value) or _is_cache(value)


def _leaf(value: Any) -> _Leaf:
    kind = type(value).__name__
    if isinstance(value, str):
        return _Leaf(kind, value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _Leaf(kind, value)
    if isinstance(value, (float, complex)):
        return _Leaf(kind, struct.pack("<dd", value.real, value.imag))
    if isinstance(value, int):
        return _Leaf(kind, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if _is_tensor(value):
        from ndcheck.explain.alignment import as_bytes

        is_dense = str(value.layout) == "torch.strided" and not value.is_nested
        if not is_dense or value.is_meta or value.is_quantized:
            raise TypeError("cannot compare the bits of a sparse, nested, quantised or meta tensor")
        plain = value.detach().resolve_conj().resolve_neg().cpu()
        return _Leaf(f"{value.dtype} {list(value.shape)}", as_bytes(plain).numpy().tobytes())
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):
        return _Leaf(f"{value.dtype} {list(value.shape)}", value.tobytes())
    raise TypeError(f"cannot compare the bits of a {kind}: return tensors, arrays, numbers or text")


def _compare_calls(calls: Sequence[dict[str, _Leaf]]) -> str | None:
    first = calls[0]
    for number, call in enumerate(calls[1:], 2):
        if call.keys() != first.keys():
            return f"call {number} of {len(calls)} returned another structure than call 1"
        for place, leaf in call.items():
            difference = _difference(leaf, first[place])
            if difference is not None:
                return f"result{place} of call {number} differs from that of call 1: {difference}"
    return None


def _find_alone(
    op: Callable[..., torch.Tensor], rows: torch.Tensor, shared: tuple[Any, ...]
) -> list[_Leaf]:
    """Each row's result in a batch of its own."""
    return [_apply(op, rows[i : i + 1].clone(), shared)[0] for i in range(len(rows))]


def _find_variance(
    op: Callable[..., torch.Tensor],
    rows: torch.Tensor,
    shared: tuple[Any, ...],
    batch_sizes: Sequence[int],
    alone: Sequence[_Leaf],
) -> str | None:
    """The first row, by batch size, that differs from the same row ``alone``."""
    n = len(rows)
    for batch_size in batch_sizes:
        for offset in range(n):
            order = [(offset + slot) % n for slot in range(batch_size)]
            results = _apply(op, rows[order], shared)
            for slot, row in enumerate(order):
                difference = _difference(results[slot], alone[row])
                if difference is not None:
                    return (
                        f"row {row} in slot {slot} of a batch of {batch_size} differs from the "
                        f"row alone: {difference}"
                    )
    return None


def _apply(
    op: Callable[..., torch.Tensor], batch: torch.Tensor, shared: tuple[Any, ...]
) -> list[_Leaf]:
    result = op(batch, *shared)
    _check_tensor("the op has to return", result)
    if result.shape[:1] != batch.shape[:1]:
        raise ValueError(
            f"the op gave shape {list(result.shape)} for a batch of {len(batch)}: its first "
            "dimension has to be the batch's"
        )
    return [_leaf(row) for row in result]


def _check_tensor(demand: str, value: Any) -> None:
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{demand} a tensor [B, ...], not a {type(value).__name__}")


def _flip_one_bit(result: torch.Tensor) -> torch.Tensor:
    from ndcheck.explain.alignment import as_bytes

    faulty = result.detach().resolve_conj().resolve_neg().clone().contiguous()
    as_bytes(faulty)[:1] ^= 1
    return faulty


def _difference(a: _Leaf, b: _Leaf) -> str | None:
    if a.kind != b.kind:
        return f"{a.kind}, not {b.kind}"
    if a.bits == b.bits:
        return None
    n_differ = sum(x != y for x, y in zip(a.bits, b.bits, strict=False))
    n_differ += abs(len(a.bits) - len(b.bits))
    return f"{n_differ} of {max(len(a.bits), len(b.bits))} bytes ({a.kind})"
