"""The figures of a run as PNG and SVG files, drawn with matplotlib."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ndcheck.records import Arm
from ndcheck.reports.figures import ArmFigures, bins, histogram, series_name
from ndcheck.reports.trees.trunks import walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PROBES = 10
"""More would be hundreds of files; the HTML report has them all."""
FORMATS = ("png", "svg")
DPI = 150
# Okabe and Ito's palette: told apart in every common form of colour blindness.
COLOURS: dict[Arm, str] = {"stock": "#d55e00", "invariant": "#0072b2"}
MAIN = "#ccd3d9"
EXITS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#d8c900")
MARKERS: dict[Arm, str] = {"stock": "o", "invariant": "s"}
STYLES: dict[Arm, str] = {"stock": "-", "invariant": "--"}
SETTINGS: dict[Any, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "grid.color": "#dfe3e6",
    "legend.frameon": False,
    # Without these two an SVG would differ from one rendering to the next.
    "svg.hashsalt": "ndcheck",
    "svg.fonttype": "none",
}


def plot_files(
    figures: Mapping[tuple[Arm, str], ArmFigures], unit: str = "token"
) -> dict[str, bytes]:
    """File names and contents, for the first MAX_PROBES probes that have completions.

    Positions count ``unit``s. Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    files: dict[str, bytes] = {}
    by_probe: dict[str, list[ArmFigures]] = {}
    for (_, probe_id), arm in figures.items():
        if arm.trunk is not None:
            by_probe.setdefault(probe_id, []).append(arm)
    # Not the user's own settings: the same run gives the same picture.
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        for index, arms in enumerate(list(by_probe.values())[:MAX_PROBES], 1):
            # A probe's id may be any text, so files go by its number.
            prefix = f"probe-{index}-" if len(by_probe) > 1 else ""
            for name, draw in PLOTS.items():
                files |= _save(f"{prefix}{name}", draw(arms, unit))
    return files


def _save(name: str, figure: Figure) -> dict[str, bytes]:
    files = {}
    for suffix in FORMATS:
        content = io.BytesIO()
        # The date and the version would make the same picture other bytes.
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(content, format=suffix, dpi=DPI, metadata=metadata)
        files[f"{name}.{suffix}"] = content.getvalue()
    return files


def _figure(n_axes: int = 1, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    # Not pyplot, which keeps figures and may want a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots(n_axes, 1, squeeze=False, sharex=True)[:, 0]
    return figure, list(axes)


def _by_batch_size(
    arms: Sequence[ArmFigures],
    values: Callable[[ArmFigures, bool], Mapping[int, float]],
    title: str,
) -> Figure:
    figure, (axes,) = _figure()
    series = [(arm, copies) for arm in arms for copies in arm.fillings]
    sizes = sorted({size for arm, copies in series for size in values(arm, copies)})
    for arm, copies in series:
        is_hollow = len(arm.fillings) > 1 and not copies
        known = [(sizes.index(size), value) for size, value in values(arm, copies).items()]
        axes.plot(
            [place for place, _ in known],
            [value for _, value in known],
            color=COLOURS[arm.probe.arm],
            linestyle=STYLES[arm.probe.arm],
            marker=MARKERS[arm.probe.arm],
            markerfacecolor="white" if is_hollow else COLOURS[arm.probe.arm],
            label=series_name(arm, copies=copies),
        )
    # Batch sizes are told apart, not measured: they stand at equal distances.
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("batch size")
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    axes.set_title(title)
    axes.legend()
    return figure


def _unique(arms: Sequence[ArmFigures], unit: str) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = _by_batch_size(
        arms,
        lambda arm, copies: arm.unique_by_batch_size(copies=copies),
        "Unique completions by batch size",
    )
    figure.axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _cost(arms: Sequence[ArmFigures], unit: str) -> Figure:
    return _by_batch_size(
        arms,
        lambda arm, copies: arm.tokens_per_s(copies=copies),
        f"Cost: probe {unit}s per second",
    )


def _first_divergence(arms: Sequence[ArmFigures], unit: str) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = _figure()
    edges = bins(arms)
    width = edges[1] / len(arms)
    for index, arm in enumerate(arms):
        lefts = [edge + 0.5 + index * width for edge in edges[:-1]]
        counts = histogram(arm, edges)
        axes.bar(
            lefts, counts, width, align="edge", color=COLOURS[arm.probe.arm], label=arm.probe.arm
        )
    axes.set_xlim(0.5, edges[-1] + 0.5)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(unit)
    axes.set_ylabel("samples")
    axes.set_title("First divergence from the reference")
    axes.legend()
    return figure


def _margin(arms: Sequence[ArmFigures], unit: str) -> Figure:
    figure, (axes,) = _figure()
    # The first arm that forks: its reference's margins are what its forks are seen against.
    margins = next((arm for arm in arms if arm.forks), arms[0]).reference_margins
    axes.plot(range(1, len(margins) + 1), margins, color="#9aa5af", linewidth=1, label="reference")
    for arm in arms:
        axes.scatter(
            [position + 1 for position, _ in arm.forks],
            [margin for _, margin in arm.forks],
            color=COLOURS[arm.probe.arm],
            marker=MARKERS[arm.probe.arm],
            edgecolors="white",
            zorder=3,
            label=f"forks, {arm.probe.arm}",
        )
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    axes.set_xlabel(unit)
    axes.set_ylabel("top-1 minus top-2 logit")
    axes.set_title("Margin at the forks")
    axes.legend()
    return figure


def _heat_strip(arms: Sequence[ArmFigures], unit: str) -> Figure:
    from matplotlib.collections import PolyCollection

    figure, panels = _figure(len(arms), height=0.8 + 2.4 * len(arms))
    for axes, arm in zip(panels, arms, strict=True):
        # The exits last: a row thinner than a pixel must not hide behind the many.
        blocks = sorted(_blocks(arm), key=lambda block: block[4] != MAIN)
        corners = [
            [(left, top), (right, top), (right, top + n_rows), (left, top + n_rows)]
            for left, right, top, n_rows, _ in blocks
        ]
        colours = [colour for *_, colour in blocks]
        axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors=colours))
        axes.set_xlim(0.5, max((right for _, right, *_ in blocks), default=1))
        axes.set_ylim(len(arm.rows), 0)
        axes.grid(visible=False)
        axes.set_ylabel("samples")
        axes.set_title(f"{arm.probe.arm}: samples by {unit}, coloured by continuation")
    panels[-1].set_xlabel(unit)
    return figure


def _blocks(arm: ArmFigures) -> Iterator[tuple[float, float, int, int, str]]:
    """Left and right end, first row, rows and colour of each block of one continuation."""
    if arm.trunk is None:
        return
    paths: dict[int, list[tuple[int, str]]] = {}
    counts = Counter(row.completion_id for row in arm.rows)
    place = 0
    for index, (trunk, parent) in enumerate(walk(arm.trunk)):
        colour = EXITS[(index - 1) % len(EXITS)] if index else MAIN
        before = paths[parent.completion.completion_id] if parent else []
        path = [*(step for step in before if step[0] < trunk.start), (trunk.start, colour)]
        paths[trunk.completion.completion_id] = path
        completion_id = trunk.completion.completion_id
        n_rows = counts[completion_id]
        ends = [*(start for start, _ in path[1:]), trunk.completion.n_tokens]
        for (start, own), end in zip(path, ends, strict=True):
            yield start + 0.5, end + 0.5, place, n_rows, own
        place += n_rows


PLOTS: dict[str, Callable[[Sequence[ArmFigures], str], Any]] = {
    "unique-completions": _unique,
    "first-divergence": _first_divergence,
    "margin-at-fork": _margin,
    "heat-strip": _heat_strip,
    "cost": _cost,
}
