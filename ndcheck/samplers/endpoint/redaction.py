"""Secrets that a server repeats, in whichever form, are cut out before anything else sees them."""

from __future__ import annotations

import base64
import binascii
import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

MASK = "[secret]"
_BASE64_WORD = re.compile(r"[0-9A-Za-z+/_-]{4,}")
_SECRET_HEADER = re.compile("auth|key|token|secret|password|cookie|session", re.IGNORECASE)
_STANDARD_BASE64 = str.maketrans("-_", "+/")
SHORTEST_UNBOUNDED = 6
"""A shorter secret occurs in other words by chance: it is cut out where it stands alone, and not
from numbers, which are counts and ids of tokens."""


_CREDENTIALS = re.compile(r"//[^/\s]*@")


def without_credentials(text: str, instead: str = "") -> str:
    """``text`` with ``instead`` for the user and the password in its addresses; they may hold @."""
    return _CREDENTIALS.sub(f"//{instead}", text)


class Redactor:
    """Knows the values of the headers that are sent: as they are, in parts, and encoded.

    Of a header whose name speaks of no secret only a value that is not short counts, as a whole.

    Any character may stand for itself, percent-encoded, as a JSON, Python or HTML escape; the
    whole also in base64, at each place that it can have in a longer encoded text.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        secrets = {secret for item in headers.items() for secret in _secrets_of(*item)}
        encoded = {form for secret in secrets for form in _base64_forms(secret)}
        forms = sorted(secrets | encoded, key=len, reverse=True)
        self._plain = [form for form in forms if len(form) >= SHORTEST_UNBOUNDED]
        self._is_only_plain = len(self._plain) == len(forms)
        self._pattern = re.compile("|".join(map(_pattern, forms)), re.I) if forms else None
        self._is_short = any(len(secret) < SHORTEST_UNBOUNDED for secret in secrets)

    def finds(self, text: str) -> bool:
        """Does ``text`` hold a secret? Made to be quick where it does not."""
        if self._pattern is None:
            return False
        if self._is_only_plain and not any(mark in text for mark in "%&\\"):
            folded = text.lower()
            return any(form.lower() in folded for form in self._plain)
        return self.redact(text) != text

    def redact(self, text: str) -> str:
        """``text`` with every secret replaced."""
        if self._pattern is None:
            return text
        if self._is_short:
            text = _BASE64_WORD.sub(self._redact_encoded, text)
        return self._pattern.sub(MASK, text)

    def _redact_encoded(self, word: re.Match[str]) -> str:
        """The word, unless it is base64 of something that holds a secret."""
        found = word.group().translate(_STANDARD_BASE64)
        try:
            content = base64.b64decode(found + "=" * (-len(found) % 4), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return word.group()
        is_secret = self._pattern is not None and self._pattern.search(content)
        return MASK if is_secret else word.group()

    def redact_value(self, value: Any) -> Any:
        """A JSON value with every secret replaced, in names of fields too."""
        if isinstance(value, str):
            return self.redact(value)
        if isinstance(value, list):
            return [self.redact_value(item) for item in value]
        if isinstance(value, dict):
            return {self.redact(name): self.redact_value(item) for name, item in value.items()}
        is_number = isinstance(value, (int, float)) and len(str(value)) >= SHORTEST_UNBOUNDED
        return MASK if is_number and self.finds(str(value)) else value

    def redact_pieces(self, pieces: list[str]) -> list[str]:
        """As many pieces, without the secrets that only show where these are joined."""
        text = "".join(pieces)
        if self._pattern is None or not self.finds(text):
            return pieces
        spans = [match.span() for match in self._pattern.finditer(text)]
        redacted, start = [], 0
        for piece in pieces:
            end, kept, at = start + len(piece), "", start
            for low, high in spans:
                if high <= start or low >= end:
                    continue
                kept += text[at : max(at, low)] + (MASK if low >= start else "")
                at = min(high, end)
            redacted.append(kept + text[at:end])
            start = end
        return redacted


def _secrets_of(name: str, value: str) -> Iterable[str]:
    """What is to be cut out of answers: of a header like X-Title: My App not every App."""
    if _SECRET_HEADER.search(name):
        return _parts_of(value)
    return [value] if len(value) >= SHORTEST_UNBOUNDED else []


def _parts_of(value: str) -> Iterable[str]:
    """The value, its words but for the scheme ("Bearer"), and what Basic holds."""
    scheme, _, rest = value.partition(" ")
    words = value.split()
    if rest and scheme.isalpha():
        words = rest.split()
        yield rest
    yield value
    yield from words
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(rest, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return
        yield pair
        yield pair.partition(":")[2] or pair


def _base64_forms(secret: str) -> Iterable[str]:
    """The characters of base64 that depend on nothing but the secret, at its three alignments."""
    content = secret.encode()
    yield base64.b64encode(content).decode()
    yield base64.urlsafe_b64encode(content).decode().rstrip("=")
    for n_before in range(3):
        encoded = base64.b64encode(bytes(n_before) + content).decode().rstrip("=")
        n_bits = 8 * (n_before + len(content))
        stable = encoded[-(-8 * n_before // 6) : n_bits // 6]
        if len(stable) >= SHORTEST_UNBOUNDED:
            yield stable
            yield stable.translate(str.maketrans("+/", "-_"))


def _pattern(form: str) -> str:
    pattern = "".join(map(_character, form))
    if len(form) >= SHORTEST_UNBOUNDED:
        return pattern
    return rf"(?<![0-9A-Za-z]){pattern}(?![0-9A-Za-z])"


def _character(character: str) -> str:
    code = ord(character)
    forms = [
        re.escape(character),
        rf"%(?:25)?{code:02x}",
        rf"\\+u{code:04x}",
        rf"\\+x{code:02x}",
        f"&#0*{code};",
        f"&#x0*{code:x};",
    ]
    if not character.isalnum():
        forms += [rf"\\+{re.escape(character)}", re.escape(html.escape(character))]
    if character == " ":
        forms.append(re.escape("+"))
    return f"(?:{'|'.join(forms)})"
