"""The `ndcheck` command: one file per subcommand, errors in one place."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from ndcheck import __version__
from ndcheck.cli.compare import compare
from ndcheck.cli.demo import demo
from ndcheck.cli.doctor import doctor
from ndcheck.cli.gate import gate
from ndcheck.cli.kernels import kernels
from ndcheck.cli.mock_server import mock_server
from ndcheck.cli.order import order
from ndcheck.cli.report import report
from ndcheck.cli.run import run
from ndcheck.cli.runs import runs
from ndcheck.cli.shrink import shrink
from ndcheck.cli.trace_command import trace
from ndcheck.errors import NdcheckError
from ndcheck.ranks import may_speak

INTERRUPTED = 130

app = typer.Typer(
    name="ndcheck",
    help="Measures, explains, fixes and gates nondeterminism in LLM inference.",
    epilog="Exit codes: 0 pass, 1 nondeterminism found, 2 usage error, 3 inconclusive, "
    "4 environment or backend failure, 130 interrupted.",
    no_args_is_help=True,
    # Plain help: rich's boxes cost start-up time and do not paste well into an issue.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ndcheck {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Measures, explains, fixes and gates nondeterminism in LLM inference."""


for command in (run, report, trace, shrink, order, demo, gate, compare, runs, doctor):
    app.command()(command)
app.command(hidden=True)(mock_server)
app.add_typer(kernels)


def run_command_line(arguments: list[str]) -> int:
    """The exit code; an error the user can act on becomes one line on stderr."""
    # A CI job that is cancelled should leave the same partial report as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        # Completions hold any character; a terminal or a pipe may be limited to ASCII.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = typer.main.get_command(app).main(arguments, "ndcheck", standalone_mode=False)
        return int(code or 0)
    except NdcheckError as error:
        if may_speak():
            print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; nothing more can be said on stdout.
        sys.stderr.close()
        return 0
    except Exception as error:
        # typer's own usage errors; its exception classes moved between versions.
        if not hasattr(error, "format_message"):
            raise
        print_error(error.format_message() or "give a command; see ndcheck --help")
        return int(getattr(error, "exit_code", 2))


def print_error(message: str) -> None:
    """One line, whatever the message holds."""
    from ndcheck.reports.untrusted import visible

    print(f"ndcheck: {visible(message)}", file=sys.stderr)  # noqa: T201
