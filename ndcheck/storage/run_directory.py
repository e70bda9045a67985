"""The run directory: run.json and an append-only samples.jsonl, written after every trial.

Schema history (a reader accepts every version up to its own; changes only add):

1. 2026-11: first version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TextIO

from ndcheck import __version__
from ndcheck.errors import BackendError, UsageError
from ndcheck.records import Run, Sample, Trial, Witness
from ndcheck.samplers.backends import backend_of
from ndcheck.storage.evidence import Ledger
from ndcheck.storage.reading import (
    decode,
    exists,
    open_file,
    parse_json,
    read_lines,
    read_text,
    refuse_unknown,
)
from ndcheck.storage.sample_lines import decode_line, encode_line

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
MOST_BYTES_KEPT = 2**29
"""Of a file whose samples stay in memory, in twice its bytes, so that none is read again: ten
thousand prompts of a dozen samples are 300 MB."""


class NewDirectory:
    """A directory that this process alone may begin a run in, taken before a model is loaded.

    Closed before a run began, it leaves nothing behind.
    """

    def __init__(self, path: Path, created: Sequence[Path], handle: io.FileIO) -> None:
        self.path = path
        self._created = created
        self._handle: io.FileIO | None = handle

    @classmethod
    def take(cls, path: Path) -> NewDirectory:
        """A new or empty directory, or what a start that was killed left of one.

        Raises UsageError if it is neither, BackendError if the disk refuses.
        """
        if exists(path) and not path.is_dir():
            raise UsageError(f"{path} is a file: choose a new or empty directory for --out")
        try:
            created = [each for each in (path, *path.parents) if not each.exists()]
            path.mkdir(parents=True, exist_ok=True)
            if any(not _is_leftover(file) for file in path.iterdir()):
                raise UsageError(
                    f"{path} is not empty: choose another --out, or continue it with "
                    f"--resume {path}"
                )
            return cls(path, created, _open_locked(path / SAMPLES_FILE, path))
        except OSError as error:
            raise write_failure(path, error) from error

    @classmethod
    def take_free(cls, path: Path) -> NewDirectory:
        """The same at ``path``, or the first of path-2, path-3, ... that does not exist."""
        try:
            created = [each for each in path.parents if not each.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            free, n = path, 1
            while not _make(free):
                n += 1
                free = path.with_name(f"{path.name}-{n}")
            return cls(free, [free, *created], _open_locked(free / SAMPLES_FILE, free))
        except OSError as error:
            raise write_failure(path, error) from error

    def begin(self, run: Run) -> RunDirectory:
        """Write run.json. Raises BackendError if the disk refuses."""
        handle, self._handle = self._handle, None
        if handle is None:
            raise ValueError("a run was begun here already")
        directory = RunDirectory(self.path, run, handle)
        try:
            directory.save(run)
        except BackendError:
            directory.close()
            raise
        return directory

    def close(self) -> None:
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            (self.path / SAMPLES_FILE).unlink()
            for path in self._created:
                path.rmdir()
        self._handle.close()
        self._handle = None


def _make(path: Path) -> bool:
    """Make a directory, at which only one process can succeed."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _is_leftover(file: Path) -> bool:
    """Does a start that was killed before run.json leave such a file?"""
    if file.name == SAMPLES_FILE:
        return not file.is_symlink() and file.stat().st_size == 0
    return bool(_TEMPORARY.fullmatch(file.name))


class RunDirectory:
    """One run on disk, held by one process at a time."""

    def __init__(self, path: Path, run: Run, handle: io.FileIO) -> None:
        self.path = path
        self.run = run
        self._handle = handle

    @classmethod
    def create(cls, path: Path, run: Run) -> RunDirectory:
        """Start a run in a new or empty directory. Raises UsageError if it is neither."""
        return NewDirectory.take(path).begin(run)

    @classmethod
    def resume(cls, path: Path) -> tuple[RunDirectory, list[Sample]]:
        """Continue a run: its finished trials are returned, a half-written one is cut off.

        Raises UsageError if ``path`` holds no run or another process is writing it.
        """
        run = read_run(path)
        handle = None
        try:
            handle = _open_locked(path / SAMPLES_FILE, path)
            finished, end = _finished_trials(path, run)
            handle.truncate(end)
        except (OSError, UsageError) as error:
            if handle is not None:
                handle.close()
            if isinstance(error, OSError):
                raise write_failure(path, error) from error
            raise
        return cls(path, run, handle), finished

    def append(self, samples: Iterable[Sample]) -> None:
        """Write one trial's samples, unbuffered. Raises BackendError if the disk refuses."""
        rest = b"".join(encode_line(sample, self.run.nonce) for sample in samples)
        try:
            while rest:
                rest = rest[self._handle.write(rest) :]
        except OSError as error:
            raise write_failure(self.path, error) from error

    def save(self, run: Run) -> None:
        """Replace run.json as a whole. Raises BackendError if the disk refuses."""
        self.run = run
        document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(run)}
        del document["flaws"]
        try:
            with replacing(self.path / RUN_FILE) as file:
                json.dump(document, file, indent=2, ensure_ascii=False, allow_nan=False)
                file.write("\n")
        except OSError as error:
            raise write_failure(self.path, error) from error

    def close(self) -> None:
        self._handle.close()


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of ``path`` once all of it is written. Raises OSError."""
    with replacing_bytes(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        yield file
        file.flush()
        file.detach()


@contextmanager
def replacing_bytes(path: Path) -> Iterator[BinaryIO]:
    """The same for a file that is not text."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"{path.name or path} is no file")
    with _open_temporary(path) as file:
        temporary = Path(file.name)
        try:
            yield file
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


_TEMPORARY = re.compile(r"\.[\w.-]+\.\w{8}\.tmp")


def _open_temporary(path: Path) -> BinaryIO:
    """A new file beside ``path``, locked, so that what a killed process leaves can be told."""
    while True:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - the caller closes it
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        )
        with contextlib.suppress(OSError):  # Some file systems have no locks.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:  # Else it was taken for a leftover before the lock.
            return file  # type: ignore[return-value]
        file.close()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files in a run's folder whose processes were killed."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
            with contextlib.suppress(OSError), open_file(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def read_run(path: Path) -> Run:
    """Read run.json. Raises UsageError if it is missing, unreadable or of another schema."""
    file = path / RUN_FILE
    try:
        document = parse_json(read_text(file))
        version = document.get("schema_version") if isinstance(document, dict) else None
        if type(version) is not int or version < 1:
            said = "it has no" if version is None else f"{version!r:.40} is no"
            raise ValueError(f"{said} schema_version, which a run of ndcheck's has")
        if version > SCHEMA_VERSION:
            raise UsageError(
                f"{file} has schema version {version:.40g}; this ndcheck reads up to "
                f"{SCHEMA_VERSION}: upgrade ndcheck"
            )
        run = decode(Run, document)
        if run.ndcheck_version == __version__:  # No later one added a field.
            refuse_unknown(document, {"schema_version": version, **dataclasses.asdict(run)})
        probe_ids = [probe.probe_id for probe in run.spec.probes]
        spec = run.spec
        try:
            backend_of(spec)
        except UsageError as error:  # Its engine is unknown here.
            raise ValueError(str(error)) from error
        for name, values in (("probes", probe_ids), ("arms", spec.arms), ("axes", spec.axes)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"spec.{name}: give one or more, each once")
        return run
    except FileNotFoundError:
        begin = ""
        if (path / SAMPLES_FILE).exists() and all(map(_is_leftover, path.iterdir())):
            begin = f" (it was ended before its first trial: begin it again with --out {path})"
        raise UsageError(f"{path} holds no run: {RUN_FILE} is missing{begin}") from None
    except NotADirectoryError:
        raise UsageError(f"{path} is a file: give the run's directory") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


class SampleReader:
    """Streams the samples of a run, the same ones each time.

    Lines that cannot be read, or that contradict the run, are left out and named in ``bad_lines``;
    ``flaws`` are the sentences that `Run.flaws` holds. Both are those of the last full reading. All
    but the largest files are read once.
    """

    def __init__(self, path: Path, run: Run | None = None) -> None:
        """Without ``run`` no sample is held against its plan."""
        self._file = path / SAMPLES_FILE
        self._run = run
        self._knows_all = run is not None and run.ndcheck_version == __version__
        self._end: int | None = None
        self._kept: list[Sample] | None = None
        self.bad_lines: list[str] = []
        self.flaws: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Sample]:
        return self._read() if self._kept is None else iter(self._kept)

    def _read(self) -> Iterator[Sample]:
        kept: list[Sample] = []
        self.bad_lines.clear()
        ledger = Ledger(self._run) if self._run is not None else None
        nonce = None if self._run is None else self._run.nonce
        try:
            with open_file(self._file) as file:
                # What a process that is still measuring adds would not be in the summary.
                if self._end is None:
                    self._end = os.fstat(file.fileno()).st_size
                keeps, position = self._end <= MOST_BYTES_KEPT, 0
                for number, line in enumerate(read_lines(file), 1):
                    try:
                        sample = decode_line(line, nonce, knows_all=self._knows_all)
                        reason = ledger.refuse(sample) if ledger is not None else None
                    except ValueError as error:
                        reason = str(error)
                    if reason is None:
                        if keeps:
                            kept.append(sample)
                        yield sample
                    else:
                        name = f"{self._file.name} line {number}"
                        self.bad_lines.append(f"{name} is ignored: {reason}")
                    position = file.tell() if line is None else position + len(line)
                    if position >= self._end:
                        break
        except OSError as error:
            raise UsageError(f"{self._file} cannot be read: {error.strerror}") from error
        if ledger is not None:
            self.flaws = ledger.flaws(self.bad_lines)
        if keeps:
            self._kept = kept


def failed_samples(trial: Trial, message: str, elapsed_s: float) -> list[Sample]:
    """What a failed trial leaves behind: one sample with the error for each slot."""
    return [
        replace(Sample.of(trial, nth, Witness(None), "error", elapsed_s), error=message)
        for nth in range(trial.n_samples)
    ]


def _open_locked(file: Path, path: Path) -> io.FileIO:
    # A link would have another file written.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = io.FileIO(os.open(file, flags, 0o644), "ab")
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError(errno.EINVAL, f"{file.name} is no file")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UsageError(f"another ndcheck is writing {path}: wait for it, or stop it") from None
    return handle


def _finished_trials(path: Path, run: Run) -> tuple[list[Sample], int]:
    """Samples of the complete trials at the head of the file, and the offset where they end."""
    finished: list[Sample] = []
    pending: list[Sample] = []
    ledger = Ledger(run)
    end = 0
    with open_file(path / SAMPLES_FILE) as file:
        lines = read_lines(file)
        for number, line in enumerate(lines, 1):
            offset = file.tell()
            try:
                sample = decode_line(line, run.nonce)
                reason = ledger.refuse(sample)
            except ValueError as error:
                reason = str(error)
                if next(lines, None) is None:
                    break
            if reason is not None:
                # Cutting here would lose finished trials, so this is the user's to decide.
                raise UsageError(
                    f"{path / SAMPLES_FILE} is damaged before its end (line {number}: {reason}): "
                    f"`ndcheck report {path}` reads the rest, a resume cannot"
                )
            pending.append(sample)
            if len(pending) == len(sample.load.slots):
                finished += pending
                pending = []
                end = offset
    return finished, end


def write_failure(path: Path, error: OSError) -> BackendError:
    """The one line that a user sees when the disk refuses."""
    return BackendError(f"cannot write to {path}: {error.strerror or error}")
