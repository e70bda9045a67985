"""What a manifest holds, and what changed between two, for a screen and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ndcheck.judging.verdict import Verdict, count
from ndcheck.reports.terminal import STYLES
from ndcheck.reports.untrusted import visible
from ndcheck.stack.manifests import CONTROL, Difference, Manifest, ManifestComparison, Step

MAX_DIFFERENCES = 40
MAX_PACKAGES = 20
TITLES = {
    "bits": "other bits",
    "boundaries": "other class boundaries",
    "order": "another order",
    "rows": "copies of a row",
    "run-to-run": "run-to-run",
    "refused": "refused",
}


def print_manifest(console: Console, manifest: Manifest, path: str) -> None:
    """A line for each op, with where its bits change by the number of rows."""
    table = Table(box=None, pad_edge=False)
    for name in ("op", "shape", "dtype", "arm"):
        table.add_column(name, no_wrap=True)
    table.add_column("bits change at", overflow="fold")
    table.add_column("not the same twice", overflow="fold")
    for entry in manifest.entries:
        table.add_row(
            entry.op,
            entry.shape,
            entry.dtype,
            entry.arm,
            "refused" if entry.refusal else shown_rows(entry.boundaries),
            shown_rows(entry.unstable),
        )
    console.print(table)
    console.print()
    for line in step_lines(manifest.steps) if manifest.steps else ():
        console.print(Text(line))
    n = sum(len(entry.points) for entry in manifest.entries)
    console.print(
        Text(
            f"{n} cells of {count(len(manifest.entries), 'op')} and arms, "
            f"{count(len(manifest.orders), 'order')}, {manifest.elapsed_s:.0f} s on "
            f"{visible(manifest.hardware)}; written to {visible(path)}"
        )
    )


def step_lines(steps: Sequence[Step]) -> list[str]:
    """Where a decode step's attention is not the same from run to run, and where it begins."""
    measured = [step for step in steps if step.form != CONTROL]
    control = [step for step in steps if step.form == CONTROL]
    caught = all(step.differing for step in control)
    lines = [] if caught else ["decode steps: the planted step was not seen to differ"]
    unstable = [step for step in measured if step.differing]
    if not unstable:
        lines.append(
            f"decode steps: {count(len(measured), 'step')} repeated, each with the same bits every "
            "time"
        )
    for form, heads in dict.fromkeys((step.form, step.heads) for step in unstable):
        of = [step for step in unstable if (step.form, step.heads) == (form, heads)]
        first = min(of, key=lambda step: (step.rows, step.keys))
        n = sum((step.form, step.heads) == (form, heads) for step in measured)
        lines.append(
            f"decode steps, {form} cache, heads {heads}: {len(of)} of {n} shapes differ from run "
            f"to run ({', '.join(sorted({step.backend for step in of}))}); from "
            f"{count(first.rows, 'row')} and {min(step.keys for step in of)} keys on, "
            f"{first.differing} of {first.repeats} calls at {first.rows} x {first.keys}"
        )
    apart = [step for step in measured if not step.is_uniform]
    if apart:
        least = min(apart, key=lambda step: (step.rows, step.keys))
        lines.append(
            f"copies of one row have different bits in {len(apart)} of {len(measured)} steps, from "
            f"{least.rows} rows and {least.keys} keys on ({least.heads}, {least.form})"
        )
    return lines


def print_manifest_comparison(
    console: Console, names: tuple[str, str], found: ManifestComparison, verdict: Verdict
) -> None:
    """What changed, after which packages, and the verdict."""
    for name, (a, b) in found.setting.items():
        console.print(Text(f"{name}: {visible(str(a))} -> {visible(str(b))}"))
    packages = list(found.packages.items())
    for name, (x, y) in packages[:MAX_PACKAGES]:
        line = f"package {visible(name)}: {visible(x or 'absent')} -> {visible(y or 'absent')}"
        console.print(Text(line))
    if len(packages) > MAX_PACKAGES:
        console.print(Text(f"and {len(packages) - MAX_PACKAGES} more packages"))
    if found.setting or packages:
        console.print()
    for difference in found.differences[:MAX_DIFFERENCES]:
        console.print(Text(visible(difference_line(difference))))
    if len(found.differences) > MAX_DIFFERENCES:
        console.print(Text(f"and {len(found.differences) - MAX_DIFFERENCES} more"))
    if found.differences:
        console.print()
    console.print(
        Text.assemble(
            (verdict.outcome, STYLES[verdict.outcome]), "  ", visible("; ".join(verdict.reasons))
        )
    )
    a, b = map(visible, names)
    console.print(Text(f"A {a}, B {b}"))


def difference_line(difference: Difference) -> str:
    where = f" at M = {shown_rows(difference.rows)}" if difference.rows else ""
    return f"{difference.what}: {TITLES[difference.kind]}{where}: {difference.a} -> {difference.b}"


def comparison_document(
    names: tuple[str, str], found: ManifestComparison, verdict: Verdict, code: int
) -> dict[str, Any]:
    """For --json."""
    return {
        "a": names[0],
        "b": names[1],
        "exit_code": code,
        "verdict": asdict(verdict),
        "comparison": asdict(found),
    }


def manifest_document(manifest: Manifest) -> dict[str, Any]:
    return asdict(manifest)


def shown_rows(rows: Sequence[int]) -> str:
    """``1-4, 8``: neighbours that were measured are not known to be neighbours, so none are."""
    return ", ".join(map(str, rows))
