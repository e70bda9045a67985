"""The sums inside ops, made probeable: each takes rows of terms and returns each row's sum."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ndcheck.errors import UsageError

RowSums = Callable[[Tensor], Tensor]
"""Terms [rows, n] -> [rows, ...]: every output element is the sum of its row's terms."""
ColumnSums = Callable[[int, Tensor], Tensor]
"""(rows, terms [n, columns]) -> [rows, columns]: the sums of the columns, alike in every row."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes a reduction beside its number of rows.

    ``terms`` is the reduced length (K, or the KV length), ``columns`` the outputs a row has
    (N, or the heads' width).
    """

    terms: int
    columns: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Reduction:
    """An op whose order of addition can be read.

    ``rows`` says what its rows are. Outputs are the sum, or a mean if ``is_mean``. ``columns``
    takes other terms in every column, where the op allows that. ``is_own``: a library's op, which
    may run on hardware that fuses additions, and no function of the user's.
    """

    name: str
    rows: str
    make: Callable[[Shape], RowSums]
    is_mean: bool = False
    columns: ColumnSums | None = None
    is_own: bool = True


def _mm(shape: Shape) -> RowSums:
    ones = torch.ones(shape.terms, shape.columns, dtype=shape.dtype, device=shape.device)
    return lambda x: torch.mm(x, ones)


def _linear(shape: Shape) -> RowSums:
    weight = torch.ones(shape.columns, shape.terms, dtype=shape.dtype, device=shape.device)
    return lambda x: torch.nn.functional.linear(x, weight)


def _mm_columns(rows: int, terms: Tensor) -> Tensor:
    return torch.mm(terms.new_ones(rows, len(terms)), terms)


def _linear_columns(rows: int, terms: Tensor) -> Tensor:
    return torch.nn.functional.linear(terms.new_ones(rows, len(terms)), terms.T.contiguous())


def _bmm(shape: Shape) -> RowSums:
    ones = torch.ones(shape.terms, shape.columns, dtype=shape.dtype, device=shape.device)

    def sums(x: Tensor) -> Tensor:
        return torch.bmm(x[:, None], ones.expand(len(x), -1, -1))[:, 0]

    return sums


def _attention(shape: Shape) -> RowSums:
    """One query a row, all scores 0: the output is the mean of the values, the terms."""
    width = 64
    heads = max(1, shape.columns // width)

    def means(x: Tensor) -> Tensor:
        query = x.new_zeros(len(x), heads, 1, width)
        key = x.new_zeros(len(x), heads, shape.terms, width)
        value = x[:, None, :, None].expand_as(key).contiguous()
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return out.flatten(1)

    return means


class _FeedMean(TorchDispatchMode):
    """Feeds ``terms`` to the first mean over the last dimension, and keeps what it returns."""

    def __init__(self, terms: Tensor) -> None:
        super().__init__()
        self.terms = terms
        self.result: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.mean.dim and self.result is None:
            self.result = func(self.terms.to(args[0].dtype), *args[1:], **(kwargs or {}))
            return self.result
        return func(*args, **(kwargs or {}))


def _rms_norm(shape: Shape) -> RowSums:
    """The mean of squares in transformers' RMSNorm.

    A square has no sign to cancel, so the terms are put in its place on their way to the mean.
    """
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(shape.terms).to(shape.device, shape.dtype)

    def means(x: Tensor) -> Tensor:
        with _FeedMean(x) as hook:
            norm(x)
        if hook.result is None:
            raise UsageError("rms_norm: this transformers computes no mean of squares to hook into")
        return hook.result

    return means


REDUCTIONS: dict[str, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction("mm", "rows (M)", _mm, columns=_mm_columns),
        Reduction("linear", "rows (M)", _linear, columns=_linear_columns),
        Reduction("bmm", "batch", _bmm),
        Reduction("sum", "rows", lambda shape: lambda x: x.sum(-1, keepdim=True)),
        Reduction("mean", "rows", lambda shape: lambda x: x.mean(-1, keepdim=True), True),
        Reduction("rms_norm", "rows", _rms_norm, True),
        Reduction("attention", "batch", _attention, True),
    )
}


def _load_module(name: str) -> Any:
    """A module by its name, or the file of it, whatever other module has that file's name."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    file = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(f"_ndcheck_fn_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no module")
    module = importlib.util.module_from_spec(spec)
    # What the file imports may lie beside it; behind all that is installed, so that a file named
    # like a module of the library is not taken for it by what is imported later.
    if (folder := str(file.parent)) not in sys.path:
        sys.path.append(folder)
    spec.loader.exec_module(module)
    return module


def load_function(path: str) -> Reduction:
    """``module:function`` as a reduction: the function takes [rows, n] and returns row sums.

    The module may also be a file, ``path/to/file.py:function``.
    Raises UsageError where there is no such function, or it raises anything itself.
    """
    module_name, _, name = path.rpartition(":")
    try:
        function = getattr(_load_module(module_name), name)
    except (Exception, SystemExit) as error:  # a module may raise anything, and leave
        raise UsageError(
            f"--fn {path}: {error} (accepted: module:function or file.py:function)"
        ) from error

    def row_sums(x: Tensor) -> Tensor:
        try:
            return function(x)
        except (Exception, SystemExit) as error:
            line = (str(error).splitlines() or [""])[0]
            raise UsageError(
                f"--fn {path}, given a tensor of {list(x.shape)}: {type(error).__name__}: {line}"
            ) from error

    return Reduction(name, "rows", lambda shape: row_sums, is_own=False)
