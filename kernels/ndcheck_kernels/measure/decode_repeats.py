"""Does attention give the same bits twice, called as a decode step calls it?

One call repeated on tensors that stay where they are says little: what a kernel reads beyond them,
the workspace that it is given, and which of its blocks end first are then the same each time. In a
decode step they are not. So here a step is repeated as `generate()` makes it: keys and values are
copied together anew (a growing cache) or written to their column (a static one, with a mask), free
memory is filled with other numbers, another product runs before it, and nothing is waited for.

Each key is there twice, with opposite values: whoever sees both gets exactly 0 from them, so what
is left is rounding. All rows of a batch are copies of one, so they must have the same bits too.

Control: a step that adds its own number. Where that does not show, nothing else could.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from ndcheck_kernels.measure.cases import FixedSource

HEADS = ((32, 8, 128), (9, 3, 64))
"""Query heads, key heads, head dim: an 8B, and SmolLM2-135M."""
# What was seen to matter comes first, should time run out.
KEYS = {
    "cuda": (256, 130, 129, 200, 512, 1024, 128, 127, 64, 96, 160, 192, 257, 320, 384, 700, 2048),
    "cpu": (129, 64),
}
ROWS = {"cuda": (32, 16, 1, 64, 4, 8, 2, 128), "cpu": (1, 4)}
REPEATS = {"cuda": 24, "cpu": 4}
SPARE = 64
"""Columns of a static cache that no token has reached yet."""

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Repeats:
    """One step, repeated. `backend` is what torch chooses for it."""

    form: str
    backend: str
    heads: str
    keys: int
    rows: int
    repeats: int
    differing: int
    is_uniform: bool
    """All rows of the first call have the same bits; they are copies."""


def repeat_steps(
    device: torch.device, dtype: torch.dtype, seconds: float,
    keys: Sequence[int] | None = None, rows: Sequence[int] | None = None,
) -> Iterator[Repeats]:  # fmt: skip
    """Every form, shape, number of keys and rows, until the time is over; the control first."""
    keys, rows = keys or KEYS[device.type], rows or ROWS[device.type]
    repeats = REPEATS[device.type]
    deadline = time.monotonic() + seconds
    with torch.inference_mode():
        yield repeat("control", HEADS[0], keys[0], rows[0], repeats, dtype, device)
        for n_keys, n_rows, heads, form in product(keys, rows, HEADS, FORMS):
            if time.monotonic() > deadline:
                return
            yield repeat(form, heads, n_keys, n_rows, repeats, dtype, device)


def repeat(
    form: str, heads: tuple[int, int, int], keys: int, rows: int, repeats: int,
    dtype: torch.dtype, device: torch.device,
) -> Repeats:  # fmt: skip
    """One step `repeats` times, queued one behind the other."""
    step, backend = _control(heads, rows, dtype, device) if form == "control" else (
        FORMS[form](*_operands(heads, keys, rows, dtype, device))
    )  # fmt: skip
    first = step().clone()
    noise = torch.randn(256, 256, device=device)
    seen = []
    for number in range(repeats - 1):
        # What is freed here is what the next step's copies and workspace are made of.
        torch.full_like(first, number)
        torch.full((1 << 20,), float(number), device=device)
        for _ in range(number % 3):
            noise @ noise
        seen.append((step() != first).any())
    rest = first[:1].expand_as(first)
    return Repeats(
        form, backend, f"{heads[0]}/{heads[1]}x{heads[2]}", keys, rows, repeats,
        sum(bool(each) for each in seen), torch.equal(first, rest),
    )  # fmt: skip


def _operands(
    heads: tuple[int, int, int], keys: int, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, H, 1, D] and k, v [B, H_kv, KV, D]; rows are copies of one."""
    n_heads, kv_heads, dim = heads
    source = FixedSource(dtype, device)
    q = source.normal(1, 1, n_heads, dim).expand(rows, -1, -1, -1).contiguous().transpose(1, 2)
    half = keys // 2
    k, v = (source.wide(1, kv_heads, half, dim) for _ in range(2))
    k = k / 64  # Tame scores: no key may drown the others.
    odd = torch.zeros_like(v[:, :, :1])[:, :, : keys % 2]  # One that adds nothing.
    order = source.order(keys)
    k, v = torch.cat([k, k, odd], 2)[:, :, order], torch.cat([v, -v, odd], 2)[:, :, order]
    k, v = (t.expand(rows, -1, -1, -1).contiguous() for t in (k, v))
    return q, k, v


def _growing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Step, str]:
    """A dynamic cache: the last token is copied behind the others, into new memory."""
    old = [t[:, :, :-1].contiguous() for t in (k, v)]
    new = [t[:, :, -1:].contiguous() for t in (k, v)]

    def step() -> torch.Tensor:
        keys, values = (torch.cat(pair, 2) for pair in zip(old, new, strict=True))
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return step, _backend(q, k, v, None, enable_gqa=True)


def _static(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Step, str]:
    """A static cache: all its columns, and a mask that hides those that are not reached."""
    keys = k.shape[2]
    full = [F.pad(t, (0, 0, 0, SPARE)) for t in (k, v)]
    mask = (torch.arange(keys + SPARE, device=q.device) < keys).expand(len(q), 1, 1, -1)
    column = torch.tensor([keys - 1], device=q.device)
    group = q.shape[1] // k.shape[1]

    def grouped() -> tuple[torch.Tensor, torch.Tensor]:
        return full[0].repeat_interleave(group, 1), full[1].repeat_interleave(group, 1)

    def step() -> torch.Tensor:
        for buffer, t in zip(full, (k, v), strict=True):
            buffer.index_copy_(2, column, t[:, :, -1:])
        keys_of, values_of = grouped()
        return F.scaled_dot_product_attention(q, keys_of, values_of, attn_mask=mask)

    return step, _backend(q, *grouped(), mask)


def _sliced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Step, str]:
    """A view into a longer cache: rows that do not lie behind one another."""
    keys = k.shape[2]
    full = [F.pad(t, (0, 0, 0, SPARE)) for t in (k, v)]

    def step() -> torch.Tensor:
        keys_of, values_of = full[0].clone()[:, :, :keys], full[1].clone()[:, :, :keys]
        return F.scaled_dot_product_attention(q, keys_of, values_of, enable_gqa=True)

    views = full[0][:, :, :keys], full[1][:, :, :keys]
    return step, _backend(q, *views, None, enable_gqa=True)


FORMS = {"growing": _growing, "static": _static, "sliced": _sliced}


def _control(
    heads: tuple[int, int, int], rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Step, str]:
    """The planted fault: no call is like the one before."""
    like = torch.zeros(rows, heads[0], 1, heads[2], dtype=dtype, device=device)
    return lambda: like.add_(1), "planted"


def _backend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **options: bool
) -> str:
    """Which of its kernels torch chooses for a call."""
    from torch.nn.attention import SDPBackend

    try:
        chosen = torch._fused_sdp_choice(q, k, v, mask, **options)
        return SDPBackend(chosen).name.lower().removesuffix("_attention")
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return "unknown"
