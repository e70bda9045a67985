from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.cells import cell_len

from ndcheck.reports.untrusted import (
    code_block,
    code_cell,
    code_span,
    csv_text,
    markdown_text,
    quoted,
    quoted_tail,
    visible,
)

MARKDOWN = MarkdownIt("commonmark").enable("table")
any_text = st.text(alphabet=st.characters(codec=None), max_size=60)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\tc\rd\0", r"a\nb\tc\rd\x00"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
        ("\u200b\xa0\u3000", r"\u200b\xa0\u3000"),
        ("\ud800", r"\ud800"),
        ("[red]日本[/red] 🧪 é", "[red]日本[/red] 🧪 é"),
    ],
)
def test_visible_spells_out_what_acts_or_hides(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


@given(any_text)
def test_visible_is_one_printable_line(text: str) -> None:
    assert visible(text).isprintable()


@given(any_text, st.integers(4, 30))
def test_quoted_fits(text: str, width: int) -> None:
    for shown in (quoted(text, width), quoted_tail(text, width)):
        assert shown.isprintable()
        assert cell_len(shown) <= width
        assert len(shown) <= 2 * width


def test_quoted_keeps_the_start_and_quoted_tail_the_end() -> None:
    assert quoted("abcdef", 8) == "'abcdef'"
    assert quoted("abcdef", 6) == "'abc'…"
    assert quoted_tail("abcdef", 6) == "…'def'"
    assert quoted("日本語", 6) == "'日'…"
    assert quoted("ab\x1bc", 7) == "'ab'…"


def test_a_line_feed_and_a_backslash_n_differ() -> None:
    assert quoted("\n", 9) == r"'\n'"
    assert quoted(r"\n", 9) == r"'\\n'"


def test_a_pile_of_zero_width_marks_is_bounded() -> None:
    assert len(quoted("e" + "\u0301" * 1000, 20)) <= 20


@given(any_text)
@example(" 0 ")
def test_code_spans_and_blocks_hold_the_text_in(text: str) -> None:
    block = MARKDOWN.parse(code_block(text))
    assert [token.type for token in block] == ["fence"]
    if visible(text).strip():
        (inline,) = MARKDOWN.parse(f"x{code_span(text)}x")[1:2]
        assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
        assert inline.children[1].content == visible(text)


@given(any_text)
def test_a_code_cell_stays_one_cell(text: str) -> None:
    tokens = MARKDOWN.parse(f"| a | b |\n| --- | --- |\n| {code_cell(text)} | end |\n")
    assert sum(token.type == "td_open" for token in tokens) == 2
    cells = [token for token in tokens if token.type == "inline"]
    assert cells[-1].content == "end"


@given(any_text)
def test_markdown_text_is_no_markup(text: str) -> None:
    tokens = MARKDOWN.parse(f"x {markdown_text(text)} x")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in tokens[1].children} <= {"text", "text_special"}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", " =", "\n=", "＝", "＠"])
def test_csv_text_neutralises_formulas(start: str) -> None:
    assert csv_text(f"{start}cmd()") == f"'{start}cmd()"


@pytest.mark.parametrize("text", ["", "a=1", "\nplain", "日本語 🧪", '"quoted"', "'", " a"])
def test_csv_text_leaves_other_text_alone(text: str) -> None:
    assert csv_text(text) == text


@given(any_text)
def test_csv_text_can_be_written_and_has_no_control_characters(text: str) -> None:
    shown = csv_text(text)
    shown.encode()
    assert not set(shown) & {"\0", "\x1b", "\x9b", "\x7f", "\u202e", "\u2066"}
