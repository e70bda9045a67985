"""The tables of the reference experiment's README, and the decode plots, from committed files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.table import rows_of
from ndcheck.reports.plots import COLOURS, DPI, MARKERS, SETTINGS, STYLES

BEGIN, END = "<!-- measured -->\n", "<!-- end of measured -->\n"
DECODE_PLOT = "decode-step.png"
PICTURES = {
    "unique-completions.png": "unique completions by batch size",
    "first-divergence.png": "first divergences by token",
}
MEASURED = (
    "folder", "arm", "unique", "most common", "first divergence", "diverged trials", "verdict",
    "s, reference apart", "to stock",
)  # fmt: skip
DECODED = ("batch", "experts", "floor, ms", "invariant", "stock", "to floor", "to stock")


def summarise(out: Path, folders: Sequence[str]) -> None:
    """Draw the decode steps and write what was measured between the markers of ``out``/README.md.

    Raises SystemExit where README.md has no markers.
    """
    for folder in (out / "moe-decode", out.parent / "decode"):
        if steps := rows_of(folder / "decode.csv"):
            plot_decode_steps(steps, folder / DECODE_PLOT)
    readme = out / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{readme} needs the lines {BEGIN.strip()} and {END.strip()}")
    found = [folder for folder in folders if (out / folder / "summary.csv").is_file()]
    runs = {
        folder: json.loads((out / folder / "run.json").read_text(encoding="utf-8"))
        for folder in found
    }
    blocks = [measured_table(out, runs), "\n".join(run_line(*each) for each in runs.items())]
    blocks += [training_line(out), decode_table(out), pictures(out, found)]
    body = "\n\n".join(block for block in blocks if block)
    readme.write_text(f"{head}{begin}\n{body}\n\n{end}{tail}", encoding="utf-8")


def measured_table(out: Path, runs: Mapping[str, Any]) -> str:
    """One line for each arm of each run; ``runs`` are what the run.json of each folder holds."""
    lines = []
    for folder, run in runs.items():
        is_text = run["environment"]["model"].get("compared") == "text"
        unit = "character" if is_text else "token"
        loads = rows_of(out / folder / "loads.csv")
        for row in rows_of(out / folder / "summary.csv"):
            own = [load for load in loads if load["arm"] == row["arm"]]
            forks = [int(x) for load in own if (x := load["first_divergence_min"])]
            seconds = sum(float(x["elapsed_s"]) for x in own if x["axis"] != "reference")
            slowdown = row["slowdown_vs_stock"]
            lines.append(
                (
                    f"[{folder}]({folder}/report.md)",
                    row["arm"],
                    f"{row['n_unique']} of {row['n_samples']}",
                    row["modal_count"],
                    f"{unit} {min(forks) + 1}" if forks else "none",
                    f"{row['diverged_trials']} of {row['n_trials']}",
                    row["verdict"],
                    f"{seconds:.1f}",
                    f"{float(slowdown):.2f}" if slowdown else "",
                )
            )
    return table(MEASURED, lines)


def run_line(folder: str, run: Mapping[str, Any]) -> str:
    """How a run ended, and where it ran."""
    hardware, software = run["environment"]["hardware"], run["environment"]["software"]
    where = [hardware.get("gpu") or hardware.get("cpu") or "a server"]
    where += [f"{n} {software[n]}" for n in ("torch", "triton", "transformers") if software.get(n)]
    return (
        f"- `{folder}`: {run['n_trials_planned']} trials, {run['status']}, "
        f"{run['elapsed_s']:.0f} s; {', '.join(where)}"
    )


def training_line(out: Path) -> str:
    """What the trained model is."""
    path = out / "trained" / "training.json"
    if not path.is_file():
        return ""
    t = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"The trained model: {t['parameters'] / 1e6:.0f} M parameters, {t['seconds']:.0f} s and "
        f"{t['steps']} steps ({t['tokens_seen'] / 1e6:.1f} M tokens, of a corpus of "
        f"{t['training_tokens'] / 1e6:.1f} M), loss from {t['first_loss']:.2f} to "
        f"{t['last_loss']:.2f} nats a token, on held-out text {t['held_out_loss']:.2f}."
    )


def decode_table(out: Path) -> str:
    """The decode step of the mixture of experts."""
    lines = [
        (
            row["batch"],
            f"{float(row['experts']):.1f}",
            f"{float(row['floor_ms']):.2f}",
            f"{float(row['invariant_ms']):.2f}",
            f"{float(row['stock_ms']):.2f}",
            f"{float(row['over_floor']):.2f}",
            f"{float(row['slowdown']):.2f}",
        )
        for row in rows_of(out / "moe-decode" / "decode.csv")
    ]
    title = "`moe-decode`, the step of Qwen3-30B-A3B's shape and the experts that a layer reads:"
    return f"{title}\n\n{table(DECODED, lines)}" if lines else ""


def pictures(out: Path, folders: Sequence[str]) -> str:
    """The plots of the runs that compare arms, and the decode step's."""
    lines = []
    for folder in folders:
        # One row of a mixed batch is a sample: there is nothing to see by batch size.
        if len(rows_of(out / folder / "summary.csv")) > 1 and not folder.endswith("-mixed"):
            lines += [
                f"![{folder}: {what}]({folder}/{name})"
                for name, what in PICTURES.items()
                if (out / folder / name).is_file()
            ]
    steps = (("moe-decode", "moe-decode"), ("decode", "../decode"))
    for folder, path in steps if (out / "moe-decode").is_dir() else ():
        if (out / path / DECODE_PLOT).is_file():
            lines.append(f"![{folder}: decode step by batch size]({path}/{DECODE_PLOT})")
    return "\n\n".join(lines)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty without lines."""
    if not lines:
        return ""
    rows = (header, ["---"] * len(header), *lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot_decode_steps(steps: Sequence[dict[str, str]], path: Path) -> None:
    """Milliseconds by batch size, both arms and the floor."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    batches = [int(row["batch"]) for row in steps]
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes: Any = figure.subplots()
        for arm in ("stock", "invariant"):
            times = [float(row[f"{arm}_ms"]) for row in steps]
            axes.plot(
                batches, times, label=arm,
                color=COLOURS[arm], linestyle=STYLES[arm], marker=MARKERS[arm],
            )  # fmt: skip
        floor = [float(row["floor_ms"]) for row in steps]
        axes.plot(batches, floor, color="#5c6770", linestyle=":", marker=".", label="floor")
        axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="ms")
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_title("Decode step by batch size")
        axes.legend()
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
