"""`python -m ndcheck` and the `ndcheck` console script."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from ndcheck.cli import console


def main() -> NoReturn:
    """Run the command line; every failure is one line on stderr and an exit code."""
    code = console.main(_run)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter would take a million objects of torch and transformers apart first: 1 to 2 s.
    os._exit(code)


def _run() -> int:
    from ndcheck.errors import BackendError

    try:
        here = os.getcwd()  # noqa: PTH109 - a string, as on the path
    except OSError as error:
        message = f"the current directory cannot be used ({error.strerror}): change to another"
        raise BackendError(message) from error
    # `python -m` puts the current directory on the path, where a folder named `kernels` or a
    # file named like a dependency would shadow the real one.
    if sys.path and sys.path[0] in ("", here):
        del sys.path[0]
    # OpenMP's threads spin while they wait by default: on a shared machine a small model then takes
    # ten times as long. Read when torch is imported; it changes no result.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ndcheck.cli.app import run_command_line

    return run_command_line(sys.argv[1:])


if __name__ == "__main__":
    main()
