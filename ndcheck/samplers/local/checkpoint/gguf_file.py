"""The head of a GGUF file, read within its own length, without torch.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ndcheck.errors import UsageError
from ndcheck.storage.reading import open_file

SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_LAYERS = 1024
MOST_DEPTH = 4
ALIGNMENT = 32
NUMBERS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
"""struct's letters of the kinds of metadata that are one number."""
STRING, ARRAY = 8, 9
FLOATS = {0: "fp32", 1: "fp16", 30: "bf16"}
"""The kinds of tensors that are not quantised."""

Value = int | float | bool | str | None


@dataclass(frozen=True, slots=True)
class GgufHead:
    """What is stored: ``kinds`` counts elements by the number of their ggml type."""

    n_tensors: int
    kinds: Counter[int]

    @property
    def n_elements(self) -> int:
        return self.kinds.total()

    @property
    def dtype(self) -> str:
        """That of most elements; what is quantised is computed in bf16."""
        ((kind, _),) = self.kinds.most_common(1)
        return FLOATS.get(kind, "bf16")


def find_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory. Raises UsageError where it has several."""
    files = sorted(directory.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise UsageError(f"--model {directory}: it holds several GGUF files ({names}): give one")
    return files[0] if files else None


def read_gguf_head(file: Path) -> GgufHead:
    """Raises UsageError for what is no whole GGUF file of a model, and where gguf is missing."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"--model {file}: a GGUF file needs {package}: pip install 'ndcheck[gguf]'"
            )
    try:
        with open_file(file) as opened:
            if not opened.read(1):
                raise ValueError("it is empty")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).head()
    except OSError as error:
        raise UsageError(f"--model {file}: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise UsageError(f"--model {file}: it is no GGUF file that can be read: {error}") from error


class _Reader:
    """Reads on from one place of a file, never beyond its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 0

    def head(self) -> GgufHead:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; {VERSIONS[0]} and {VERSIONS[1]} are accepted")
        n_tensors, n_values = self._number("Q"), self._number("Q")
        values = {self._string(): self._value() for _ in range(n_values)}
        for name, value in values.items():
            if name.endswith(".block_count") and not _is_count(value, MOST_LAYERS):
                raise ValueError(f"{name} is {value!r}: at most {MOST_LAYERS} are accepted")
        if values.get("split.count", 0) not in (0, 1):
            raise ValueError("it is one of several parts: llama-gguf-split --merge joins them")
        return self._tensors(n_tensors, values.get("general.alignment", ALIGNMENT))

    def _tensors(self, n_tensors: int, alignment: Value) -> GgufHead:
        import gguf

        if not _is_count(alignment, 1 << 16) or not isinstance(alignment, int):
            raise ValueError(f"general.alignment is {alignment!r}")
        sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        kinds: Counter[int] = Counter()
        end = 0
        for _ in range(n_tensors):
            name, n_dimensions = self._string(), self._number("I")
            if n_dimensions > 4:
                raise ValueError(f"{name!r} has {n_dimensions} dimensions")
            n_elements = math.prod(self._number("Q") for _ in range(n_dimensions))
            kind, offset = self._number("I"), self._number("Q")
            if kind not in sizes:
                raise ValueError(f"{name!r} is of type {kind}, which gguf does not know")
            n_of_block, n_bytes = sizes[kind]
            end = max(end, offset + -(-n_elements // n_of_block) * n_bytes)
            kinds[kind] += n_elements
        if not kinds.total():
            raise ValueError("it holds no tensors")
        start = -(-self._at // alignment) * alignment
        if start + end > len(self._content):
            raise ValueError("it is cut short: its tensors end beyond its end")
        return GgufHead(n_tensors, kinds)

    def _take(self, n_bytes: int) -> bytes:
        self._skip(n_bytes)
        return self._content[self._at - n_bytes : self._at]

    def _skip(self, n_bytes: int) -> None:
        if self._at + n_bytes > len(self._content):
            raise ValueError("it is cut short")
        self._at += n_bytes

    def _number(self, letter: str) -> int:
        return int(struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0])

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _value(self, kind: int | None = None, depth: int = 0) -> Value:
        """A number or a text; None for an array, which is passed over."""
        kind = self._number("I") if kind is None else kind
        if kind in NUMBERS:
            size = struct.calcsize(f"<{NUMBERS[kind]}")
            value: Value = struct.unpack(f"<{NUMBERS[kind]}", self._take(size))[0]
            return value
        if kind == STRING:
            return self._string()
        if kind != ARRAY or depth == MOST_DEPTH:
            raise ValueError(f"metadata of kind {kind}")
        inner, length = self._number("I"), self._number("Q")
        if inner in NUMBERS:
            self._skip(length * struct.calcsize(f"<{NUMBERS[inner]}"))
        elif inner == STRING:
            for _ in range(length):
                self._skip(self._number("Q"))
        else:
            for _ in range(length):
                self._value(inner, depth + 1)
        return None


def _is_count(value: Value, most: int) -> bool:
    return type(value) is int and 1 <= value <= most
