"""Call an op on the terms that `sumtree` asks for, and check that it adds them and does no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ndcheck.explain.order.reductions import ColumnSums, RowSums, Shape
from ndcheck.explain.order.sumtree import NotASumError, Pair, UnsteadyError

# A unit, and a mask that swallows any sum of units in the widest accumulator the dtype meets.
UNITS = {
    torch.float32: (1.0, 2.0**127),
    torch.bfloat16: (1.0, 2.0**127),
    torch.float16: (2.0**-24, 2.0**15),
}
# Counts of units that the dtype holds exactly: more terms are read a part at a time.
LARGEST_COUNT = {torch.float32: 2**24, torch.bfloat16: 2**8, torch.float16: 2**11}
N_WATCHED_ROWS = 16
N_WATCHED_COLUMNS = 3
N_SUBSETS = 16
N_COMPARED = 4
SEED_WITH_ZEROS = 5
SIGNS = {3: 1, 6: -1}
"""Of all random terms, by their seed modulo 8."""
MOST_UNLIKE = 8
MOST_TERMS_BY_ROW = 512
"""More are read by columns, where an op allows that."""


def are_equal(a: Tensor, b: Tensor) -> Tensor:
    """Of elements; NaN equals itself."""
    return (a == b) | (a.isnan() & b.isnan())


class Reader(ABC):
    """Probes one op at one number of rows; every row gets the same terms.

    ``elements`` are the output elements [row, column] that are watched, of ``n_columns`` a row.
    """

    def __init__(self, n_rows: int, shape: Shape, *, is_mean: bool, can_fuse: bool) -> None:
        self.n_rows = n_rows
        self.n_terms = shape.terms
        self.n_columns = shape.columns
        self.is_mean = is_mean
        # No hardware adds several fp32 numbers in one step.
        self.can_fuse = can_fuse and shape.dtype != torch.float32
        self.n_calls = 0
        self.dissenters: set[int] = set()
        self.elements: list[tuple[int, int]] = []
        self._shape = shape
        self._unit, self._mask = UNITS[shape.dtype]
        # The quotient of a mean is rounded again: half the count leaves room for that.
        self._part = LARGEST_COUNT[shape.dtype] // (2 if is_mean else 1)
        self._first: tuple[list[Pair], NDArray[np.int64]] | None = None

    def sizes(self, watched: int, pairs: Sequence[Pair]) -> list[int]:
        """Subtree sizes at the watched element; elements that read otherwise are noted."""
        readings = self._read(pairs)
        differ = (readings != readings[:, watched : watched + 1]).any(axis=0)
        self.dissenters |= set(np.flatnonzero(differ).tolist())
        if self._first is None:
            self._first = list(pairs), readings
        return [int(size) for size in readings[:, watched]]

    def repeats(self) -> bool:
        """Whether the first readings come out the same again."""
        return self._first is None or bool((self._read(self._first[0]) == self._first[1]).all())

    def random_sums(self, seed: int) -> tuple[NDArray[np.float32], Tensor]:
        """Random terms [n], exact in fp32, and the op's results for them [elements]."""
        terms = self._random_terms(seed)
        return terms.float().numpy(), self._sums(terms.to(self._shape.device)).cpu()

    def _random_terms(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(self.n_terms // 2, generator=generator)
        half *= torch.exp2(torch.randint(-6, 7, half.shape, generator=generator))
        if self._shape.dtype != torch.float16:  # An order may follow the values' magnitudes.
            half *= 2.0 ** (0, 30, -30, 0)[seed % 4]
        if seed % 8 == SEED_WITH_ZEROS:  # It may also leave out terms that are zero.
            half *= torch.rand(half.shape, generator=generator) < 0.5
        # Terms that cancel: what is left of their sum is the rounding noise of its order.
        terms = torch.cat([half, -half, half[: self.n_terms % 2]]).to(self._shape.dtype)
        if seed % 8 in SIGNS:  # Or be another where no term is negative.
            terms = terms.abs() * SIGNS[seed % 8]
        return terms[torch.randperm(self.n_terms, generator=generator)]

    def _find_unlike(
        self, watched: Sequence[int], all_sums: Callable[[Tensor], Tensor]
    ) -> list[int]:
        """More elements: those that add random terms like none that is watched, one of a kind.

        ``all_sums`` gives the sums of the same terms [n] at every element there is.
        """
        terms = [self._random_terms(seed).to(self._shape.device) for seed in range(N_COMPARED)]
        sums = torch.stack([all_sums(each).reshape(-1).double() for each in terms], 1)
        bits = sums.view(torch.int64)
        is_new = torch.ones(len(bits), dtype=torch.bool, device=bits.device)
        for element in watched:
            is_new &= (bits != bits[element]).any(1)
        found: list[int] = []
        while len(found) < MOST_UNLIKE and is_new.any():
            found.append(int(is_new.int().argmax()))
            is_new &= (bits != bits[found[-1]]).any(1)
        return found

    def check_sums(self) -> None:
        """Raise NotASumError unless every term counts once, at any magnitude, in its own row."""
        self._check_counts()
        self._check_rows()
        if not self.is_mean:
            self._check_magnitudes()

    def _check_counts(self) -> None:
        n, unit = self.n_terms, self._unit
        factor = (n if self.is_mean else 1) / unit
        generator = torch.Generator().manual_seed(n)
        for chosen in self._subsets(generator):
            terms = torch.zeros(n, dtype=self._shape.dtype, device=self._shape.device)
            terms[chosen] = unit
            counts = (self._sums(terms).double() * factor).round()
            if not (counts == len(chosen)).all():
                count = float(counts[counts != len(chosen)][0])
                raise NotASumError(
                    f"not a plain sum of its terms: it makes {count:g} of {len(chosen)} ones"
                    + " (return the sum of a row, not its mean)" * (count * n == len(chosen))
                )

    def _check_magnitudes(self) -> None:
        n = self.n_terms
        generator = torch.Generator().manual_seed(n)
        lowest, highest = (-14, 15) if self._shape.dtype == torch.float16 else (-100, 127)
        for exponent in (*range(lowest, highest, 4 if lowest > -20 else 12), highest):
            terms = torch.zeros(n, dtype=self._shape.dtype, device=self._shape.device)
            value = 2.0**exponent * (1 - 2 * (exponent & 4 > 0))
            terms[int(torch.randint(n, (1,), generator=generator))] = value
            sums = self._sums(terms)
            if not (sums == value).all():
                other = float(sums[sums != value][0])
                raise NotASumError(
                    f"not a plain sum of its terms: it makes {other:g} of {value:g} and zeros"
                )

    def _subsets(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Every term in one, then random ones: as many terms as the dtype can count."""
        yield from torch.arange(self.n_terms).split(self._part)
        for _ in range(N_SUBSETS):
            yield torch.randperm(self.n_terms, generator=generator)[
                : min(self.n_terms // 2 + 1, self._part)
            ]

    def _read(self, pairs: Sequence[Pair]) -> NDArray[np.int64]:
        """Subtree sizes [pairs, elements]."""
        factor = (self.n_terms if self.is_mean else 1) / self._unit
        total: Tensor | float = 0.0
        for start in range(0, self.n_terms, self._part):
            units = slice(start, start + self._part)
            total = total + (self._masked_sums(pairs, units).double() * factor).round()
        readings = torch.as_tensor(total).cpu().numpy()
        unlikely = readings[~((readings >= 0) & (readings <= self.n_terms - 2))]
        if unlikely.size:
            raise NotASumError(
                f"not a plain sum of its terms: a reading counts {unlikely[0]:g} of {self.n_terms}"
            )
        return self.n_terms - readings.astype(np.int64)

    @abstractmethod
    def _check_rows(self) -> None:
        """Raise NotASumError where a row's sum follows what the others hold."""

    @abstractmethod
    def _sums(self, terms: Tensor) -> Tensor:
        """The sums [elements] of the same terms [n] in every row and column."""

    @abstractmethod
    def _masked_sums(self, pairs: Sequence[Pair], units: slice) -> Tensor:
        """The sums [pairs, elements] of ones at ``units``, but +M and -M at each pair."""


class RowReader(Reader):
    """One call for each pair: all columns of a row get the same terms."""

    def __init__(
        self,
        row_sums: RowSums,
        n_rows: int,
        shape: Shape,
        *,
        is_mean: bool,
        can_fuse: bool = True,
    ) -> None:
        super().__init__(n_rows, shape, is_mean=is_mean, can_fuse=can_fuse)
        self._row_sums = row_sums
        self._x = torch.empty(n_rows, shape.terms, dtype=shape.dtype, device=shape.device)
        self.n_columns = n_columns = self._count_columns()
        rows, columns = _spread(n_rows, N_WATCHED_ROWS), _spread(n_columns, N_WATCHED_COLUMNS)
        watched = [row * n_columns + column for row in rows for column in columns]
        unlike = self._find_unlike(watched, self._all_sums)
        # The same columns of every row, or rows would differ by what is watched of them.
        rows = sorted({*rows, *(element // n_columns for element in unlike)})
        columns = sorted({*columns, *(element % n_columns for element in unlike)})
        self.elements = [(row, column) for row in rows for column in columns]
        watched = [row * n_columns + column for row, column in self.elements]
        self._index = torch.tensor(watched, device=shape.device)

    def _all_sums(self, terms: Tensor) -> Tensor:
        self._x[:] = terms
        return self._checked_sums()

    def _check_rows(self) -> None:
        for seed in range(N_COMPARED):
            rows = [self._random_terms(seed + row) for row in range(self.n_rows)]
            others = torch.stack(rows).to(self._shape.device)
            self._x[:] = others
            among_others = self._call()
            for row, element in {row: i for i, (row, _) in enumerate(self.elements)}.items():
                terms = rows[row].to(self._shape.device)
                among_equals = self._sums(terms)
                if not are_equal(among_others[element], among_equals[element]).item():
                    is_steady = are_equal(self._sums(terms), among_equals).all()
                    self._x[:] = others
                    if not is_steady or not are_equal(self._call(), among_others).all():
                        raise UnsteadyError
                    raise NotASumError(
                        f"not a plain sum of its terms: that of row {row} follows the other rows"
                    )

    def _sums(self, terms: Tensor) -> Tensor:
        self._x[:] = terms
        return self._call()

    def _masked_sums(self, pairs: Sequence[Pair], units: slice) -> Tensor:
        sums = []
        for i, j in pairs:
            self._x.zero_()
            self._x[:, units] = self._unit
            self._x[:, i] = self._mask
            self._x[:, j] = -self._mask
            sums.append(self._call())
        return torch.stack(sums)

    def _call(self) -> Tensor:
        self.n_calls += 1
        return self._checked_sums().reshape(-1)[self._index]

    def _count_columns(self) -> int:
        self._x.fill_(self._unit)
        return self._checked_sums().reshape(self.n_rows, -1).shape[1]

    def _checked_sums(self) -> Tensor:
        """All sums of what the rows hold. A user's function may return anything, at any call."""
        out = self._row_sums(self._x)
        made, is_fine = type(out).__name__, False
        if isinstance(out, Tensor) and out.layout == torch.strided and not out.is_nested:
            made = f"{str(out.dtype).removeprefix('torch.')} {list(out.shape)} on {out.device}"
            is_fine = (
                (out.shape[:1] == (self.n_rows,) and out.numel() > 0)
                and not (out.is_complex() or out.is_quantized)
                and out.device == self._x.device
            )
        if not is_fine:
            raise NotASumError(
                f"of {self.n_rows} rows it made {made}: it must return a dense tensor of real "
                f"numbers on {self._x.device}, one or more sums for each row"
            )
        return out


class ColumnReader(Reader):
    """A product's columns hold a pair each, so that one call reads as many pairs as it has.

    Takes for granted that all columns are summed alike; every reading is taken a second time in
    columns half the width away, and NotASumError raised where that makes a difference.
    """

    def __init__(self, product: ColumnSums, n_rows: int, shape: Shape) -> None:
        super().__init__(n_rows, shape, is_mean=False, can_fuse=True)
        self._product = product
        self._terms = torch.empty(
            shape.terms, shape.columns, dtype=shape.dtype, device=shape.device
        )
        rows = _spread(n_rows, N_WATCHED_ROWS)
        rows += self._find_unlike(rows, self._first_column)
        self.elements = [(row, 0) for row in rows]
        self._rows = torch.tensor(rows, device=shape.device)

    def _first_column(self, terms: Tensor) -> Tensor:
        self._terms[:] = terms[:, None]
        return self._product(self.n_rows, self._terms)[:, 0]

    def _check_rows(self) -> None:
        """All rows are ones."""

    def _sums(self, terms: Tensor) -> Tensor:
        self._terms[:] = terms[:, None]
        return self._call()[:, 0]

    def _masked_sums(self, pairs: Sequence[Pair], units: slice) -> Tensor:
        width = self._shape.columns
        sums = []
        for start in range(0, len(pairs), width):
            chunk = torch.tensor(pairs[start : start + width], device=self._shape.device)
            both = []
            for shift in (0, width // 2):
                columns = (torch.arange(len(chunk), device=chunk.device) + shift) % width
                self._terms.zero_()
                self._terms[units] = self._unit
                self._terms[chunk[:, 0], columns] = self._mask
                self._terms[chunk[:, 1], columns] = -self._mask
                both.append(self._call()[:, columns].T)
            if not are_equal(*both).all():
                raise NotASumError(
                    "columns of this product are summed in orders of their own: read them one by "
                    f"one, with up to {MOST_TERMS_BY_ROW} --terms"
                )
            sums.append(both[0])
        return torch.cat(sums)

    def _call(self) -> Tensor:
        self.n_calls += 1
        return self._product(self.n_rows, self._terms)[self._rows]


def _spread(count: int, most: int) -> list[int]:
    """Up to ``most`` indices below ``count``, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})
