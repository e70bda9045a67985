"""What `ndcheck trace` found, as text and as JSON values."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from ndcheck.explain.advice import advise, spans
from ndcheck.explain.kernel_names import kernel_names
from ndcheck.explain.recording import Status
from ndcheck.explain.swapping import Swaps
from ndcheck.explain.traced import LoadTrace, OpGroup, group_findings
from ndcheck.reports.untrusted import visible

SCHEMA_VERSION = 2  # 2: status "in a module", and who reaches the logits
MAX_KERNEL_NAMES = 4


@dataclass(frozen=True)
class Explanation:
    """One step traced under several loads.

    ``recorded`` is the digest of its logits in a run, ``alone_repeats`` whether the pass alone gave
    its bits again after the loads.
    """

    step: int
    traces: Sequence[LoadTrace]
    swaps: Swaps | None
    recorded: str | None = None
    alone_repeats: bool = True

    @functools.cached_property
    def groups(self) -> list[OpGroup]:
        return group_findings(self.traces)

    @functools.cached_property
    def kernels(self) -> dict[tuple[str, str], dict[str, list[str]]]:
        """Names of the GPU kernels of every introducer, alone and in the last load that it met."""
        found = {}
        for group in self.groups:
            calls = [trace.calls.get((group.op, group.module)) for trace in self.traces]
            met = [call for call in calls if call is not None]
            alone, loaded = kernel_names(met[-1]) if met else ((), ())
            if alone or loaded:
                found[group.op, group.module] = {"alone": list(alone), "loaded": list(loaded)}
        return found

    @functools.cached_property
    def advice(self) -> list[str]:
        return advise(self.groups, self.traces, self.swaps)

    @property
    def doubt(self) -> str | None:
        """What is left open, though something may have been found."""
        if not self.alone_repeats:
            return (
                "after the loads the pass alone gives other bits than before them: by chance, or "
                "by what the model keeps from earlier batches"
            )
        is_random = any(trace.is_random for trace in self.traces)
        if self.recorded and self.recorded not in {t.logits_digest for t in self.traces}:
            if is_random:
                return (
                    "the logits are not those recorded in the run: they differ at every repetition"
                )
            return (
                "the logits are not those recorded in the run: the machine, the number of threads "
                "or the software are others, or the sample differed by chance"
            )
        return next((trace.doubt for trace in self.traces if trace.doubt), None)

    @property
    def finds(self) -> bool:
        """Whether an op, a module or the cache was seen to move the probe's logits."""
        return any(trace.introducers or trace.cache_reaches_logits for trace in self.traces)

    @property
    def is_sound(self) -> bool:
        """Whether what was looked at is the pass that runs when nobody looks."""
        return not any(trace.tracing_changed_bits for trace in self.traces)

    @property
    def moves_cache_alone(self) -> bool:
        """Whether the cache differs after the pass, and the logits do not: later steps decide."""
        return any(t.cache_differs_after and not t.logits_differ for t in self.traces)

    @property
    def exit_code(self) -> int:
        if self.finds and self.is_sound:
            return 1
        return 3 if self.doubt or self.moves_cache_alone else 0


def trace_document(setting: dict[str, Any], explanations: Sequence[Explanation]) -> dict[str, Any]:
    """Plain JSON values: every op of every trace, the groups, swaps and advice."""
    return {"schema_version": SCHEMA_VERSION, **setting, "steps": list(map(_step, explanations))}


def _step(explanation: Explanation) -> dict[str, Any]:
    groups = explanation.groups
    return {
        "step": explanation.step,
        "doubt": explanation.doubt,
        "loads": [
            {
                "load": asdict(trace.load),
                "slot": trace.slot,
                "logits_differ": trace.logits_differ,
                "tracing_changed_bits": trace.tracing_changed_bits,
                "is_random": trace.is_random,
                "is_accounted_for": trace.is_accounted_for,
                "cache_differs": trace.cache_differs,
                "cache_reaches_logits": trace.cache_reaches_logits,
                "cache_differs_after": trace.cache_differs_after,
                "first_difference": _first(trace),
                "ops": [asdict(finding) for finding in trace.findings],
            }
            for trace in explanation.traces
        ],
        "groups": [
            {**asdict(group), "kernels": explanation.kernels.get((group.op, group.module))}
            for group in groups
            if "introduces" in group.counts
        ],
        "counts": count_statuses(groups),
        "swaps": asdict(explanation.swaps) if explanation.swaps else None,
        "advice": explanation.advice,
    }


def _first(trace: LoadTrace) -> dict[str, Any] | None:
    first = trace.first_difference
    return (
        None if first is None else {"module": first.module, "op": first.op, "status": first.status}
    )


def count_statuses(groups: Sequence[OpGroup]) -> dict[str, int]:
    counts = dict.fromkeys(get_args(Status), 0)
    for group in groups:
        for status, n in group.counts.items():
            counts[status] += n
    return counts


def trace_lines(title: str, explanations: Sequence[Explanation], width: int) -> Iterator[str]:
    """The screen: for each step a verdict, the introducers, the shares, and what to do."""
    yield visible(title)
    for explanation in explanations:
        yield ""
        yield from _explanation_lines(explanation, width)


def _explanation_lines(explanation: Explanation, width: int) -> Iterator[str]:
    groups = explanation.groups
    introducers = [group for group in groups if group.introduces]
    kind = "prefill" if explanation.step == 0 else "decode"
    if any(trace.load.is_fed for trace in explanation.traces):
        kind = "fed"
    sizes = ", ".join(str(trace.n_rows) for trace in explanation.traces)
    yield from textwrap.wrap(
        f"step {explanation.step} ({kind}), {sizes} row{'s' * (sizes != '1')}: "
        f"{_verdict(explanation, introducers)}",
        width,
        subsequent_indent="  ",
    )
    if explanation.doubt:
        yield f"  DOUBT  {visible(explanation.doubt)}"
    if introducers:
        yield ""
        yield from _table(introducers, width)
        yield ""
        yield from _first_lines(explanation, width)
    for group in introducers:
        names = explanation.kernels.get((group.op, group.module))
        if names:
            yield visible(f"{group.op} in {group.where}")
            for where, launched in names.items():
                for name in launched[:MAX_KERNEL_NAMES]:
                    yield visible(f"  {where:<7} {name}")[:width]
    counts = count_statuses([group for group in groups if not group.is_module])
    total = sum(counts.values())
    shares = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    yield from textwrap.wrap(f"of {total} floating-point ops: {shares}", width)
    for status, why in (
        ("in a module", "ran otherwise alone, so that their module was compared as a whole"),
        ("not compared", "not compared, as they and all around them ran otherwise alone"),
    ):
        ops = sorted({group.op for group in groups if status in group.counts})
        if ops:
            yield from textwrap.wrap(f"{why}: {', '.join(ops)}", width)
    for sentence in explanation.advice:
        yield from textwrap.wrap(
            visible(sentence),
            width,
            initial_indent="- ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        )


def _verdict(explanation: Explanation, introducers: Sequence[OpGroup]) -> str:
    silent = [g.op for g in explanation.groups if "introduces" in g.counts and not g.introduces]
    ops = ", ".join(dict.fromkeys(silent))
    if not explanation.is_sound:
        return "INCONCLUSIVE, the logits are others when the pass is watched"
    if not (explanation.alone_repeats or explanation.finds):
        return "INCONCLUSIVE, the pass alone does not repeat its bits"
    if introducers:
        return f"FOUND {', '.join(dict.fromkeys(group.op for group in introducers))}"
    if explanation.finds:
        return "FOUND in what the KV cache holds from earlier passes: no op adds to it here"
    if any(trace.logits_differ for trace in explanation.traces):
        return "INCONCLUSIVE, the probe's logits differ, and no op that could be compared does it"
    if explanation.moves_cache_alone:
        by = f" by {ops}" if ops else ""
        return (
            f"INCONCLUSIVE, the probe's logits have the same bits, but its KV cache differs{by}: "
            "a later step shows whether that reaches the logits"
        )
    if ops:
        return (
            f"CLEAN, the probe's logits have the same bits alone and in every load: what {ops} "
            "gives differs, but does not reach them"
        )
    return "CLEAN, the probe's logits have the same bits alone and in every load"


def _first_lines(explanation: Explanation, width: int) -> Iterator[str]:
    firsts: dict[tuple[str, str, str], int] = {}
    for trace in explanation.traces:
        if (first := trace.first_difference) is not None:
            firsts.setdefault((first.op, first.module, first.status), trace.n_rows)
    for (op, module, status), rows in firsts.items():
        yield from textwrap.wrap(
            f"first differing op (from {rows} rows on): {op} in {module or 'the model'} ({status})",
            width,
            subsequent_indent="  ",
        )


def _table(introducers: Sequence[OpGroup], width: int) -> Iterator[str]:
    header = ("op", "module", "introduces", "max ULP", "follows", "bits by rows")
    rows = [
        (
            visible(group.op),
            visible(group.where.removeprefix("model.") or "-"),
            f"{group.counts['introduces']} of {sum(group.counts.values())}",
            f"{group.max_ulp}",
            group.cause or "",
            spans(group.bit_classes),
        )
        for group in introducers
    ]
    limits = _limits([header, *rows], width)
    cells = [tuple(_cut(c, n) for c, n in zip(row, limits, strict=True)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    indent = sum(widths) + 2 * len(widths)
    for *row, last in cells:
        start = "".join(f"{cell:<{n}}  " for cell, n in zip(row, widths, strict=True))
        yield from textwrap.wrap(
            start + last,
            max(width, indent + 16),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )


def _limits(rows: Sequence[tuple[str, ...]], width: int) -> tuple[int, ...]:
    """How wide each column may be: names are cut only where the screen has no room for them."""
    op, module, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    room = width - sum(others) - 2 * (len(others) + 1)
    if op + module > room:
        op = min(op, max(16, room - module))
        module = min(module, max(26, room - op))
    return op, module, *others


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
