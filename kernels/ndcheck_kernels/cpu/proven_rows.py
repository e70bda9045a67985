"""Stock CPU kernels, used only in shapes proven to give one bit class.

Every CPU kernel here maps rows to rows. Its reduction order inside a row may follow the number of
rows (a GEMM turns into a GEMV, a sum is split over threads). So a kernel is defined by the bits of
one *base tile* of `BASE_ROWS` rows, and a call with another number of rows is allowed only after a
proof, once per process and shape: on operands whose exact result is 0, so that the result is all
rounding noise, every row must come out as the base tile has it, also beside rows of NaN: a kernel
that reads beyond a row's end multiplies its neighbour by 0. Rows in numbers that fail the proof are
computed in base tiles, padded.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from ndcheck_kernels.scope.refusal import UnsupportedCallError

BASE_ROWS = 16

RowKernel = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Probe:
    """Operands that tell reduction orders apart, for the kernel under proof and for its definition.

    `kernel` has synthetic fixed operands in the layout of the real ones; `definition` is the kernel
    whose base tile sets the bits, if that is another one.
    """

    rows: tuple[torch.Tensor, ...]  # each [..., BASE_ROWS, K]
    kernel: RowKernel
    definition: RowKernel | None = None


_proofs: dict[tuple[Hashable, int, int], bool] = {}


def map_rows(
    identity: tuple[Hashable, ...],
    kernel: RowKernel,
    rows: tuple[torch.Tensor, ...],
    probe: Callable[[], Probe],
    steps: tuple[int, ...] = (),
) -> torch.Tensor:
    """`kernel(*rows)` with the bits of the base tile for every row; rows are dim -2.

    `identity` names the kernel and everything static about it; `probe` makes the operands of a
    proof. With `steps`, descending, more rows than the last step come in pieces of these sizes,
    which bounds the number of proofs; without, every number of rows gets its own.
    """
    count = rows[0].shape[-2]
    rows = tuple(map(_aligned, rows))
    threads = torch.get_num_threads()  # They decide how torch cuts up the rows.
    if count == 0 or _proofs.get((identity, count, threads)):
        return kernel(*rows)

    def proven(size: int) -> bool:
        key = (identity, size, threads)
        if key not in _proofs:
            _proofs[key] = _prove(probe(), size)
        return _proofs[key]

    if (not steps or count in steps or count < steps[-1]) and proven(count):
        return kernel(*rows)
    step = next((s for s in steps if s < count), BASE_ROWS)
    if count > step:
        starts = range(0, count, step)
        pieces = [tuple(r[..., s : s + step, :] for r in rows) for s in starts]
        return torch.cat([map_rows(identity, kernel, p, probe, steps) for p in pieces], dim=-2)
    size = next((s for s in (1, 2, 4, 8, BASE_ROWS) if s >= count and proven(s)), None)
    if size is None:
        raise UnsupportedCallError(
            "on this CPU, with this number of threads, torch's kernel gives a row other bits in "
            "another place; try torch.set_num_threads(1)"
        )
    # Contiguous, as torch's own results are: models call view() on them.
    return kernel(*(_pad(r, size) for r in rows))[..., :count, :].contiguous()


def _prove(probe: Probe, size: int) -> bool:
    """Whether `size` rows get the bits that the base tile gives them, in any place in it."""
    definition = probe.definition or probe.kernel
    base = definition(*probe.rows)
    alike = definition(*(r[..., :1, :].expand_as(r).contiguous() for r in probe.rows))
    swapped = definition(*(r.flip(-2) for r in probe.rows)).flip(-2)
    if not (same_bits(alike, base[..., :1, :].expand_as(base)) and same_bits(swapped, base)):
        return False
    # Few rows at a time must come out right for all of the base rows, or chance could pass them.
    # So must every place where a row's result is only a few numbers.
    for start in range(0, BASE_ROWS, size if base.shape[-1] >= BASE_ROWS else 1):
        order = (start + torch.arange(size)) % BASE_ROWS
        if not same_bits(
            probe.kernel(*(r[..., order, :] for r in probe.rows)), base[..., order, :]
        ):
            return False
    return size == 1 or all(_ignores_neighbours(probe, base, size, parity) for parity in (0, 1))


def _ignores_neighbours(probe: Probe, base: torch.Tensor, size: int, parity: int) -> bool:
    """Whether every second row has its bits when the others are NaN."""
    order = torch.arange(size) % BASE_ROWS
    own = torch.arange(size) % 2 == parity
    rows = (
        r[..., order, :].masked_fill(~own[:, None], torch.nan)
        if r.is_floating_point()
        else r[..., order, :]
        for r in probe.rows
    )
    return same_bits(probe.kernel(*rows)[..., own, :], base[..., order[own], :])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bit patterns: NaN equals itself, and +0 is not -0."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _pad(rows: torch.Tensor, size: int) -> torch.Tensor:
    padded = rows.new_ones((*rows.shape[:-2], size, rows.shape[-1]))
    padded[..., : rows.shape[-2], :] = rows
    return padded


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and starting at a cache line, as fresh tensors do: vector loops peel otherwise."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()
