"""What `ndcheck order` found, as text and as JSON values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from string import ascii_uppercase
from typing import Any

from ndcheck.explain.order.folding import fold, lines, phrase
from ndcheck.explain.order.orders import Order, OrderPoint, depends_on_rows, switch_points
from ndcheck.explain.order.sumtree import SumTree
from ndcheck.reports.untrusted import visible

SCHEMA_VERSION = 2  # 2: keys of orders, bits, and why no order is known
MAX_TREE_LINES = 14


def distinct_orders(points: Sequence[OrderPoint]) -> dict[str, Order]:
    """Every order found, by its key, in the order of finding."""
    found: dict[str, Order] = {}
    for point in points:
        for order in point.orders:
            found.setdefault(order.key, order)
    return found


def known_orders(points: Sequence[OrderPoint]) -> dict[str, Order]:
    """Those of them that may be drawn."""
    return {key: order for key, order in distinct_orders(points).items() if order.is_known}


def order_document(setting: dict[str, Any], points: Sequence[OrderPoint]) -> dict[str, Any]:
    """Plain JSON values; trees are folded into a phrase and given in full as their nodes."""
    return {
        "schema_version": SCHEMA_VERSION,
        **setting,
        "depends_on_rows": depends_on_rows(points),
        "switch_points": [
            {"rows": point.rows, "terms": point.terms} for point in switch_points(points)
        ],
        "points": [
            {
                "rows": point.rows,
                "terms": point.terms,
                "row_classes": [list(keys) for keys in point.row_classes],
                "bits": [list(digests) for digests in point.bits],
                "problem": point.doubt,
                "n_elements": point.n_elements,
                "n_calls": point.n_calls,
                "is_repeatable": point.is_repeatable,
            }
            for point in points
        ],
        "orders": [
            {
                "key": key,
                "digest": order.tree.digest if order.is_known else None,
                "n_terms": order.tree.n_leaves,
                "form": phrase(fold(order.tree)) if order.is_known else None,
                "evidence": order.evidence,
                "reason": order.reason,
                "rows": _rows_of(key, points),
                "nodes": [list(c) for c in order.tree.nodes] if order.is_known else None,
            }
            for key, order in distinct_orders(points).items()
        ],
    }


def order_lines(title: str, rows: str, points: Sequence[OrderPoint], width: int) -> Iterator[str]:
    """The screen: a verdict, orders by number of rows, and each order's folded tree."""
    orders = known_orders(points)
    names = {key: _name(i) for i, key in enumerate(orders)}
    yield from textwrap.wrap(_verdict(rows, points), width, subsequent_indent="  ")
    yield ""
    yield title
    yield ""
    yield f"{rows:<10} {'terms':>6}  order"
    for (terms, label), group in groupby(points, lambda p: (p.terms, _label(p, names))):
        same = [point.rows for point in group]
        span = f"{same[0]}-{same[-1]}" if len(same) > 1 else str(same[0])
        yield f"{span:<10} {terms:>6}  {label}"
    for doubt, group in groupby(points, lambda p: p.doubt):
        if doubt is not None:
            yield ""
            yield from textwrap.wrap(
                f"no order known at {_spans([p.rows for p in group])} {rows}: {visible(doubt)}",
                width,
                subsequent_indent="  ",
            )
    for key, order in orders.items():
        yield ""
        yield f"order {names[key]}, digest {order.tree.digest}"
        yield from textwrap.wrap(
            f"{order.evidence} at {_spans(_rows_of(key, points))} {rows}: {order.reason}",
            width,
            initial_indent="  ",
            subsequent_indent="  ",
        )
        tree = list(lines(fold(order.tree)))
        yield from (f"  {line[: width - 2]}" for line in tree[:MAX_TREE_LINES])
        if len(tree) > MAX_TREE_LINES:
            yield f"  {len(tree) - MAX_TREE_LINES} lines more in --json"
    yield ""
    n_elements = max(point.n_elements for point in points)
    yield from textwrap.wrap(
        f"Read at up to {n_elements} output elements (rows and columns spread over the output), "
        f"in {sum(point.n_calls for point in points)} calls of the op.",
        width,
    )


def _verdict(rows: str, points: Sequence[OrderPoint]) -> str:
    unsteady = [point for point in points if not point.is_repeatable]
    if unsteady:
        return f"VARIES  the result changes from call to call at {rows} = {unsteady[0].rows}"
    if depends_on_rows(points):
        what = "the order of addition changes"
        if not all(point.is_known for point in points):
            what = "the bits of a sum change"
        if switches := switch_points(points):
            at = ", ".join(dict.fromkeys(str(point.rows) for point in switches))
            return f"VARIES  {what} at {rows} = {at}"
        uneven = [point for point in points if len(point.bits) > 1 or len(point.row_classes) > 1]
        return f"VARIES  rows of one call differ at {rows} = {uneven[0].rows}"
    n = len({point.rows for point in points})
    if unknown := next((point for point in points if not point.is_known), None):
        if unknown.bits:
            return (
                f"INCONCLUSIVE  the same bits at all {n} numbers tried of {rows}, but no order of "
                "addition that accounts for them"
            )
        return "INCONCLUSIVE  no order of addition could be read"
    return f"FIXED  one order of addition at all {n} numbers tried of {rows}"


def _rows_of(key: str, points: Sequence[OrderPoint]) -> list[int]:
    """Numbers of rows at which this very order was found, and checked."""
    found = (p.rows for p in points if any(order.key == key for order in p.orders))
    return list(dict.fromkeys(found))


def _spans(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 8] as "1-3, 8"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)


def _label(point: OrderPoint, names: dict[str, str]) -> str:
    """Letters of the orders; + joins those of one row's columns, | rows that differ."""
    if not point.is_known:
        return "not known"
    label = " | ".join(
        "+".join(dict.fromkeys(names[key] for key in keys)) for keys in point.row_classes
    )
    return label if point.is_repeatable else f"{label} (not the same twice)"


def _name(index: int) -> str:
    letter = ascii_uppercase[index % 26]
    return letter if index < 26 else f"{letter}{index // 26}"


def dot(orders: dict[str, Order]) -> str:
    """Graphviz source: one cluster for each order."""
    parts = ["digraph order {", "  node [shape=point];", "  edge [dir=back];"]
    for name, order in enumerate(orders.values()):
        tree = order.tree
        parts.append(f'  subgraph cluster_{name} {{ label="order {_name(name)}";')
        parts += [f'    t{name}_{i} [shape=plaintext, label="{i}"];' for i in range(tree.n_leaves)]
        for k, children in enumerate(tree.nodes):
            parts += [f"    t{name}_{tree.n_leaves + k} -> t{name}_{c};" for c in children]
        parts.append("  }")
    return "\n".join([*parts, "}", ""])


def svg(orders: dict[str, Order]) -> str:
    """The trees as a drawing, leaves left to right, each addition above its operands."""
    parts, top, widest = [], 0.0, 0.0
    for name, order in enumerate(orders.values()):
        drawing, width, height = _draw(order.tree)
        title = f'<text x="6" y="14">order {_name(name)}, {order.tree.n_leaves} terms</text>'
        parts.append(f'<g transform="translate(0,{top:g})">{title}{drawing}</g>')
        top, widest = top + height, max(widest, width)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{widest:g}" height="{top:g}" '
        'font-family="sans-serif" font-size="11">'
        '<rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n"
    )


def _draw(tree: SumTree) -> tuple[str, float, float]:
    step = max(4.0, min(18.0, 900 / tree.n_leaves))
    depth = [0] * tree.n_leaves
    x = [12 + step * i for i in range(tree.n_leaves)]
    for children in tree.nodes:
        depth.append(1 + max(depth[c] for c in children))
        x.append(sum(x[c] for c in children) / len(children))
    # Logarithmic heights keep a sum of hundreds in order on one screen.
    rise = 200 / (1 + max(depth)) ** 0.5
    y = [40 + 200 - rise * d**0.5 for d in depth]
    edges = "".join(
        f"M{x[tree.n_leaves + k]:.1f} {y[tree.n_leaves + k]:.1f}L{x[c]:.1f} {y[c]:.1f}"
        for k, children in enumerate(tree.nodes)
        for c in children
    )
    drawing = f'<path d="{edges}" stroke="#345" stroke-width="0.8" fill="none"/>'
    return drawing, 24 + step * tree.n_leaves, 260.0
