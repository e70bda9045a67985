"""The `ndcheck` command: one file per subcommand, errors in one place."""

from __future__ import annotations

import os
import signal
from typing import Annotated, Any

import typer

from ndcheck import __version__
from ndcheck.cli.commands.bisect import bisect
from ndcheck.cli.commands.compare import compare
from ndcheck.cli.commands.demo import demo
from ndcheck.cli.commands.doctor import doctor
from ndcheck.cli.commands.gate import gate
from ndcheck.cli.commands.help import show_help
from ndcheck.cli.commands.kernels import kernels
from ndcheck.cli.commands.mock_server import FAULTS_LISTED, mock_server
from ndcheck.cli.commands.order import order
from ndcheck.cli.commands.report import report
from ndcheck.cli.commands.run import run
from ndcheck.cli.commands.runs import runs
from ndcheck.cli.commands.score import score
from ndcheck.cli.commands.shrink import shrink
from ndcheck.cli.commands.trace import trace
from ndcheck.cli.console import FAILED, run_guarded
from ndcheck.cli.usage.grouped_help import GroupedCommand, WholeGroup
from ndcheck.cli.usage.hints import with_hint
from ndcheck.errors import NdcheckError, UsageError, doing
from ndcheck.ranks import may_speak

app = typer.Typer(
    name="ndcheck",
    cls=WholeGroup,
    help="Measures, explains, fixes and gates nondeterminism in LLM inference.",
    epilog="Exit codes: 0 pass, 1 nondeterminism found, 2 usage error, 3 inconclusive, "
    "4 environment or backend failure, 130 interrupted.",
    # Plain help: rich's boxes cost start-up time and do not paste well into an issue.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ndcheck {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Measures, explains, fixes and gates nondeterminism in LLM inference."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


COMMANDS = {
    command.__name__: command
    for command in (
        *(run, report, score, trace, shrink, order, demo),
        *(gate, compare, bisect, runs, doctor),
    )
}
for command in COMMANDS.values():
    # What is left over is met with a hint.
    is_run = command is run
    app.command(
        cls=GroupedCommand if is_run else None,
        context_settings={"allow_extra_args": True} if is_run else None,
    )(command)
app.add_typer(kernels)
app.command("mock-server", epilog=FAULTS_LISTED)(mock_server)
app.command("help")(show_help)


def run_command_line(arguments: list[str]) -> int:
    """The exit code; whatever is raised becomes one line on stderr."""
    return run_guarded(lambda: _run(arguments))


LEAST_COLUMNS = 20


def _forget_no_width() -> None:
    """Where there is no terminal COLUMNS may be 0: on a screen of no columns nothing is shown."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and len(columns) < 3 and int(columns) < LEAST_COLUMNS:
        del os.environ["COLUMNS"]


def _run(arguments: list[str]) -> int:
    _forget_no_width()
    # A CI job that is cancelled should leave the same partial report as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = typer.main.get_command(app)
    if "_NDCHECK_COMPLETE" in os.environ:
        return _complete(command)
    verb = next((argument for argument in arguments if argument in COMMANDS), "")
    try:
        # Not its main(), which turns a broken pipe and the end of a file into exit code 1.
        with (
            doing(f"ndcheck {verb}".strip()),
            command.make_context("ndcheck", arguments) as context,
        ):
            command.invoke(context)
    except typer.Exit as done:
        return int(done.exit_code)
    except NdcheckError as error:
        if may_speak():
            raise
        return error.exit_code
    except Exception as error:
        # typer's own usage errors; its exception classes moved between versions.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message() or "give a command; see ndcheck --help"
        raise UsageError(with_hint(message, error, arguments)) from error
    return 0


def _complete(command: Any) -> int:
    """What a shell asks for when a user presses the tab key."""
    try:
        command.main([], "ndcheck")
    except SystemExit as done:
        return FAILED if done.code else 0
    return 0
