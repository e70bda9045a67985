"""The answer in a completion, as evaluation harnesses look for it, and whether it changed."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Context, Decimal, DivisionByZero, Inexact, InvalidOperation
from fractions import Fraction
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

_FENCE = re.compile(
    r"(?<![`~])(`{3,}+|~{3,}+)(?:[^\n`]*\n(?P<code>.*?)(?:^[ \t]*\1|\1[ \t]*$|\Z)|[^\n]*?\1)",
    re.DOTALL | re.MULTILINE,
)
"""A block, or code in a line, whose end must not begin a block."""
_BOXED = re.compile(r"\\f?boxed\{((?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!;:]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
"""Between thousands, as LaTeX and typographers have it."""
_NUMBER = re.compile(
    r"(?:(?<![\w.)])-\\?[$€£]?)?"
    r"(?:(?<![\d/.])\d{1,20}/\d{1,20}(?![\d/])"
    r"|(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?"
    r"|\.\d+(?:[eE][+-]?\d{1,3})?)"
)
# A sentence may begin with "I" where the letter is looked for.
_LETTER = r"(?i:\s+is)?[\s:*\"'($\[]{0,8}(?:\\text\w*\{)?\(?(?!I\s+[a-z])([A-J])(?![A-Za-z'’])"
_BOXED_CHOICE = re.compile(r"\W*(?:text\w*|math\w*)?\W*([A-J])(?:\W*|[).:].*)")
_NAMED_CHOICES = (
    re.compile(rf"(?i:answer){_LETTER}"),
    re.compile(rf"(?i:choice|option){_LETTER}"),
)
_MARKED_CHOICE = re.compile(r"(?<![\w.])\(?([A-J])[).:](?!\w)")
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
    try:
        shown = json.dumps(chosen[0], sort_keys=True, ensure_ascii=False) if chosen else None
    except RecursionError:
        return None
    # Half a character stays the escape that it was.
    return None if shown is None else shown.encode("utf-8", "backslashreplace").decode()


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
    r"""The last number, of the last ``\boxed{}`` where there is one.

    "1,000.0" is 1000, and a fraction that no decimal is equal to stays one: "2/6" is 1/3.
    """
    boxed = _BOXED.findall(text)
    found = _numbers(boxed[-1] if boxed else "") or _numbers(text)
    if not found:
        return None
    digits = re.sub(r"[,$€£\\]", "", found[-1])
    number, slash, divisor = digits.partition("/")
    try:
        exact = Context(max(50, len(digits)), traps=[Inexact, InvalidOperation, DivisionByZero])
        value = Decimal(number).normalize(exact)
        value = exact.divide(value, Decimal(divisor)).normalize(exact) if slash else value
    except Inexact:
        return str(Fraction(int(number), int(divisor)))
    except ArithmeticError:
        return digits
    is_short = value.is_finite() and -30 < int(value.as_tuple().exponent) < 30
    shown = format(value, "f") if is_short else str(value)
    return "0" if shown == "-0" else shown


def _numbers(text: str) -> list[str]:
    """As they stand there, in plain characters."""
    plain = _FRACTION.sub(r"\1/\2", text.replace("\N{MINUS SIGN}", "-"))
    return _NUMBER.findall(_SEPARATOR.sub(",", plain))


def find_choice(text: str) -> str | None:
    r"""The letter A to J of the last "answer is B", ``\boxed{B}``, "(B)", "B." or line "B"."""
    boxed = [found[1] for found in map(_BOXED_CHOICE.fullmatch, _BOXED.findall(text)) if found]
    for found in (
        boxed,
        *(named.findall(text) for named in _NAMED_CHOICES),
        _MARKED_CHOICE.findall(text),
        _BARE_CHOICE.findall(text),
    ):
        if found:
            return str(found[-1])
    return None


def find_code(text: str) -> str | None:
    """The last fenced block, closed or not, else all of it; without spaces at ends of lines."""
    blocks = [found["code"] for found in _FENCE.finditer(text) if found["code"] is not None]
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
