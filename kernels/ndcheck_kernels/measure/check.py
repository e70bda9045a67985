"""Does an op give a row the same bits in every batch, and is it as accurate as stock?

Bits: probe rows are computed alone and then in batches of every size asked for, in several places,
beside other rows and beside NaN and infinity. A *bit class* is a result that one row was seen to
have; an invariant op has one. Accuracy: the largest error against float64 over the largest exact
result; the budget comes from torch's own error in the same dtype. It is measured again at both ends
of the dtype's range, and bits and accuracy for every other form of the call: arguments left out.

Control: a twin of the op that sums in one group of terms for few rows and in up to five for more,
on the same operands. Only if that is caught do equal bits mean anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ndcheck_kernels.measure.cases import Call, Case, Form, Operands, Source
from ndcheck_kernels.scope.mode import invariant_kernels
from ndcheck_kernels.scope.refusal import UncoveredOpError
from ndcheck_kernels.scope.registry import accepted_ops
from ndcheck_kernels.scope.state import Scope

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]

PROBES = 16
CONTROL_ROWS = (1, 20, 40, 60, 80)  # 1 to 5 groups: some library cuts K in halves itself
MOST_FORM_ROWS = 33
_NAN, _INFINITY = PROBES, PROBES + 1  # behind the probes in the pool
# Roundings of a float32 result that are fine whatever torch's error: it may be one long chain of
# additions, where torch adds in blocks. Their errors grow as the root of the terms (Higham and Mary
# 2019, A new approach to probabilistic rounding error analysis).
_ROUNDINGS = 16


@dataclass(frozen=True, slots=True)
class RowCount:
    """One number of rows, in both arms."""

    m: int
    same_bits: bool
    """Every probe row had the bits that it has alone."""
    error: float
    stock_same_bits: bool
    stock_error: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One form of the call on one kind of operands."""

    where: str
    error: float
    stock_error: float
    budget: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One op at one shape in one dtype. A refused op has nothing but its refusal."""

    op: str
    shape: str
    dtype: str
    kernel: str = ""
    """invariant, or torch where its own kernel is accepted as it is."""
    classes: int | None = None
    stock_classes: int | None = None
    error: float | None = None
    stock_error: float | None = None
    budget: float | None = None
    control_classes: int | None = None
    violation: str = ""
    """The first batch in which a row had other bits."""
    fired: bool = False
    refusal: str = ""
    row_counts: tuple[RowCount, ...] = ()
    accuracies: tuple[Accuracy, ...] = ()
    """At the ends of the range, and of the other forms of the call."""

    @property
    def outcome(self) -> Outcome:
        if self.failure:
            return "FAIL"
        return "INCONCLUSIVE" if self.doubt else "PASS"

    @property
    def failure(self) -> str | None:
        """What is wrong with the op."""
        if self.classes is None or self.error is None or self.budget is None:
            return None
        if not self.fired:
            return "the override did not fire: torch's own kernel ran"
        if self.classes > 1:
            return f"{self.classes} bit classes: a row has other bits in {self.violation}"
        if not self.error <= self.budget:
            return f"error {self.error:.2g} is above the budget of {self.budget:.2g}"
        for found in self.accuracies:
            if not found.error <= found.budget:
                return (
                    f"error {found.error:.2g} is above the budget of {found.budget:.2g} "
                    f"{found.where}"
                )
        return None

    @property
    def doubt(self) -> str | None:
        """Why equal bits would mean nothing."""
        if self.refusal:
            return self.refusal
        if all(count.m < 2 for count in self.row_counts):
            return "single rows alone leave nothing to compare"
        if (self.control_classes or 0) < 2:
            return "the planted fault was not caught: these operands cannot tell orders apart"
        return None


@dataclass(frozen=True, slots=True)
class Bits:
    """What one op's rows looked like."""

    classes: int
    differing: dict[int, str]
    """By number of rows, the first batch that changed bits."""


def default_row_counts(device_type: str) -> tuple[int, ...]:
    """1 to 3, powers of two and their neighbours, and 300."""
    most = 11 if device_type == "cuda" else 7
    powers = {2**p + d for p in range(2, most + 1) for d in (-1, 0, 1)}
    return tuple(sorted({1, 2, 3, 300} | powers))


def check(
    case: Case, dtype: torch.dtype, device: torch.device, row_counts: Sequence[int]
) -> Finding:
    """Measure both arms and the control. Row counts above the case's limit are left out."""
    counts = [m for m in row_counts if m <= case.max_rows] or [case.max_rows]
    noise = case.operands(Source.seeded(dtype, device), PROBES, True)
    wide = case.operands(Source.seeded(dtype, device, seed=1), max(counts), False)
    label = str(dtype).removeprefix("torch.")
    try:
        with invariant_kernels() as scope:
            bits = bit_classes(case.call, noise, counts)
            results = [case.call(*wide.first(m)) for m in counts]
            fired = _fired(case, scope, device)
            control = bit_classes(_planted(case), noise, CONTROL_ROWS)
    except UncoveredOpError as error:
        return Finding(case.op, case.shape, label, refusal=str(error))
    bits, fired, forms = _with_forms(case, bits, fired, noise, counts, device)
    stock_bits = bit_classes(case.call, noise, counts)
    exact = case.reference(*wide.first(max(counts)))
    errors = [_error(result, exact[:m]) for m, result in zip(counts, results, strict=True)]
    stock_errors = [_error(case.call(*wide.first(m)), exact[:m]) for m in counts]
    return Finding(
        op=case.op,
        shape=case.shape,
        dtype=label,
        kernel="torch" if _is_accepted(case, device) else "invariant",
        classes=bits.classes,
        stock_classes=stock_bits.classes,
        error=_largest(errors),
        stock_error=_largest(stock_errors),
        budget=_budget(case, results[0], stock_errors),
        control_classes=control.classes,
        violation=next(iter(bits.differing.values()), ""),
        fired=fired,
        row_counts=tuple(
            RowCount(m, m not in bits.differing, error, m not in stock_bits.differing, stock)
            for m, error, stock in zip(counts, errors, stock_errors, strict=True)
        ),
        accuracies=tuple(_accuracies(case, forms, dtype, device)),
    )


def _with_forms(
    case: Case, bits: Bits, fired: bool, noise: Operands, counts: Sequence[int],
    device: torch.device,
) -> tuple[Bits, bool, tuple[Form, ...]]:  # fmt: skip
    """What was seen of the case, with what is seen of its other forms; those that are covered."""
    few = [m for m in counts if m <= MOST_FORM_ROWS] or counts[:1]
    covered = []
    for form in case.forms:
        try:
            with invariant_kernels() as scope:
                seen = bit_classes(form.call, noise, few)
        except UncoveredOpError:
            continue
        covered.append(form)
        # torch may define it by other ops here, which have fired then.
        fired = fired and (scope.fires.total() > 0 or _is_accepted(case, device))
        if seen.classes > bits.classes:
            where = {m: f"{company}, {form.name}" for m, company in seen.differing.items()}
            bits = Bits(seen.classes, where | bits.differing)
    return bits, fired, tuple(covered)


def _accuracies(
    case: Case, forms: tuple[Form, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Accuracy]:
    """Of every form on ordinary operands and at both ends of the range."""
    m = min(PROBES, case.max_rows)
    ordinary = case.operands(Source.seeded(dtype, device, seed=2), m, False)
    ends = case.ends(Source.seeded(dtype, device, seed=2), m) if case.ends else ()
    for kind, operands in (("", ordinary), *ends):
        for form in (Form("", case.call, case.reference), *forms):
            stock = form.call(*operands.first(m))
            with invariant_kernels():
                result = form.call(*operands.first(m))
            error, stock_error = _errors(result, stock, form.reference(*operands.first(m)))
            where = " ".join(filter(None, (form.name, kind and f"with {kind}")))
            yield Accuracy(where, error, stock_error, _budget(case, result, [stock_error]))


def _errors(result: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Ours and torch's, where torch itself stays within the range and rounding does not leave it.

    A result that is infinite or NaN where the rounded exact one is not has an infinite error.
    """
    if not result.is_floating_point():
        return _error(result, exact), _error(stock, exact)
    limits = torch.finfo(result.dtype)
    rounded = exact.to(result.dtype).double()
    at_edge = (exact.abs() / limits.max - 1).abs() < 0.01
    counted = ~at_edge & ((stock == rounded) | (stock.isfinite() & rounded.isfinite()))
    scale = rounded[counted & rounded.isfinite()].abs()
    unit = max(scale.max().item() if scale.numel() else 0.0, limits.tiny)

    def error(got: torch.Tensor) -> float:
        off = torch.where(got == rounded, 0.0, (got.double() - rounded).abs())[counted]
        return off.nan_to_num(torch.inf, torch.inf).max().item() / unit if off.numel() else 0.0

    return error(result), error(stock)


def bit_classes(call: Call, operands: Operands, row_counts: Sequence[int]) -> Bits:
    """Compute PROBES rows in batches of every size, and compare each with the row alone."""
    pool = tuple(_with_poison(rows) for rows in operands.rows)

    def compute(index: torch.Tensor) -> torch.Tensor:
        result = call(*(rows[index] for rows in pool), *operands.fixed)
        return result.reshape(len(index), -1).contiguous().view(torch.uint8)

    device = pool[0].device
    alone = torch.cat([compute(torch.tensor([i], device=device)) for i in range(PROBES)])
    others: list[set[bytes]] = [set() for _ in range(PROBES)]
    differing: dict[int, str] = {}
    for m in row_counts:
        for company, index in _batches(m):
            index = index.to(device)
            got = compute(index)
            probe = index.clamp(max=PROBES - 1)
            unequal = (got != alone[probe]).any(-1) & (index < PROBES)
            if not bool(unequal.any()):
                continue
            differing.setdefault(m, f"a batch of {m}{company}")
            for i, row in zip(index[unequal].tolist(), got[unequal].cpu(), strict=True):
                others[i].add(row.numpy().tobytes())
    return Bits(1 + max(map(len, others)), differing)


def _batches(m: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Batches of m rows, as indices into the pool, and what is special about each."""
    turn = torch.arange(m)
    for start in range(0, PROBES, m):
        yield "", (start + turn) % PROBES
    if m >= PROBES:
        yield ", in another place", (7 + turn) % PROBES
    if m > 1:
        poisoned = torch.where(turn % 2 == 0, _NAN, _INFINITY)
        poisoned[0] = 0
        if m > 2:
            poisoned[m // 2] = 1
        yield ", beside NaN and infinity", poisoned
        yield ", beside NaN and infinity", poisoned.flip(0)


def _with_poison(rows: torch.Tensor) -> torch.Tensor:
    """The rows, one of NaN and one of infinity; integers say where a row lies and stay valid."""
    if not rows.is_floating_point():
        return torch.cat([rows, rows[:2]])
    return torch.cat(
        [rows, torch.full_like(rows[:1], torch.nan), torch.full_like(rows[:1], torch.inf)]
    )


def _planted(case: Case) -> Call:
    """The case's op with a summation that follows the number of rows."""

    def call(*operands: torch.Tensor) -> torch.Tensor:
        return case.grouped(1 + len(operands[0]) // CONTROL_ROWS[1], *operands)

    return call


def _is_accepted(case: Case, device: torch.device) -> bool:
    return case.fires in accepted_ops(device.type)


def _fired(case: Case, scope: Scope, device: torch.device) -> bool:
    return scope.fires[case.fires] > 0 or _is_accepted(case, device)


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error over the largest exact result; for indices, the share that is wrong."""
    if not result.is_floating_point():
        return (result != exact).double().mean().item()
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


def _largest(errors: Sequence[float]) -> float:
    """NaN, if one is: a result that is none has no error below any budget."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


def _budget(case: Case, result: torch.Tensor, stock_errors: Sequence[float]) -> float:
    """Twice torch's error, or a few roundings of the result; indices have to be right."""
    if not result.is_floating_point():
        return 0.0
    roundings = max(_ROUNDINGS, case.terms**0.5) if result.dtype == torch.float32 else 1
    return max(2 * _largest(stock_errors), roundings * torch.finfo(result.dtype).eps)
