"""What a server says in other names of the same tokens, as after an upgrade, is no other answer."""

from __future__ import annotations

from ndcheck.samplers.endpoint.answers.answer import Answer, Compared, align

_MARKERS = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n"})
"""What vocabularies write for a space and a line's end."""

Stream = tuple[tuple[int, ...], tuple[str, ...]]


class FirstNames:
    """Completions as ids and texts, under the names that their tokens had at first.

    `Witness.names_digest` tells answers with other names apart all the same.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], list[tuple[list[str], Stream]]] = {}

    def stream(self, answer: Answer, compared: Compared) -> Stream:
        """`Answer.stream`, or that of an earlier answer that names the same tokens otherwise."""
        stream = answer.stream(compared)
        if compared != "logprob tokens":
            return stream
        known = self._known.setdefault((answer.text, len(answer.names)), [])
        for names, first in known:
            if names == answer.names or _are_renamed(names, answer.names, answer.text):
                return first
        known.append((answer.names, stream))
        return stream


def _are_renamed(a: list[str], b: list[str], text: str) -> bool:
    """Are two lists of equal length names in two styles, neither of which contradicts the other?

    Servers name a token by its text, as their vocabulary does, or by its number. Where both spell
    a token out they have to agree: else the same text was cut otherwise.
    """
    is_other_style = False
    for x, y, (piece_x, is_spelled_x), (piece_y, is_spelled_y) in zip(
        a, b, _spell(a, text), _spell(b, text), strict=True
    ):
        if is_spelled_x and is_spelled_y and piece_x != piece_y:
            return False
        is_other_style |= is_spelled_x != is_spelled_y or (x != y and piece_x == piece_y)
    return is_other_style


def _spell(names: list[str], text: str) -> list[tuple[str, bool]]:
    """What each name says without its markers, and whether that is its part of the text."""
    pieces = [_as_bytes(name) for name in names]
    parts = align(_as_bytes(text), pieces)
    return [(p, bool(p) and p == part) for p, part in zip(pieces, parts, strict=True)]


def _as_bytes(text: str) -> str:
    """A character for each byte: a token may be a part of a character."""
    text = text.translate(_MARKERS)
    try:
        return text.encode("utf-8", "surrogateescape").decode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass").decode("latin-1")
