"""Difference of log-probabilities by position, as a PNG or SVG file, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ndcheck.errors import UsageError
from ndcheck.reports.plots import COLOURS, DPI, SETTINGS
from ndcheck.scoring.comparing import Comparison

SUFFIXES = (".png", ".svg")


def check_figure(path: Path) -> None:
    """Raise UsageError where no figure can be written there."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: give a name that ends with {' or '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'ndcheck[plots]'")


def draw(comparisons: Sequence[Comparison], suffix: str) -> bytes:
    """Absolute difference by position, mean and largest over completions, as a PNG or SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = figure.subplots()
        for found in comparisons:
            at, colour = found.by_position, COLOURS[found.arm or "invariant"]
            tokens = np.arange(1, len(at.n) + 1)
            for values, style, name in (
                (at.max_difference, ":", "largest"),
                (at.mean_difference, "-", "mean"),
            ):
                label = f"{found.arm}, {name}" if found.arm else name
                axes.plot(tokens, values, style, color=colour, linewidth=1, label=label)
        # Differences of rounding and planted faults are orders of magnitude apart; 0 has to show.
        axes.set_yscale("symlog", linthresh=1e-7)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("token")
        axes.set_ylabel("|scored - recorded|, nats")
        axes.set_title("Log-probabilities: difference by position")
        axes.legend()
        metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(content, format=suffix[1:], dpi=DPI, metadata=metadata)
    return content.getvalue()
