"""`ndcheck mock-server`: a server with a planted fault, for tests and demonstrations."""

from __future__ import annotations

from typing import Annotated

import typer

from ndcheck.cli import completion
from ndcheck.mock_server.faults import FAULTS, FLAVOURS

FAULTS_LISTED = "\b\nFaults:\n" + "\n".join(f"  {name:13}  {what}" for name, what in FAULTS.items())


def mock_server(
    fault: Annotated[
        str,
        typer.Option(
            "--fault",
            help="What is wrong with it, of the list below.",
            metavar="NAME",
            autocompletion=completion.one_of(*FAULTS),
        ),
    ] = "none",
    flavour: Annotated[
        str,
        typer.Option("--flavour", help=f"What it imitates: {', '.join(FLAVOURS)}.", metavar="NAME"),
    ] = "vllm",
    port: Annotated[int, typer.Option("--port", help="0: any free one.")] = 0,
    after: Annotated[
        int, typer.Option("--after", help="The fault spares so many requests first.")
    ] = 0,
    every: Annotated[int, typer.Option("--every", help="And strikes every so many.")] = 1,
    max_batch: Annotated[int, typer.Option("--max-batch", help="So many run at a time.")] = 256,
    step_ms: Annotated[float, typer.Option("--step-ms", help="Time for one token of each.")] = 2.0,
) -> None:
    """Serve scripted completions of the model `mock` with a planted fault."""
    import asyncio

    from ndcheck.errors import UsageError
    from ndcheck.mock_server.server import MockServer, Plan

    for option, value, accepted in (("--fault", fault, FAULTS), ("--flavour", flavour, FLAVOURS)):
        if value not in accepted:
            raise UsageError(f"{option} {value}: choose from {', '.join(accepted)}")
    for option, number, is_fine in (
        ("--port", port, 0 <= port < 2**16),
        ("--max-batch", max_batch, max_batch >= 1),
        ("--step-ms", step_ms, 0 <= step_ms < float("inf")),
    ):
        if not is_fine:
            raise UsageError(f"{option} {number}: out of range")
    plan = Plan(fault, flavour, after, max(1, every), max_batch, step_ms / 1000)

    def announce(port: int) -> None:
        typer.echo(f"http://127.0.0.1:{port}/v1")

    try:
        asyncio.run(MockServer(plan).serve("127.0.0.1", port, announce))
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror or error}") from error
