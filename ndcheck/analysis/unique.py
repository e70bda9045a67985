"""Distinct completions: each token sequence is stored once, in 4 bytes per token."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.divergence import Reference, Stream, first_divergence
from ndcheck.analysis.summary import Completion
from ndcheck.records import Sample

MARGINS_KEPT = 2**25
"""Tokens whose smallest margin is kept (128 MiB): those of the completions seen first."""


class Interner:
    """Numbers distinct token sequences in order of arrival, however they ended.

    It costs 4 bytes per token and about 150 per sequence. A token id's text is kept once;
    ``_other_texts`` holds the tokens that decode to something else in their context (parts of a
    multi-byte character), by position in the end-to-end token array.
    """

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._tokens = array("i")
        self._margins = array("f")
        self._ends = array("q", [0])
        self._texts: dict[int, str] = {}
        self._other_texts: dict[int, str] = {}
        self.finish_reasons: list[str] = []

    def __len__(self) -> int:
        return len(self.finish_reasons)

    def add(self, sample: Sample, stream: Stream) -> int:
        """The number of the sample's completion; ``stream`` is what `read_stream` says of it."""
        content = stream.token_ids.tobytes()
        # 128 bits: a collision, which would hide a divergence, is out of reach.
        key = hashlib.blake2b(content, digest_size=16).digest()
        number = self._numbers.setdefault(key, len(self))
        if number == len(self):
            self._append(sample, content, stream.margins)
        else:
            self._lower_margins(number, stream.margins)
        return number

    def forget(self) -> None:
        """Free what only `add` needs."""
        self._numbers.clear()

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The token ids of all sequences, end to end. `add` fails while a view is alive."""
        return np.frombuffer(self._tokens, np.int32)

    @property
    def margins(self) -> NDArray[np.float32]:
        """The smallest margin seen at each of the first ``MARGINS_KEPT`` tokens, NaN if unknown."""
        return np.frombuffer(self._margins, np.float32)

    @property
    def ends(self) -> NDArray[np.int64]:
        """Sequence i is ``tokens[ends[i] : ends[i + 1]]``."""
        return np.frombuffer(self._ends, np.int64)

    def token_texts(self, start: int, stop: int) -> list[str]:
        """Decoded tokens at positions of ``tokens``."""
        texts = list(map(self._texts.__getitem__, self._tokens[start:stop]))
        if not self._other_texts:
            return texts
        return [self._other_texts.get(at, text) for at, text in enumerate(texts, start)]

    def _append(self, sample: Sample, content: bytes, margins: NDArray[np.float32]) -> None:
        start = len(self._tokens)
        self._tokens.frombytes(content)
        self._ends.append(len(self._tokens))
        self.finish_reasons.append(sample.finish_reason)
        usual = tuple(map(self._texts.setdefault, sample.token_ids, sample.token_texts))
        if usual != sample.token_texts:
            self._other_texts.update(
                (start + i, text) for i, text in enumerate(sample.token_texts) if text != usual[i]
            )
        if len(self._margins) == start and len(self._tokens) <= MARGINS_KEPT:
            self._margins.frombytes(margins[: len(self._tokens) - start].tobytes())
            self._margins.extend([math.nan] * (len(self._tokens) - len(self._margins)))

    def _lower_margins(self, number: int, margins: NDArray[np.float32]) -> None:
        start, end = self._ends[number], self._ends[number + 1]
        kept = self.margins[start:end][: len(margins)]
        np.fmin(kept, margins[: len(kept)], out=kept)


class Completions(Sequence[Completion]):
    """The distinct completions of one probe in one arm, most frequent first, then by arrival.

    Each `Completion` is built when it is looked at, so that a million of them fit in memory.
    The columns have shape [n_unique], in that order: ``starts`` and ``lengths`` locate the tokens
    of each in ``tokens``, ``first_divergences`` is -1 where there is none.
    """

    def __init__(
        self,
        interner: Interner,
        counts: NDArray[np.int64],
        n_trials: NDArray[np.int64],
        first_divergences: NDArray[np.int32],
        reference: Reference | None,
    ) -> None:
        """The arrays, like ``reference.number``, go by the interner's numbers."""
        interner.forget()
        self._interner = interner
        self._numbers = np.argsort(-counts, kind="stable")
        self._known_margins = reference.stream.margins if reference else np.array([], np.float32)
        self.ranks = np.argsort(self._numbers)
        """Index in this sequence by the interner's number."""
        self.reference = int(self.ranks[reference.number]) if reference else None
        """Index of the reference's completion."""
        self.tokens = interner.tokens
        self.margins = interner.margins
        self.starts = interner.ends[:-1][self._numbers]
        self.lengths = np.diff(interner.ends)[self._numbers]
        self.counts = counts[self._numbers]
        self.n_trials = n_trials[self._numbers]
        self.n_samples = int(counts.sum())
        self.first_divergences = first_divergences[self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Completion: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Completion, ...]: ...
    def __getitem__(self, index: int | slice) -> Completion | tuple[Completion, ...]:
        if isinstance(index, slice):
            return tuple(self._build(i) for i in range(len(self))[index])
        return self._build(range(len(self))[index])

    def __iter__(self) -> Iterator[Completion]:
        return map(self._build, range(len(self)))

    def token_ids(self, index: int) -> NDArray[np.int32]:
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]

    def parting(self, a: int, b: int) -> int | None:
        """The first token at which two of them differ."""
        if self.reference in (a, b):
            at = int(self.first_divergences[b if a == self.reference else a])
            return None if at < 0 else at
        return first_divergence(self.token_ids(a), self.token_ids(b))

    def texts(self) -> Iterator[str]:
        """The decoded completions."""
        return ("".join(self.token_texts(i)) for i in range(len(self)))

    def token_texts(self, index: int, start: int = 0, stop: int | None = None) -> list[str]:
        """Decoded tokens ``start`` to ``stop`` (or the end) of one completion."""
        offset, length = int(self.starts[index]), int(self.lengths[index])
        stop = length if stop is None else min(stop, length)
        return self._interner.token_texts(offset + start, offset + stop)

    def reference_margins(self, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """The reference's margin at each position; NaN where unknown, or the position is -1."""
        margins = np.full(len(positions), np.nan, np.float32)
        known = (positions >= 0) & (positions < len(self._known_margins))
        margins[known] = self._known_margins[positions[known]]
        return np.where(np.isfinite(margins), margins, np.float32(np.nan))

    def _build(self, index: int) -> Completion:
        at = divergent_token = reference_token = margin = None
        if self.reference is not None and self.first_divergences[index] >= 0:
            at = int(self.first_divergences[index])
            divergent_token = "".join(self.token_texts(index, at, at + 1))
            reference_token = "".join(self.token_texts(self.reference, at, at + 1))
            margins = self._known_margins
            is_known = at < len(margins) and np.isfinite(margins[at])
            margin = float(margins[at]) if is_known else None
        token_ids = self.token_ids(index)
        return Completion(
            completion_id=index + 1,
            count=int(self.counts[index]),
            n_trials=int(self.n_trials[index]),
            share=int(self.counts[index]) / self.n_samples,
            first_divergence=at,
            divergent_token=divergent_token,
            reference_token=reference_token,
            margin=margin,
            n_tokens=len(token_ids),
            finish_reason=self._interner.finish_reasons[self._numbers[index]],
            sha256=hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest(),
            token_ids=token_ids,
            token_texts=tuple(self.token_texts(index)),
        )
