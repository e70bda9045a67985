"""What a manifest holds, and what differs between two: pure, without torch.

A manifest is the bits of every op on one stack, on operands that are the same everywhere. Where two
are of one machine, a difference is a package's doing, and the packages that changed are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ndcheck.errors import UsageError
from ndcheck.judging.verdict import Verdict, count
from ndcheck.storage.reading import decode, parse_json, read_text

FORMAT: Literal["ndcheck-manifest-1"] = "ndcheck-manifest-1"
Kind = Literal["bits", "boundaries", "order", "rows", "run-to-run", "refused"]


MOST_NAMED = 4
CONTROL = "control"
"""The form of the step that was planted to differ."""
KERNELS = re.compile(r"torch$|triton|nvidia-cu(blas|dnn)|ndcheck|numpy|.*(gemm|flash|attn|kernel)")
"""Names of packages that bring kernels: the likeliest cause comes first."""


@dataclass(frozen=True, slots=True)
class Point:
    """One number of rows; see `ndcheck_kernels.measure.manifest`."""

    m: int
    bits: str
    is_uniform: bool
    differing: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One op at one shape, in one dtype and arm."""

    op: str
    shape: str
    dtype: str
    arm: str
    operands: str
    shows_order: bool
    repeats: int
    points: tuple[Point, ...]
    refusal: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.arm

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The numbers of rows at which the bits are not those of the number before."""
        return tuple(b.m for a, b in pairwise(self.points) if a.bits != b.bits)

    @property
    def apart(self) -> tuple[int, ...]:
        """The numbers of rows at which copies of a row in one batch have different bits."""
        return tuple(point.m for point in self.points if not point.is_uniform)

    @property
    def unstable(self) -> tuple[int, ...]:
        """The numbers of rows at which a repeated call had other bits."""
        return tuple(point.m for point in self.points if point.differing)


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step's attention, repeated; see `ndcheck_kernels.measure.decode_repeats`."""

    form: str
    backend: str
    heads: str
    keys: int
    rows: int
    repeats: int
    differing: int
    is_uniform: bool

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.form, self.heads, self.keys, self.rows


@dataclass(frozen=True, slots=True)
class Order:
    """In which order an op adds at one number of rows, as `ndcheck order` reads it."""

    op: str
    arm: str
    terms: int
    rows: int
    order: str
    doubt: str | None

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.op, self.arm, self.terms, self.rows


@dataclass(frozen=True, slots=True)
class Manifest:
    """The bits of one stack. ``row_counts`` were asked for; an op may take fewer.

    ``ops``: those asked for alone, without steps and orders; empty for everything.
    """

    format: Literal["ndcheck-manifest-1"]
    made_at: str
    elapsed_s: float
    device: str
    dtypes: tuple[str, ...]
    row_counts: tuple[int, ...]
    ops: tuple[str, ...]
    environment: dict[str, Any]
    packages: dict[str, Any]
    entries: tuple[Entry, ...]
    steps: tuple[Step, ...] = ()
    orders: tuple[Order, ...] = ()

    @property
    def hardware(self) -> str:
        """The name of what computed it."""
        hardware = self.environment.get("hardware", {})
        return str(hardware.get("gpu" if self.device == "cuda" else "cpu"))


def read_manifest(path: Path) -> Manifest:
    """Raises UsageError for what is none."""
    try:
        return decode(Manifest, parse_json(read_text(path)))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path}: it is no manifest: {reason}; ndcheck kernels manifest OUT makes one"
        ) from error


@dataclass(frozen=True, slots=True)
class Difference:
    """Something of one op that is not the same in B; ``rows`` are where."""

    kind: Kind
    what: str
    rows: tuple[int, ...]
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class ManifestComparison:
    """B beside A. ``n_compared`` are ops at one number of rows whose bits repeat in both; of those
    ``n_blind`` could show nothing, since another order has the same bits there. ``n_unsteady`` are
    those that repeat in neither. ``missing`` is all of A that B does not have."""

    differences: tuple[Difference, ...]
    packages: dict[str, tuple[str | None, str | None]]
    setting: dict[str, tuple[Any, Any]]
    n_compared: int
    n_blind: int
    n_unsteady: int
    missing: tuple[str, ...]
    other_operands: tuple[str, ...]
    control_caught: bool


SETTING = {
    "hardware": ("cpu", "gpu"),
    "software": ("torch", "triton", "cuda", "cudnn", "python", "ndcheck"),
    "numeric_flags": None,
}
"""What is shown of an environment; all of its flags."""


def compare_manifests(a: Manifest, b: Manifest) -> ManifestComparison:
    """Raises UsageError where they are of different kinds of device."""
    if a.device != b.device:
        raise UsageError(f"one manifest is of {a.device}, the other of {b.device}")
    old, new = ({e.key: e for e in m.entries} for m in (a, b))
    differences: list[Difference] = []
    other_operands, missing = [], [" ".join(key) for key in old if key not in new]
    missing += _missing_parts(a, b)
    n_compared = n_blind = n_unsteady = 0
    for key, before in old.items():
        after = new.get(key)
        if after is None:
            continue
        if before.operands != after.operands and before.points and after.points:
            other_operands.append(" ".join(key))
            continue
        if gone := {p.m for p in before.points} - {p.m for p in after.points}:
            # What is refused there is a difference.
            missing += [f"{' '.join(key)} at M = {_list(tuple(sorted(gone)))}"] * bool(after.points)
        unsteady = set(before.unstable) & set(after.unstable)
        shared = len({p.m for p in before.points} & {p.m for p in after.points} - unsteady)
        n_unsteady += len(unsteady)
        n_compared += shared
        n_blind += 0 if before.shows_order and after.shows_order else shared
        differences += _entry_differences(before, after)
    differences += _order_differences(a, b)
    differences += _step_differences(a, b)
    controls = [step for step in b.steps if step.form == CONTROL]
    needs_control = bool(controls) or any(step.form != CONTROL for step in b.steps)
    return ManifestComparison(
        tuple(differences),
        _changed(a.packages, b.packages),
        dict(_settings(a, b)),
        n_compared,
        n_blind,
        n_unsteady,
        tuple(missing),
        tuple(other_operands),
        not needs_control or any(step.differing for step in controls),
    )


def _missing_parts(a: Manifest, b: Manifest) -> Iterator[str]:
    """Steps and orders of A that B does not have."""
    steps, orders = {step.key for step in b.steps}, {order.key for order in b.orders}
    for step in a.steps:
        if step.key not in steps:
            yield f"decode step, {step.form} cache, {step.heads}, {step.keys} keys"
    for order in a.orders:
        if order.key not in orders:
            yield f"order of {order.op} {order.arm}, {order.terms} terms at M = {order.rows}"


def _entry_differences(a: Entry, b: Entry) -> Iterator[Difference]:
    what = f"{a.op} {a.shape} {a.dtype} {a.arm}"
    if a.refusal != b.refusal:
        yield Difference("refused", what, (), a.refusal or "computed", b.refusal or "computed")
        return
    before, after = ({p.m: p for p in entry.points} for entry in (a, b))
    rows = [m for m in before if m in after]
    changed = tuple(m for m in rows if before[m].bits != after[m].bits)
    # Bits that do not repeat differ by themselves.
    if steady := tuple(m for m in changed if not before[m].differing and not after[m].differing):
        yield Difference("bits", what, steady, *_digests(before, after, steady[0]))
    are_steady = not (a.unstable or b.unstable)
    if are_steady and len(rows) == len(before) == len(after) and a.boundaries != b.boundaries:
        lists = (_list(entry.boundaries) for entry in (a, b))
        yield Difference("boundaries", what, (), *lists)
    if apart := tuple(
        m
        for m in rows
        if before[m].is_uniform != after[m].is_uniform
        and not (before[m].differing or after[m].differing)
    ):
        yield Difference("rows", what, apart, *(_list(entry.apart) for entry in (a, b)))
    if unstable := tuple(m for m in rows if (not before[m].differing) != (not after[m].differing)):
        yield Difference("run-to-run", what, unstable, *(_list(entry.unstable) for entry in (a, b)))


def _digests(a: Mapping[int, Point], b: Mapping[int, Point], m: int) -> tuple[str, str]:
    return a[m].bits, b[m].bits


def _order_differences(a: Manifest, b: Manifest) -> Iterator[Difference]:
    before, after = ({order.key: order for order in m.orders} for m in (a, b))
    for key, old in before.items():
        new = after.get(key)
        if new is not None and old.order != new.order:
            what = f"{old.op} of {old.terms} terms float32 {old.arm}"
            yield Difference("order", what, (old.rows,), old.order, new.order)


def _step_differences(a: Manifest, b: Manifest) -> Iterator[Difference]:
    before, after = ({step.key: step for step in m.steps} for m in (a, b))
    for key, old in before.items():
        new = after.get(key)
        if new is None or old.form == CONTROL or (not old.differing) == (not new.differing):
            continue
        what = f"decode step, {old.form} cache, {old.heads}, {old.keys} keys"
        shown = (f"{s.differing} of {s.repeats} ({s.backend})" for s in (old, new))
        yield Difference("run-to-run", what, (old.rows,), *shown)


def _changed(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> dict[str, tuple[str | None, str | None]]:
    names = sorted({*a, *b}, key=lambda name: (name != "torch", not KERNELS.match(name), name))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _settings(a: Manifest, b: Manifest) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for group, names in SETTING.items():
        x, y = (m.environment.get(group) or {} for m in (a, b))
        for name in names or sorted({*x, *y}):
            if x.get(name) != y.get(name):
                yield f"{group}.{name}", (x.get(name), y.get(name))


def judge_manifests(found: ManifestComparison) -> Verdict:
    """FAIL where bits, their boundaries or orders changed; a PASS needs something that could."""
    if found.differences:
        what = count(len({d.what for d in found.differences}), "op")
        named = list(found.packages.items())[:MOST_NAMED]
        after = ", ".join(f"{n} {x or 'absent'} -> {y or 'absent'}" for n, (x, y) in named)
        more = len(found.packages) - len(named)
        after += f" and {count(more, 'other package')}" if more else ""
        cause = f", after {after}" if after else ", with the same packages"
        return Verdict("FAIL", (f"{what} changed bits or class boundaries{cause}",))
    doubts = []
    if found.n_compared <= found.n_blind:
        doubts.append("nothing was compared that could have shown another order")
    if found.missing:
        doubts.append(f"{count(len(found.missing), 'part')} of A are not in B: {found.missing[0]}")
    if found.other_operands:
        doubts.append(f"other operands, so no bits can be compared: {found.other_operands[0]}")
    if not found.control_caught:
        doubts.append("the planted step was not seen to differ from run to run")
    if doubts:
        return Verdict("INCONCLUSIVE", tuple(doubts))
    told = found.n_compared - found.n_blind
    seen = f"the same bits in {found.n_compared} of {found.n_compared}; another order would have "
    unsteady = f"; {found.n_unsteady} more repeat themselves in neither, which tells nothing"
    return Verdict("PASS", (f"{seen}shown in {told}{unsteady * bool(found.n_unsteady)}",))


def _list(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows)) or "none"
