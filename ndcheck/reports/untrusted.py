"""Text from prompts, models and servers, made safe to show: it stays text wherever it lands.

The exact text is in ``samples.jsonl``; everything here is for display and spreadsheets.
"""

from __future__ import annotations

import re

from rich.cells import cell_len

# C0 and C1 controls except tab and line ends, text-direction controls, and lone surrogates.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# A spreadsheet runs a cell as a formula if its first visible character is one of these; it strips
# white space first, and takes the full-width forms for the ASCII ones.
_FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\r]")
_NOT_XML = re.compile("[\ufffe\uffff]")
_PIPE = re.compile(r"(\\*)\|")
# GitHub's runner obeys a line that begins with ::, after white space, and ##[ wherever it stands.
_WORKFLOW_COMMAND = re.compile(r"^\s*:(?=:)|##(?=\[)", re.MULTILINE)
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&#!$])")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _visible(character: str) -> str:
    return character if character.isprintable() else _escape(character)


def visible(text: str) -> str:
    """On one line, with every character spelt out that would act on a terminal or not show."""
    return text if text.isprintable() else "".join(map(_visible, text))


def without_controls(text: str) -> str:
    """Several lines, with control characters spelt out and everything else as it is."""
    # Most text is printable, and asking is ten times faster than searching.
    return text if text.isprintable() else _CONTROLS.sub(lambda match: _escape(match[0]), text)


def quoted(text: str, width: int) -> str:
    """As a Python string literal, its end cut off if it needs more than ``width`` terminal cells.

    Backslashes are doubled, so that a line feed and a backslash before an n differ.
    """
    kept = _fitting(text, width - 2)
    return f"'{''.join(kept)}'" + ("…" if len(kept) < len(text) else "")


def quoted_tail(text: str, width: int) -> str:
    """The same with the start cut off."""
    kept = _fitting(text[::-1], width - 2)[::-1]
    return ("…" if len(kept) < len(text) else "") + f"'{''.join(kept)}'"


def _fitting(text: str, width: int) -> list[str]:
    """The first characters, escaped, that fit; one cell is left for the ellipsis if not all do."""
    pieces: list[str] = []
    used = 0
    for character in text[: width + 1]:
        piece = "\\\\" if character == "\\" else _visible(character)
        # A zero-width mark counts as one cell, so that a pile of them is bounded too.
        cells = max(1, cell_len(piece))
        if used + cells > width:
            break
        pieces.append(piece)
        used += cells
    while pieces and len(pieces) < len(text) and used > width - 1:
        used -= max(1, cell_len(pieces.pop()))
    return pieces


def code_span(text: str) -> str:
    """A Markdown code span that the text cannot close."""
    shown = visible(text)
    fence = "`" * (_longest_run_of_backticks(shown) + 1)
    # Markdown strips one space from each side, which keeps the text's own backticks apart; it does
    # so to the text's own spaces too.
    loses_spaces = shown.startswith(" ") and shown.endswith(" ") and shown.strip(" ")
    padding = " " if "`" in shown or loses_spaces else ""
    return f"{fence}{padding}{shown}{padding}{fence}"


def code_cell(text: str) -> str:
    """A code span inside a table cell, where an even number of backslashes escapes no pipe."""
    return _PIPE.sub(lambda match: match[1] * 2 + r"\|", code_span(text)) if text else ""


def code_block(text: str, language: str = "") -> str:
    """A Markdown code block that the text cannot close; line ends and backslashes are kept."""
    shown = without_controls(text)
    fence = "`" * max(3, _longest_run_of_backticks(shown) + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def markdown_text(text: str) -> str:
    """Running Markdown text on one line, with no markup in it."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def csv_text(text: str) -> str:
    """A cell of a text column: an apostrophe in front keeps a spreadsheet from running it."""
    shown = without_controls(text)
    return f"'{shown}" if _FORMULA.match(shown) else shown


def without_workflow_commands(text: str) -> str:
    """Lines that GitHub's runner shows as they are, but for a space within what it would obey."""
    return _WORKFLOW_COMMAND.sub(r"\g<0> ", text)


def xml_text(text: str) -> str:
    """Text that XML 1.0 can hold: what it forbids even as a reference is spelt out."""
    return _NOT_XML.sub(lambda match: _escape(match[0]), without_controls(text))
