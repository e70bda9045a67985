"""`python -m ndcheck` and the `ndcheck` console script."""

from __future__ import annotations

import os
import sys

from ndcheck.cli import console


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code."""
    sys.exit(console.main(_run))


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
