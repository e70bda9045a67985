"""The run directory: run.json and an append-only samples.jsonl, written after every trial.

Schema history (a reader accepts every version up to its own; changes only add):

1. 2026-11: first version.

Per-token values that must survive bit for bit are hexadecimal strings of fixed width per token:
``logprob_bits`` 8 digits (big-endian fp32), ``row_digests`` 16 digits.
"""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import math
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ndcheck.errors import BackendError, UsageError
from ndcheck.records import (
    Decoding,
    Endpoint,
    Engine,
    Environment,
    Fault,
    Load,
    Probe,
    Run,
    RunSpec,
    Sample,
    Trial,
    Witness,
)

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
            finished, end = _finished_trials(path)
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
    """Read run.json. Raises UsageError if it is missing, unreadable or of a newer schema."""
    file = path / RUN_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        version = document.pop("schema_version")
        if version > SCHEMA_VERSION:
            raise UsageError(
                f"{file} has schema version {version}; this ndcheck reads up to "
                f"{SCHEMA_VERSION}: upgrade ndcheck"
            )
        spec = document.pop("spec")
        engine = spec.get("engine")
        endpoint = spec.get("endpoint")
        document["changes"] = tuple(document.get("changes", ()))
        return Run(
            spec=RunSpec(
                **{
                    **_tupled(spec),
                    "probes": tuple(Probe(**probe) for probe in spec["probes"]),
                    "decoding": Decoding(**spec["decoding"]),
                    "engine": Engine(**_tupled(engine)) if engine else None,
                    "endpoint": Endpoint(**_tupled(endpoint)) if endpoint else None,
                }
            ),
            environment=Environment(**document.pop("environment")),
            **document,
        )
    except FileNotFoundError:
        raise UsageError(f"{path} holds no run: {RUN_FILE} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


class SampleReader:
    """Streams samples.jsonl; lines that cannot be read are skipped and named in ``bad_lines``."""

    def __init__(self, path: Path) -> None:
        self._file = path / SAMPLES_FILE
        self.bad_lines: list[str] = []

    def __iter__(self) -> Iterator[Sample]:
        self.bad_lines.clear()
        try:
            with self._file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        yield _decode(line)
                    except (ValueError, TypeError, KeyError, struct.error) as error:
                        self.bad_lines.append(
                            f"{self._file.name} line {number} is ignored: {_why(error)}"
                        )
        except OSError as error:
            raise UsageError(f"{self._file} cannot be read: {error.strerror}") from error


def failed_samples(trial: Trial, message: str, elapsed_s: float) -> list[Sample]:
    """What a failed trial leaves behind: one sample with the error for each slot."""
    return [
        Sample.of(trial, nth, Witness(None), "error", elapsed_s, error=message)
        for nth in range(trial.n_samples)
    ]


def _open_locked(file: Path, path: Path) -> io.FileIO:
    handle = file.open("ab", buffering=0)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UsageError(f"another ndcheck is writing {path}: wait for it, or stop it") from None
    return handle


def _finished_trials(path: Path) -> tuple[list[Sample], int]:
    """Samples of the complete trials at the head of the file, and the offset where they end."""
    finished: list[Sample] = []
    pending: list[Sample] = []
    end = offset = 0
    with (path / SAMPLES_FILE).open("rb") as lines:
        for line in lines:
            offset += len(line)
            try:
                sample = _decode(line)
            except (ValueError, TypeError, KeyError, struct.error) as error:
                if next(lines, None) is None:
                    break
                # Cutting here would lose finished trials, so this is the user's to decide.
                raise UsageError(
                    f"{path / SAMPLES_FILE} is damaged before its end ({_why(error)}): "
                    f"`ndcheck report {path}` reads the rest, a resume cannot"
                ) from error
            pending.append(sample)
            if len(pending) == len(sample.load.slots):
                finished += pending
                pending = []
                end = offset
    return finished, end


def write_failure(path: Path, error: OSError) -> BackendError:
    """The one line that a user sees when the disk refuses."""
    return BackendError(f"cannot write to {path}: {error.strerror or error}")


def _why(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def _tupled(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


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


_LOAD_FIELDS = tuple(Load.__dataclass_fields__)
_WITNESS_FIELDS = tuple(name for name in Witness.__dataclass_fields__ if name != "passes")


def _decode(line: bytes) -> Sample:
    fields = _tupled(json.loads(line))
    load = Load(**{name: fields.pop(name) for name in _LOAD_FIELDS if name in fields})
    passes = tuple(map(tuple, fields.pop("passes", ())))
    known = {name: fields.pop(name) for name in _WITNESS_FIELDS if name in fields}
    witness = Witness(**known, passes=passes)
    bits = bytes.fromhex(fields.pop("logprob_bits"))
    digests = fields.pop("row_digests")
    fault = fields.pop("fault")
    margins = fields.pop("margins")
    return Sample(
        load=load,
        witness=witness,
        fault=Fault(**fault) if fault else None,
        logprobs=struct.unpack(f">{len(bits) // 4}f", bits),
        margins=tuple(math.inf if m is None else m for m in margins),
        row_digests=tuple(digests[i : i + 16] for i in range(0, len(digests), 16)),
        **fields,
    )
