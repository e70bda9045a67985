"""Files that a command writes once it has measured: refused before that takes its time."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from ndcheck.errors import UsageError
from ndcheck.storage.run_directory import RUN_FILE, SAMPLES_FILE, write_failure
from ndcheck.storage.scores import SCORE_FILE

EVIDENCE = (RUN_FILE, SAMPLES_FILE, SCORE_FILE)


def check_outputs(*paths: Path | None, makes_folders: bool = False) -> None:
    """Raise BackendError where one of them could not be written; it may make their folders.

    Raises UsageError where two are one file, or one is a run's evidence.
    """
    given = [path for path in paths if path is not None]
    if len({path.resolve() for path in given}) < len(given):
        raise UsageError(f"{given[0]}: two outputs would be written to it; give each its own file")
    for path in given:
        if path.resolve().name in EVIDENCE and path.exists():
            raise UsageError(f"{path}: it holds what was measured; give the output another file")
        try:
            if makes_folders:
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise OSError(errno.EINVAL, f"{path.name or path} is no file")
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise write_failure(path, error) from error
