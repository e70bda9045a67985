"""The options that training and evaluation share."""

import argparse
import sysconfig
from pathlib import Path
from typing import NoReturn

RUNNING_STDLIB = Path(sysconfig.get_path("stdlib"))


class OneLineParser(argparse.ArgumentParser):
    """Answers bad input with one line and exit code 2."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.add_argument(
            "--stdlib",
            type=Path,
            default=RUNNING_STDLIB,
            help="standard-library directory that the corpus is read from",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")
