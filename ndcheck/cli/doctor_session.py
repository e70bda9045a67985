"""`ndcheck doctor` from options to exit code: environment, numeric flags, self-test."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap

import typer

from ndcheck import environment
from ndcheck.cli.console import FAILED
from ndcheck.reports.untrusted import visible
from ndcheck.selftest import run_cases

LABEL_WIDTH, MIN_TEXT_WIDTH = 10, 20


def check_up(*, as_json: bool) -> int:
    """Print the environment and run the self-test. Returns the exit code."""
    here = environment.capture(model={})
    advice = environment.advice(here.numeric_flags, has_gpu=here.hardware["gpu"] is not None)
    borrowed = _borrowed_products() if here.hardware["gpu"] is not None else None
    results = list(run_cases())
    code = FAILED if any(failure for _, failure in results) else 0
    if as_json:
        document = {
            **dataclasses.asdict(here),
            "advice": advice,
            "borrowed_products": borrowed,
            "selftest": [
                {"behaviour": case.behaviour, "claim": case.claim, "failure": failure}
                for case, failure in results
            ],
        }
        typer.echo(json.dumps(document, indent=2))
        return code
    for title, fields in (
        ("Hardware", here.hardware),
        ("Software", here.software),
        ("Numeric flags", here.numeric_flags),
    ):
        typer.echo(title)
        name_width = max(map(len, fields)) + 2
        for name, value in fields.items():
            if value is not None:
                typer.echo(f"  {name:<{name_width}}{visible(str(value))}")
    if borrowed is not None:
        typer.echo(f"Products of the invariant arm\n  {visible(borrowed)}")
    for line in advice:
        typer.echo(f"\nNote: {line}")
    width = shutil.get_terminal_size().columns
    title = "Self-test: planted faults through plan, sampler, store, analysis and verdict"
    typer.echo("\n" + "\n".join(textwrap.wrap(title, width, break_on_hyphens=False)))
    for case, failure in results:
        for text in filter(None, (case.claim, failure)):
            lines = textwrap.wrap(
                text, max(MIN_TEXT_WIDTH, width - LABEL_WIDTH), break_on_hyphens=False
            )
            label = "" if text is failure else "FAILED" if failure else "ok"
            for line in lines:
                typer.echo(f"  {label:<{LABEL_WIDTH - 2}}{line}")
                label = ""
    return code


def _borrowed_products() -> str:
    """Which tables the invariant arm's products follow here, and which cuBLASLt may compute."""
    import torch

    from ndcheck_kernels.cuda.products.proofs import summary

    return summary(torch.device("cuda", torch.cuda.current_device()))
