"""What to do about what a trace found; every sentence follows from a finding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ndcheck.explain.order.reductions import REDUCTIONS
from ndcheck.explain.swapping import Swaps
from ndcheck.explain.traced import LoadTrace, OpGroup
from ndcheck.samplers.options import SHORT_DTYPES

ATTENTION = "scaled_dot_product_attention"


def advise(
    groups: Sequence[OpGroup], traces: Sequence[LoadTrace], swaps: Swaps | None
) -> list[str]:
    """Sentences, the gravest first; none where nothing was found."""
    introducers = [group for group in groups if group.introduces]
    is_padded = any(trace.is_padded for trace in traces)
    found = [*_faults(introducers), *_switches(introducers, is_padded)]
    if not introducers and any(trace.cache_reaches_logits for trace in traces):
        found.append(_inheritance(traces[0]))
    if swaps is not None and swaps.smallest:
        names = " and ".join(_places(swaps.smallest))
        found.append(
            f"With the invariant kernel for {names} alone, the probe's logits are the same in "
            "every load traced: ndcheck run --kernels stock,invariant"
        )
    elif swaps is not None and swaps.tried:
        found.append(f"No set of swaps was found: {swaps.reason}")
    return [*found, *_orders(introducers, is_padded)]


def _inheritance(trace: LoadTrace) -> str:
    found = f"No op adds to the difference in step {trace.step}: the KV cache brings it"
    if trace.load.cache_state != "whole":
        return (
            f"{found}, filled by a {trace.load.cache_state} prefill. Prefill as a whole, or use "
            "kernels whose sums do not follow how a prompt is cut: ndcheck run --kernels "
            "stock,invariant"
        )
    return f"{found} from an earlier step. See where it began with a lower --step."


def _faults(introducers: Sequence[OpGroup]) -> Iterator[str]:
    for group in introducers:
        if group.cause == "neighbours" and group.is_module:
            yield (
                f"{group.op} in {_module(group.where)} gives the probe's row other bits when other "
                "rows of the same shape are beside it. In a mixture of experts the neighbours "
                "decide how many rows an expert adds at once; anywhere else that is a fault."
            )
        elif group.cause == "neighbours":
            yield (
                f"{group.op} in {_module(group.where)} reads its neighbours: with other rows of "
                "the same shape beside it, the probe's row changes again. That is a fault, not "
                "rounding."
            )
        elif group.cause == "place":
            yield (
                f"{group.op} in {_module(group.where)} follows the row's place: in the first row "
                "of the same batch the probe has its bits alone, and further down others."
            )
        elif group.cause == "chance":
            yield (
                f"{group.op} in {_module(group.where)} gives other bits when the same call is "
                "repeated, as random draws and atomic additions do. Batch-invariant kernels cure "
                "neither: turn random draws off (dropout, sampled routing), and for additions try "
                "torch.use_deterministic_algorithms(True)"
            )


def _switches(introducers: Sequence[OpGroup], is_padded: bool) -> Iterator[str]:
    """One sentence for all modules of an op that switch at the same batch sizes."""
    switching: dict[tuple[str, tuple[tuple[int, ...], ...]], list[str]] = {}
    for group in introducers:
        if group.cause == "shape" and len(group.bit_classes) == 1:  # one row: no batch to follow
            yield (
                f"{group.op} in {_module(group.where)} follows how the prompt was prefilled: given "
                "the same inputs, it gives the probe's row other bits."
            )
        elif group.cause == "shape":
            switching.setdefault((group.op, group.bit_classes), []).append(group.where)
    for (op, classes), modules in switching.items():
        where = _module(modules[0]) if len(modules) == 1 else f"{len(modules)} kinds of module"
        if op == ATTENTION and is_padded:
            yield (
                f"{op} in {where} runs over the probe's padding, masked or not: longer rows in the "
                "batch change the order of its sums. Batch prompts of one length, or use kernels "
                "that count from each row's own first token."
            )
            continue
        yield (
            f"{op} in {where} follows the batch size: it gives the probe's row "
            f"{', '.join(_results(classes))}."
        )


def _orders(introducers: Sequence[OpGroup], is_padded: bool) -> Iterator[str]:
    """The command that shows the order on either side, for the first op that has one."""
    for group in introducers:
        dtype = SHORT_DTYPES.get(group.dtype)
        op = "attention" if group.op == ATTENTION else group.op
        sizes = [part.split("x") for part in group.shapes[1].split()]
        if (
            group.cause not in ("shape", "place")
            or op not in REDUCTIONS
            or dtype is None
            or not sizes
        ):
            continue
        if op == "attention" and is_padded:
            continue  # There the length of the sum differs, not the number of rows.
        terms = sizes[1][-2] if op == "attention" else sizes[0][-1]
        rows = ",".join(str(sizes[0]) for sizes in group.bit_classes)
        columns = sizes[1][0] if op == "linear" else 256
        yield (
            f"See both orders: ndcheck order {op} --terms {terms} --columns {columns} "
            f"--dtype {dtype} --rows {rows}"
        )
        return


def spans(classes: Sequence[Sequence[int]], among: Sequence[Sequence[int]] | None = None) -> str:
    """((1,), (2, 3), (4, 8)) as "1 | 2-3 | 4-8": the sizes tried, by equal bits.

    A range holds no size of another class, of all those ``among`` which they are.
    """
    return " | ".join(
        f"{sizes[0]}-{sizes[-1]}" if _is_run(sizes, among or classes) else ",".join(map(str, sizes))
        for sizes in classes
    )


def _results(classes: Sequence[Sequence[int]]) -> Iterator[str]:
    for index, sizes in enumerate(classes):
        noun = "row" if list(sizes) == [1] else "rows"
        yield f"{'other' if index else 'some'} bits at {spans([sizes], classes)} {noun}"


def _is_run(sizes: Sequence[int], classes: Sequence[Sequence[int]]) -> bool:
    """Whether no size of another class lies between them."""
    others = [size for other in classes if other is not sizes for size in other]
    return len(sizes) > 1 and not any(sizes[0] < size < sizes[-1] for size in others)


def _places(places: Sequence[tuple[str, str]]) -> list[str]:
    """Ops with their modules, or the count of them where there are many."""
    by_op: dict[str, list[str]] = {}
    for op, module in places:
        by_op.setdefault(op, []).append(module)
    return [
        f"{op} in {_module(modules[0])}" if len(modules) == 1 else f"{op} ({len(modules)} places)"
        for op, modules in by_op.items()
    ]


def _module(path: str) -> str:
    return path.removeprefix("model.") or "the model"
