"""The run directory: run.json and an append-only samples.jsonl, written after every trial.

Schema history (a reader accepts every version up to its own; changes only add):

1. 2026-11: first version.

Per-token values that must survive bit for bit are hexadecimal strings of fixed width per token:
``logprob_bits`` 8 digits (big-endian fp32), ``row_digests`` 16 digits.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import io
import json
import math
import os
import re
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from ndcheck.errors import BackendError, UsageError
from ndcheck.evidence import Ledger
from ndcheck.reading import MAX_LINE_BYTES, decode, open_file, parse_json, read_lines, read_text
from ndcheck.records import Load, Run, Sample, Trial, Witness

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"


class RunDirectory:
    """One run on disk, held by one process at a time."""

    def __init__(self, path: Path, run: Run, handle: io.FileIO) -> None:
        self.path = path
        self.run = run
        self._handle = handle

    @classmethod
    def create(cls, path: Path, run: Run) -> RunDirectory:
        """Start a run in a new or empty directory. Raises UsageError if it is neither."""
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file: choose a new or empty directory for --out")
        if path.exists() and any(path.iterdir()):
            raise UsageError(
                f"{path} is not empty: choose another --out, or continue it with --resume {path}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            directory = cls(path, run, _open_locked(path / SAMPLES_FILE, path))
            directory.save(run)
        except OSError as error:
            raise write_failure(path, error) from error
        return directory

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
        rest = b"".join(_encode(sample) for sample in samples)
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
        raise OSError(errno.EINVAL, f"{path.name} is no file")
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            yield file  # type: ignore[misc]
            file.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_run(path: Path) -> Run:
    """Read run.json. Raises UsageError if it is missing, unreadable or of another schema."""
    file = path / RUN_FILE
    try:
        document = parse_json(read_text(file))
        version = document.get("schema_version") if isinstance(document, dict) else None
        if type(version) is not int or version < 1:
            raise ValueError(f"{version!r:.40} is no schema version")
        if version > SCHEMA_VERSION:
            raise UsageError(
                f"{file} has schema version {version:.40g}; this ndcheck reads up to "
                f"{SCHEMA_VERSION}: upgrade ndcheck"
            )
        return decode(Run, document)
    except FileNotFoundError:
        raise UsageError(f"{path} holds no run: {RUN_FILE} is missing") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


class SampleReader:
    """Streams the samples of a run, the same ones each time.

    Lines that cannot be read, or that contradict the run, are left out and named in ``bad_lines``;
    ``flaws`` are the sentences that `Run.flaws` holds. Both are those of the last full reading.
    """

    def __init__(self, path: Path, run: Run | None = None) -> None:
        """Without ``run`` no sample is held against its plan."""
        self._file = path / SAMPLES_FILE
        self._run = run
        self._end: int | None = None
        self.bad_lines: list[str] = []
        self.flaws: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Sample]:
        self.bad_lines.clear()
        ledger = Ledger(self._run) if self._run is not None else None
        try:
            with open_file(self._file) as file:
                # What a process that is still measuring adds would not be in the summary.
                if self._end is None:
                    self._end = os.fstat(file.fileno()).st_size
                for number, line in enumerate(read_lines(file), 1):
                    try:
                        sample = _decode(line)
                        reason = ledger.refuse(sample) if ledger is not None else None
                    except ValueError as error:
                        reason = str(error)
                    if reason is None:
                        yield sample
                    else:
                        name = f"{self._file.name} line {number}"
                        self.bad_lines.append(f"{name} is ignored: {reason}")
                    if file.tell() >= self._end:
                        break
        except OSError as error:
            raise UsageError(f"{self._file} cannot be read: {error.strerror}") from error
        if ledger is not None:
            self.flaws = ledger.flaws(self.bad_lines)


def failed_samples(trial: Trial, message: str, elapsed_s: float) -> list[Sample]:
    """What a failed trial leaves behind: one sample with the error for each slot."""
    return [
        Sample.of(trial, nth, Witness(None), "error", elapsed_s, error=message)
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
                sample = _decode(line)
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


def _encode(sample: Sample) -> bytes:
    fields = {name: getattr(sample, name) for name in Sample.__dataclass_fields__}
    load, witness = fields.pop("load"), fields.pop("witness")
    logprobs = fields.pop("logprobs")
    document = {
        **fields,
        **dataclasses.asdict(load),
        **dataclasses.asdict(witness),
        "fault": dataclasses.asdict(sample.fault) if sample.fault else None,
        "logprob_bits": struct.pack(f">{len(logprobs)}f", *logprobs).hex(),
        "margins": [m if math.isfinite(m) else None for m in sample.margins],
        "row_digests": "".join(sample.row_digests),
    }
    # One line whatever the text holds: JSON escapes line feeds, and lone surrogates become \\uXXXX.
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


_DIGITS_PER_DIGEST = 16
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{8})*")


@dataclass(frozen=True, slots=True)
class _Packed:
    """What a line holds in a form of its own; a margin of infinity is null."""

    logprob_bits: str = ""
    margins: tuple[float | None, ...] = ()
    row_digests: str = ""


def _decode(line: bytes | None) -> Sample:
    """Raises ValueError saying what is wrong with the line."""
    if line is None:
        raise ValueError(f"it is longer than {MAX_LINE_BYTES >> 20} MiB")
    document = parse_json(line.decode("utf-8"))
    packed = decode(_Packed, document)
    for name, digits in (("logprob_bits", 8), ("row_digests", _DIGITS_PER_DIGEST)):
        text = getattr(packed, name)
        if len(text) % digits or not _HEXADECIMAL.fullmatch(text):
            raise ValueError(f"{name}: give {digits} hexadecimal digits a token")
    bits, digests = bytes.fromhex(packed.logprob_bits), packed.row_digests
    return decode(
        Sample,
        document,
        load=decode(Load, document),
        witness=decode(Witness, document),
        logprobs=struct.unpack(f">{len(bits) // 4}f", bits),
        margins=tuple(math.inf if margin is None else margin for margin in packed.margins),
        row_digests=tuple(
            digests[at : at + _DIGITS_PER_DIGEST]
            for at in range(0, len(digests), _DIGITS_PER_DIGEST)
        ),
    )
