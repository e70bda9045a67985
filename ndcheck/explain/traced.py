"""What a trace found: ops, loads, and ops of one kind over all loads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ndcheck.explain.modules import without_numbers
from ndcheck.explain.recording import Call, Cause, Key, Place, Status
from ndcheck.records import Load


@dataclass(frozen=True, slots=True)
class OpFinding:
    """One op of the loaded pass, or a module as a whole, and what it does to the probe's row.

    ``status``: *introduces* if, given the probe's own inputs, it returns other bits than alone;
    *inherits* if its output differs in the load, but only as its inputs do; *clean* if it does not;
    *in a module* that could be compared only as a whole; *not compared*. ``cause`` says whether the
    bits change again when the same pass is repeated, or with other neighbours of the same shape, or
    are those alone in the first row of the same batch.
    ``reaches_logits``: whether the probe's logits follow the difference. ``digest`` is over the
    probe's row; ``shapes`` are of floating inputs, alone and loaded.
    """

    module: str
    op: str
    nth: int
    status: Status
    cause: Cause | None = None
    reaches_logits: bool = False
    is_module: bool = False
    max_ulp: int = 0
    digest: str | None = None
    digest_alone: str | None = None
    shapes: tuple[str, str] = ("", "")
    dtype: str = ""
    location: str = ""

    @property
    def place(self) -> Place:
        return self.op, without_numbers(self.module)


@dataclass(frozen=True, slots=True)
class LoadTrace:
    """One forward pass under a load, op by op, against the same pass of the probe alone.

    ``step`` 0 is the prefill, step t the pass whose logits give generated token t.
    ``tracing_changed_bits`` is the control: the same pass untraced must give the same logits,
    unless it gives others whenever it is repeated (``is_random``). ``is_padded``: longer rows
    beside it put padding before the probe's first token. ``is_accounted_for``: with all that was
    seen to differ put right, the logits are those alone. The caches, before the pass and after it,
    differ, do not, or cannot be compared (None).
    """

    load: Load
    slot: int
    step: int
    findings: tuple[OpFinding, ...]
    logits_differ: bool
    tracing_changed_bits: bool
    is_random: bool
    is_padded: bool
    is_accounted_for: bool
    cache_differs: bool | None
    cache_reaches_logits: bool
    cache_differs_after: bool | None
    logits_digest: str
    calls: dict[Place, Call]
    n_rows: int
    """Rows of the batch, times the tokens of each where a completion is fed."""

    @property
    def introducers(self) -> list[OpFinding]:
        """Those whose difference reaches the probe's logits."""
        return [f for f in self.findings if f.status == "introduces" and f.reaches_logits]

    @property
    def first_difference(self) -> OpFinding | None:
        """The first op, in order of execution, whose output differs from the pass alone."""
        differing = (f for f in self.findings if f.status in ("introduces", "inherits"))
        return next(differing, None)

    @property
    def n_not_compared(self) -> int:
        return sum(f.status == "not compared" for f in self.findings)

    @property
    def doubt(self) -> str | None:
        """What this trace leaves open, if it does."""
        if self.tracing_changed_bits:
            return "tracing itself changed the logits"
        if not self.logits_differ:
            return None
        found = self.introducers or self.cache_reaches_logits
        if self.is_accounted_for and found:
            return None
        rest = "a part of the difference comes" if found else "the difference comes"
        rest = f"{rest} from where no op and no module could be compared"
        if self.is_random:
            return f"{rest}, and is another at every repetition"
        n = self.n_not_compared
        n_ops = f"{n} op{'s' * (n != 1)} ran otherwise alone, or " * bool(n)
        return f"{rest}: {n_ops}the model itself does what torch does not see"


@dataclass(frozen=True, slots=True)
class OpGroup:
    """The ops of one kind in layers of one form, over all traced loads.

    ``bit_classes`` are the `LoadTrace.n_rows` (1: alone) with the same bits in every layer;
    ``counts`` is how often each status was found, over layers and loads. ``where`` is the module's
    path if one layer alone introduces the difference, else the form.
    """

    op: str
    module: str
    where: str
    n_ops: int
    counts: dict[str, int]
    cause: Cause | None
    reaches_logits: bool
    is_module: bool
    max_ulp: int
    bit_classes: tuple[tuple[int, ...], ...]
    shapes: tuple[str, str]
    dtype: str
    location: str

    @property
    def introduces(self) -> bool:
        """Whether it introduces a difference that reaches the logits."""
        return self.reaches_logits


def group_findings(traces: Sequence[LoadTrace]) -> list[OpGroup]:
    """Ops of every trace, grouped by op and form of module, in order of first execution."""
    groups: dict[Place, list[tuple[int, OpFinding]]] = {}
    for trace in traces:
        for finding in trace.findings:
            groups.setdefault(finding.place, []).append((trace.n_rows, finding))
    sizes = [trace.n_rows for trace in traces]
    return [_group(op, module, found, sizes) for (op, module), found in groups.items()]


def _group(
    op: str, module: str, found: list[tuple[int, OpFinding]], sizes: Iterable[int]
) -> OpGroup:
    counts: dict[str, int] = {}
    for _, finding in found:
        counts[finding.status] = counts.get(finding.status, 0) + 1
    guilty = [(size, f) for size, f in found if f.status == "introduces"]
    # Where an op introduces nothing, it gives the bits alone.
    bits: dict[int, dict[Key, str | None]] = {size: {} for size in (1, *sizes)}
    for size, f in guilty:
        bits[size][f.module, f.op, f.nth] = f.digest
    classes: dict[frozenset[tuple[Key, str | None]], list[int]] = {}
    for size in sorted(bits):
        classes.setdefault(frozenset(bits[size].items()), []).append(size)
    _, example = guilty[0] if guilty else found[0]
    paths = {f.module for _, f in guilty}
    return OpGroup(
        op,
        module,
        paths.pop() if len(paths) == 1 else module,
        len({(f.module, f.nth) for _, f in found}),
        counts,
        # The gravest: "chance" over "neighbours" over "place" over "shape".
        min((f.cause for _, f in guilty if f.cause), default=None),
        any(f.reaches_logits for _, f in guilty),
        example.is_module,
        max((f.max_ulp for _, f in guilty), default=0),
        tuple(tuple(sizes) for sizes in classes.values()),
        example.shapes,
        example.dtype,
        example.location,
    )
