"""The answer in a completion, as evaluation harnesses look for it, and whether it changed."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Context, Decimal, InvalidOperation
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.unique import Completions
from ndcheck.errors import UsageError
from ndcheck.records import AnswerKind, RunSpec

ANSWERS_TIMEOUT_S = 10.0
MAX_JSON_STARTS = 1000
"""Brackets of one completion at which JSON is looked for."""
Parser = Callable[[str], str | None]
"""The answer of a text in one form for equal answers; None where it has none."""

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?")
_NAMED_CHOICE = re.compile(
    r"(?i:answer|choice|option)(?i:\s+is)?[\s:*\"'(\[]{0,8}([A-J])(?![A-Za-z'])"
)
_MARKED_CHOICE = re.compile(r"(?<!\w)\(?([A-J])[).:](?!\w)")
_BARE_CHOICE = re.compile(r"^[\s*(]*([A-J])[\s*).]*$", re.MULTILINE)


def answer_parser(spec: RunSpec) -> Parser | None:
    """What finds a run's answers; None where none are asked for."""
    if spec.answer is not None:
        return PARSERS[spec.answer]
    return None if spec.answer_pattern is None else PatternParser.of(spec.answer_pattern)


@dataclass(frozen=True, slots=True)
class Answers:
    """Of the completions of one probe in one arm, by their index.

    ``flips``: is it another answer than the reference's? None is an answer of its own.
    ``is_right`` is None where no right answer is known.
    """

    texts: tuple[str | None, ...]
    flips: NDArray[np.bool_]
    is_right: NDArray[np.bool_] | None

    @classmethod
    def find(cls, completions: Completions, spec: RunSpec, given: str | None) -> Answers | None:
        """None where none are asked for, or finding them takes too long.

        ``given`` is what the prompts file has as the right answer.
        """
        parse = answer_parser(spec)
        if parse is None:
            return None
        try:
            texts = tuple(map(parse, completions.texts()))
            right = None if given is None else expected_answer(given, spec.answer, parse)
        except TimeoutError:
            return None
        reference = completions.reference
        return cls(
            texts,
            np.array([reference is not None and t != texts[reference] for t in texts], np.bool_),
            None if right is None else np.array([text == right for text in texts], np.bool_),
        )

    def count_flips(self, rows: NDArray[np.void]) -> int:
        """In how many trials any of these OUTCOME rows answers otherwise."""
        return len(np.unique(rows["trial"][self.flips[rows["completion"]]]))

    def count_right(self, rows: NDArray[np.void]) -> int | None:
        return None if self.is_right is None else int(self.is_right[rows["completion"]].sum())


def expected_answer(given: str, kind: AnswerKind | None, parse: Parser) -> str:
    """The right answer of a prompts file in the form that ``parse`` gives.

    A file may hold its derivation too, and may number choices from 0.
    """
    if kind == "choice" and re.fullmatch(r"[0-9]", given):
        return "ABCDEFGHIJ"[int(given)]
    return parse(given) or given.strip()


def find_json(text: str) -> str | None:
    """The last object, else the last array, with sorted keys (fenced or not)."""
    values = list(_json_values(text))
    objects = [value for value in values if isinstance(value, dict)]
    chosen = (objects or values)[-1:]
    return str(json.dumps(chosen[0], sort_keys=True, ensure_ascii=False)) if chosen else None


def _json_values(text: str) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(), 0
    for _ in range(MAX_JSON_STARTS):
        start = re.compile(r"[{\[]").search(text, at)
        if start is None:
            return
        try:
            value, at = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            at = start.end()
        else:
            yield value


def find_number(text: str) -> str | None:
    r"""The last number, of the last ``\boxed{}`` where there is one; "1,000.0" is 1000."""
    boxed = _BOXED.findall(text)
    found = _NUMBER.findall(boxed[-1] if boxed else "") or _NUMBER.findall(text)
    if not found:
        return None
    digits: str = found[-1].replace(",", "")
    try:
        number = Decimal(digits).normalize(Context(prec=max(1, len(digits))))
    except InvalidOperation:
        return digits
    is_short = number.is_finite() and -30 < int(number.as_tuple().exponent) < 30
    shown = format(number, "f") if is_short else str(number)
    return "0" if shown == "-0" else shown


def find_choice(text: str) -> str | None:
    r"""The letter A to J of the last "answer is B", ``\boxed{B}``, "(B)", "B." or line "B"."""
    boxed = [b.strip() for b in _BOXED.findall(text) if re.fullmatch(r"\s*[A-J]\s*", b)]
    for found in (
        boxed,
        _NAMED_CHOICE.findall(text),
        _MARKED_CHOICE.findall(text),
        _BARE_CHOICE.findall(text),
    ):
        if found:
            return str(found[-1])
    return None


def find_code(text: str) -> str | None:
    """The last fenced block, closed or not, else all of it; without spaces at ends of lines."""
    blocks = _FENCE.findall(text)
    lines = (blocks[-1] if blocks else text).split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n") or None


PARSERS: dict[AnswerKind, Parser] = {
    "json": find_json,
    "number": find_number,
    "choice": find_choice,
    "code": find_code,
}


class PatternParser:
    """Finds answers; a pattern that backtracks for ever is given up, once for all completions."""

    def __init__(self, pattern: str) -> None:
        self._pattern = compile_answer_pattern(pattern)
        self._left_s = ANSWERS_TIMEOUT_S

    @classmethod
    @cache
    def of(cls, pattern: str) -> PatternParser:
        return cls(pattern)

    def __call__(self, text: str) -> str | None:
        """Group 1 of the last match, or all of it where the pattern has no group.

        Raises TimeoutError where all texts together took too long.
        """
        if self._left_s <= 0:
            raise TimeoutError
        started = time.perf_counter()
        try:
            matches = deque(self._pattern.finditer(text, timeout=self._left_s), maxlen=1)
        finally:
            self._left_s -= time.perf_counter() - started
        found: str | None = matches[0][1 if self._pattern.groups else 0] if matches else None
        return found


def compile_answer_pattern(pattern: str) -> Any:
    """Raises UsageError for what is no regular expression."""
    # The standard library's cannot be stopped.
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise UsageError(f"--answer-pattern {pattern!r:.80}: {error}") from error
