"""What a gate decided: for the screen, a pull request, a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ndcheck.judging.rules import GateVerdict, Ruling
from ndcheck.reports.terminal import STYLES, print_without_padding
from ndcheck.reports.untrusted import code_block, markdown_text, visible
from ndcheck.reports.wording.reproduction import argument

SCHEMA_VERSION = 1
MAX_MARKDOWN_RULINGS = 500
ONLY_STOCK_FAILED = (
    "only stock failed; to judge the invariant arm, with stock as its control: --arms invariant"
)
Inconclusive = Literal["exit-3", "pass", "fail"]
"""What an inconclusive check counts as: exit code 3, a pass, or a failure."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check; ``verdict`` is None where its run failed, and ``error`` says why.

    ``directory`` is the run's, ``command`` repeats it, ``error_code`` is the exit code of an error.
    """

    name: str
    command: str
    directory: str = ""
    started_at: str = ""
    elapsed_s: float = 0.0
    verdict: GateVerdict | None = None
    error: str | None = None
    error_code: int = 4

    @property
    def label(self) -> str:
        return "ERROR" if self.verdict is None else self.verdict.label

    @property
    def headline(self) -> str:
        """Its decisive reason; that of a pass is how much evidence there is."""
        if self.verdict is None:
            return str(self.error)
        return self.verdict.reasons[0]


def print_gate(console: Console, results: Sequence[CheckResult]) -> None:
    """Every check with every rule; a failure begins with the command that repeats it."""
    for index, result in enumerate(results):
        if index:
            console.print()
        if result.label in ("FAIL", "ERROR"):
            # A command that is wrapped cannot be copied.
            console.print(Text(visible(result.command), style="cyan"), soft_wrap=True)
        style = "bold red" if result.verdict is None else STYLES[result.verdict.outcome]
        headline = Text.assemble((result.label, style), "  ", visible(result.name))
        if result.verdict is None:
            headline.append(f": {visible(str(result.error))}")
        console.print(headline)
        if result.verdict is not None:
            print_without_padding(console, _rulings(result.verdict))
            if _only_stock_failed(result.verdict):
                console.print(Text(f"  {ONLY_STOCK_FAILED}"), soft_wrap=True)
        if result.directory:
            shown = f"ndcheck report {argument(result.directory)}"
            console.print(Text.assemble("  more: ", (shown, "cyan")), soft_wrap=True)
    if len(results) > 1:
        counts = Counter(result.label for result in results)
        parts = ", ".join(f"{n} {label}" for label, n in counts.items())
        console.print(f"\n{len(results)} checks: {parts}")


def _rulings(verdict: GateVerdict) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    for _ in range(3):
        grid.add_column(overflow="fold")
    with_subject = len({(r.arm, r.probe_id) for r in verdict.rulings if r.arm}) > 1
    for ruling in verdict.rulings:
        outcome = ruling.verdict.outcome
        grid.add_row(
            Text(f"  {ruling.verdict.label}", style=STYLES[outcome].removeprefix("bold ")),
            Text(_rule(ruling)),
            Text(subject(ruling) if with_subject else ""),
            Text("\n".join(map(visible, _reasons(ruling)))),
        )
    return grid


def _only_stock_failed(verdict: GateVerdict) -> bool:
    failed = {r.arm for r in verdict.rulings if r.verdict.outcome == "FAIL"}
    return failed == {"stock"} and any(r.arm == "invariant" for r in verdict.rulings)


def _rule(ruling: Ruling) -> str:
    return ruling.axis or ruling.rule


def _reasons(ruling: Ruling) -> list[str]:
    """Without the property, or the kind of drift, that stands in front of them anyway."""
    shown = ruling.axis or ruling.rule.removeprefix("baseline-")
    return [reason.removeprefix(f"{shown}: ") for reason in ruling.verdict.reasons]


def subject(ruling: Ruling) -> str:
    """The arm and the probe that a ruling is about."""
    return " ".join(visible(part) for part in (ruling.arm, ruling.probe_id) if part)


def gate_markdown(results: Sequence[CheckResult]) -> str:
    """For a job's summary page: failures first in words, then every rule."""
    parts = [f"## ndcheck: {', '.join(sorted({r.label for r in results}))}"]
    for result in results:
        parts.append(f"### {result.label}: {markdown_text(result.name)}")
        if result.label not in ("PASS", "ACCEPTED"):
            parts.append(code_block(result.command, "sh"))
        parts.append(markdown_text(result.headline))
        if result.verdict is not None:
            parts += _markdown_rulings(result.verdict)
    return "\n\n".join(parts) + "\n"


def _markdown_rulings(verdict: GateVerdict) -> Iterator[str]:
    # GitHub drops a summary of more than a megabyte.
    ranked = sorted(verdict.rulings, key=lambda r: list(STYLES).index(r.verdict.outcome))
    rows = [
        (
            ruling.verdict.label,
            _rule(ruling),
            markdown_text(subject(ruling)),
            markdown_text("; ".join(_reasons(ruling))),
        )
        for ruling in ranked[:MAX_MARKDOWN_RULINGS]
    ]
    lines = ["| Verdict | Rule | Of | Reason |", "| --- | --- | --- | --- |"]
    yield "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
    if len(rows) < len(ranked):
        yield f"and {len(ranked) - len(rows)} more."


def github_annotations(results: Sequence[CheckResult]) -> Iterator[str]:
    """GitHub's workflow commands: an error or a warning for each check that did not pass."""
    for result in results:
        if result.label in ("PASS", "ACCEPTED"):
            continue
        level = "warning" if result.label == "INCONCLUSIVE" else "error"
        title = _command_data(f"ndcheck {result.label}: {visible(result.name)}", ":,")
        message = _command_data(f"{visible(result.command)}\n{visible(result.headline)}")
        yield f"::{level} title={title}::{message}"


def _command_data(text: str, also: str = "") -> str:
    for character in "%\r\n" + also:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def gate_document(results: Sequence[CheckResult], code: int) -> dict[str, Any]:
    """The ``--json`` document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "exit_code": code,
        "checks": [
            {
                "name": result.name,
                "verdict": None if result.verdict is None else result.verdict.outcome,
                "reasons": [] if result.verdict is None else list(result.verdict.reasons),
                "error": result.error,
                "command": result.command,
                "directory": result.directory or None,
                "elapsed_s": result.elapsed_s,
                "rules": [
                    {
                        "rule": ruling.rule,
                        "arm": ruling.arm,
                        "probe_id": ruling.probe_id,
                        "axis": ruling.axis,
                        "verdict": ruling.verdict.outcome,
                        "accepts_divergence": ruling.verdict.accepts_divergence,
                        "reasons": list(ruling.verdict.reasons),
                    }
                    for ruling in (result.verdict.rulings if result.verdict else ())
                ],
            }
            for result in results
        ],
    }
