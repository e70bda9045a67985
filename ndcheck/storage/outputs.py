"""Files that a command writes once it has measured: refused before that takes its time."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from ndcheck.storage.run_directory import write_failure


def check_outputs(*paths: Path | None, makes_folders: bool = False) -> None:
    """Raise BackendError where one of them could not be written; it may make their folders."""
    for path in filter(None, paths):
        try:
            if makes_folders:
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise OSError(errno.EINVAL, f"{path.name} is no file")
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise write_failure(path, error) from error
