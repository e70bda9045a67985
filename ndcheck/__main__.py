"""`python -m ndcheck` and the `ndcheck` console script."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code."""
    # `python -m` puts the current directory on the path, where a folder named `kernels` or a
    # file named like a dependency would shadow the real one.
    if sys.path and sys.path[0] in ("", str(Path.cwd())):
        del sys.path[0]
    # OpenMP's threads spin while they wait by default: on a shared machine a small model then takes
    # ten times as long. Read when torch is imported; it changes no result.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ndcheck.cli.app import run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
