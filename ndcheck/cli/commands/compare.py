"""`ndcheck compare`: what changed between two runs."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import completion
from ndcheck.cli import options as o

FAIL_ON_HELP = (
    "Exit with 1 on these, comma-separated: environment, model, kernels, load, "
    "tokens, bits (both of the probe alone), unique (more completions), rate (more "
    "trials diverge)."
)


def compare(
    a: Annotated[
        str,
        typer.Argument(
            help="A run, latest, or a saved baseline's name.",
            metavar="A",
            autocompletion=completion.runs,
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            help="The run to compare with it.", metavar="B", autocompletion=completion.runs
        ),
    ],
    fail_on: Annotated[
        str | None, typer.Option("--fail-on", help=FAIL_ON_HELP, metavar="KINDS")
    ] = None,
    confidence: o.Confidence = 0.95,
    json: o.Json = False,
) -> None:
    """Show what differs: environment, model, kernels, load, outputs, metrics, cost."""
    from rich.console import Console

    from ndcheck.api import find_run
    from ndcheck.cli.console import EXIT_CODES, note_bad_lines
    from ndcheck.cli.latest import latest
    from ndcheck.errors import UsageError
    from ndcheck.findings import read_findings
    from ndcheck.judging.comparison import FAIL_ON, judge_comparison
    from ndcheck.judging.comparison import compare as compare_runs
    from ndcheck.judging.verdict import worst
    from ndcheck.reports.comparison import comparison_document, print_comparison
    from ndcheck.request import parse_names

    if not 0 < confidence < 1:
        raise UsageError(f"--confidence {confidence}: give a level between 0 and 1, such as 0.95")
    kinds = parse_names("--fail-on", fail_on, FAIL_ON) if fail_on is not None else ()
    both = [read_findings(find_run(str(latest(Path(name))))) for name in (a, b)]
    for findings in both:
        note_bad_lines(findings.bad_lines)
    comparison = compare_runs(*(findings.measured for findings in both))
    verdicts = judge_comparison(comparison, kinds, confidence)
    code = EXIT_CODES[worst([v.outcome for v in verdicts.values()])] if verdicts else 0
    if json:
        document = comparison_document((a, b), comparison, verdicts, code)
        typer.echo(json_module.dumps(document, indent=2, allow_nan=False))
    else:
        print_comparison(Console(highlight=False), (a, b), comparison, verdicts)
    raise typer.Exit(code)
