"""The numbers and texts that a field of a record may hold: files are held to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a field may hold, both ends included unless ``is_open``.

    `ndcheck.storage.reading.decode` holds files to it; options of the command line have lines of
    their own.
    """

    low: float
    high: float
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        if self.is_open:
            return self.low < value < self.high
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.high == INFINITY:
            return f"of {self.low:g} or more"
        ends = f"{self.low} and {self.high}" if self.is_open else f"{self.low} to {self.high}"
        return f"{'between' if self.is_open else 'from'} {ends}"


INFINITY = float("inf")
Count = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[int, Range(1, 2**31 - 1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
NotNegative = Annotated[float, Range(0, INFINITY)]
RawText = Annotated[str, "may hold half a character, as servers stream them"]
Level = Annotated[float, Range(0, 1, is_open=True)]
