"""What was seen of products on this machine: one file for each environment, in the user's cache.

A configuration or a borrowed product changes no bits only as long as everything that could change
them stays as it was: the GPU, its driver, CUDA, cuBLASLt, torch, Triton, these sources. So a proof
is kept under all of these, and read only where all are the same. The file carries a digest of its
own content: one that was damaged or written by hand is set aside, and `problem` says why.

Three things are in it: which shapes cuBLASLt may compute at which numbers of rows (`borrowed`),
which configurations are in the bit class of a shape and which are not (`measure.prove`), and tables
of the fastest in the class (`measure.tune`), which then take the place of the frozen ones. None of
them can change bits: a table names configurations of the class alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

from ndcheck_kernels.cuda import candidates, configs
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import cublaslt

FORMAT = "ndcheck-proofs-1"
_SOURCES = (
    "matmul.py", "matmul_kernels.py", "tiles.py", "borrowed.py", "cublaslt.py", "../configs.py",
    "../candidates.py",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """What a proof is of, beside the number of rows."""

    n: int
    k: int
    dtype: str
    groups: int
    has_addend: bool = False

    def __str__(self) -> str:
        addend = " + addend" if self.has_addend else ""
        return f"{self.dtype} {self.n}x{self.k} in {self.groups}{addend}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest of the class up to a number of rows."""

    max_rows: int
    config: MatmulConfig
    borrows: bool


@dataclass(slots=True)
class Proofs:
    """What was seen in one environment.

    `proven` are the numbers of rows at which a borrowed shape has our bits, `failed` says why one
    has not. `classes` has every configuration that was tried, by shape and label: None is in the
    class, a text says why not. `tables` are JSON rows (max_rows, config, borrows) by shape.
    """

    path: Path
    environment: dict[str, str]
    proven: dict[str, set[int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    classes: dict[str, dict[str, str | None]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tables_since: str | None = None
    problem: str | None = None

    @classmethod
    def read(cls, environment: dict[str, str]) -> Proofs:
        """Those kept for this environment; none if the file is missing or damaged."""
        digest = _digest(environment)
        proofs = cls(cache_folder() / f"proofs-{digest[:16]}.json", environment)
        proofs.merge()
        return proofs

    def merge(self) -> None:
        """Add what other processes have kept meanwhile."""
        try:
            document = json.loads(self.path.read_text())
        except OSError:
            return
        except ValueError:
            self.problem = f"{self.path} is damaged"
            return
        self.problem = self.add(document)

    def add(self, document: Any) -> str | None:
        """Take in a document of this environment; what stands here already wins.

        Returns why nothing was taken from it, or None.
        """
        if reason := check_document(document):
            return reason
        if changed := differences(document["environment"], self.environment):
            return f"it was made in another environment: {changed[0]}"
        for shape, rows in document["proven"].items():
            self.proven.setdefault(shape, set()).update(rows)
        self.failed = document["failed"] | self.failed
        self.classes = document["classes"] | self.classes
        self.tables = document["tables"] | self.tables
        self.tables_since = self.tables_since or document["tables_since"]
        return None

    def document(self) -> dict[str, Any]:
        """As JSON, with its digest."""
        body = {
            "format": FORMAT,
            "environment": self.environment,
            "proven": {shape: sorted(rows) for shape, rows in sorted(self.proven.items())},
            "failed": dict(sorted(self.failed.items())),
            "classes": dict(sorted(self.classes.items())),
            "tables": dict(sorted(self.tables.items())),
            "tables_since": self.tables_since,
        }
        return body | {"digest": _digest(body)}

    def write(self) -> None:
        """Whole or not at all; a folder that cannot be written to costs a proof a process."""
        part = self.path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent):
                self.merge()
                part.write_text(json.dumps(self.document(), indent=1))
                part.replace(self.path)
        except OSError:
            part.unlink(missing_ok=True)

    def keep(
        self, shape: str, classes: dict[str, str | None], table: list[dict[str, Any]] | None
    ) -> None:
        """What a new proof of a shape says takes the place of an earlier one."""
        self.classes[shape] = classes
        self.tables.pop(shape, None)
        if table is not None:
            self.tables[shape] = table
            self.tables_since = datetime.now(UTC).isoformat(timespec="seconds")

    def table(self, shape: str) -> tuple[Choice, ...]:
        """The table of a shape in ascending rows, of configurations in its class alone."""
        known = candidates.known()
        in_class = {label for label, why in self.classes.get(shape, {}).items() if why is None}
        rows = sorted(self.tables.get(shape, ()), key=lambda row: row["max_rows"])
        return tuple(
            Choice(row["max_rows"], known[row["config"]], row["borrows"])
            for row in rows
            if row["config"] in in_class and row["config"] in known
        )

    def shut_out(self, shape: str) -> frozenset[str]:
        """Labels of configurations that were seen outside the class."""
        return frozenset(
            label for label, why in self.classes.get(shape, {}).items() if why is not None
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep out other processes that add to what is there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_document(document: Any) -> str | None:
    """Why this is no document of ours, or None. Its content is trusted in nothing but its form."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return f"it is no {FORMAT} document"
    body = {key: value for key, value in document.items() if key != "digest"}
    if document.get("digest") != _digest(body):
        return "its digest is not that of its content"
    wanted = {
        "environment": lambda v: _is_map(v, lambda text: isinstance(text, str)),
        "proven": lambda v: _is_map(v, lambda rows: _is_list(rows, _is_count)),
        "failed": lambda v: _is_map(v, lambda text: isinstance(text, str)),
        "classes": lambda v: _is_map(v, lambda c: _is_map(c, _is_text_or_none)),
        "tables": lambda v: _is_map(v, lambda rows: _is_list(rows, _is_row)),
        "tables_since": _is_text_or_none,
    }
    return next((f"its {key} is none" for key, ok in wanted.items() if not ok(body.get(key))), None)


def _is_map(value: Any, is_fine: Any) -> bool:
    return isinstance(value, dict) and all(map(is_fine, value.values()))


def _is_list(value: Any, is_fine: Any) -> bool:
    return isinstance(value, list) and all(map(is_fine, value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_count(value.get("max_rows"))
        and isinstance(value.get("config"), str)
        and isinstance(value.get("borrows"), bool)
    )


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """A line for each part of an environment that is not the same here."""
    return [
        f"{name} was {there.get(name)}, here {here.get(name)}"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_folder() -> Path:
    """Where proofs are kept: XDG's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ndcheck"


@cache
def environment(device: torch.device) -> dict[str, str]:
    """Everything that a product's bits may follow. Raises cublaslt.UnavailableError."""
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in _SOURCES)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "cublaslt": str(cublaslt.version()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ndcheck": _version(),
        "kernels": hashlib.sha256(sources).hexdigest()[:16],
    }


def _version() -> str:
    """Of the package that these kernels came in; the digest of their sources says more."""
    try:
        return metadata.version("ndcheck")
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The kernel module's version where Linux says it, else the CUDA version that it supports."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


lock = threading.RLock()
_proofs: dict[torch.device, Proofs] = {}
_in_force: dict[tuple[torch.device, torch.dtype, int, int, int], _InForce | None] = {}


@dataclass(frozen=True, slots=True)
class _InForce:
    table: tuple[Choice, ...]
    shut_out: frozenset[str]


def proofs(device: torch.device) -> Proofs:
    """What is known of a device. Raises cublaslt.UnavailableError."""
    with lock:
        if device not in _proofs:
            _proofs[device] = Proofs.read(environment(device))
        return _proofs[device]


def forget() -> None:
    """Read the files again when they are next needed."""
    with lock:
        _proofs.clear()
        _in_force.clear()


def is_on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def choose(
    device: torch.device, dtype: torch.dtype, m: int, shape: tuple[int, int, int],
    frozen: MatmulConfig, borrows: bool,
) -> tuple[MatmulConfig, bool]:  # fmt: skip
    """The configuration for m rows of a shape (N, K, K-groups), and whether to borrow instead.

    `frozen` and `borrows` are what the frozen tables say; a table of this machine wins.
    """
    known = _known(device, dtype, shape)
    if known is None:
        return frozen, borrows
    for choice in known.table:
        if m <= choice.max_rows:
            return choice.config, choice.borrows
    return _replaced(frozen, known), borrows


def unless_shut_out(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], config: MatmulConfig
) -> MatmulConfig:
    """`config`, or the one that serves every M where it was seen outside the class."""
    known = _known(device, dtype, shape)
    return config if known is None else _replaced(config, known)


def _replaced(config: MatmulConfig, known: _InForce) -> MatmulConfig:
    return configs.ONE_FOR_ALL if config.label in known.shut_out else config


def _known(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> _InForce | None:
    if not is_on_gpu(device):
        return None
    key = (device, dtype, *shape)
    if key not in _in_force:
        n, k, groups = shape
        name = str(Shape(n, k, str(dtype).removeprefix("torch."), groups))
        try:
            kept = proofs(device)
        except cublaslt.UnavailableError:
            _in_force[key] = None
        else:
            seen = name in kept.classes
            _in_force[key] = _InForce(kept.table(name), kept.shut_out(name)) if seen else None
    return _in_force[key]


def summary(device: torch.device) -> str:
    """Which tables are in force on a device and since when, and what is borrowed, in one line."""
    try:
        known = proofs(torch.empty(0, device=device).device)  # With its number.
    except cublaslt.UnavailableError as error:
        return f"frozen tables; no products borrowed: {error}"
    tables = "frozen tables"
    if known.tables:
        tables = f"tables of this machine for {len(known.tables)} shapes since {known.tables_since}"
    shut_out = sum(len(known.shut_out(shape)) for shape in known.classes)
    if known.classes:
        tables += f" ({len(known.classes)} shapes proven, {shut_out} configurations shut out)"
    if known.problem:
        tables += f"; not used: {known.problem}"
    counts = sum(map(len, known.proven.values()))
    refused = "".join(f"; not {shape}: {why}" for shape, why in sorted(known.failed.items()))
    return (
        f"{tables}; cuBLASLt {known.environment['cublaslt']}: {len(known.proven)} shapes have our "
        f"bits, seen at {counts} numbers of rows{refused}"
    )
