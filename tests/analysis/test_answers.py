"""Answers: the right values are json's, decimal's and those of people who read the completions."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.analysis.answers import PARSERS, expected_answer
from ndcheck.records import Probe
from ndcheck.reports.wording.answers import accuracies

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(), JSON), st.booleans())
def test_the_last_object_is_found_in_its_text(value, fenced):
    shown = json.dumps(value, indent=1 if fenced else None)
    text = f"First [1], then {{not json}}:\n{'```json' * fenced}\n{shown}\n{'```' * fenced} done."
    assert json.loads(PARSERS["json"](text)) == value
    swapped = json.dumps(dict(reversed(value.items())))
    assert PARSERS["json"](swapped) == PARSERS["json"](text)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.booleans())
def test_the_last_number_is_found_in_its_text(value, grouped):
    shown = f"{value:,f}" if grouped else f"{value:f}"
    found = PARSERS["number"](f"Of 12 apples, 7 are red. The answer is {shown}.")
    assert Decimal(found) == value
    assert found == PARSERS["number"](f"{value:f}000")


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("number", r"so \boxed{-1,234.50} of 99", "-1234.5"),
        ("number", "10-3 = 7", "7"),
        ("number", "10-3", "3"),
        ("number", "$1,000.00", "1000"),
        ("number", "about .5", "0.5"),
        ("number", "-0", "0"),
        ("number", "none at all", None),
        ("number", "a fall of \u22125", "-5"),
        ("number", "a loss of -$20", "-20"),
        ("number", "sides 3,4,5", "5"),
        ("number", "1,00,000 rupees", "100000"),
        ("number", r"\boxed{1{,}234{,}567}", "1234567"),
        ("number", "1\u202f000 or 1\\,000", "1000"),
        ("number", r"\boxed{-\frac{1}{2}}, checked in 3 ways", "-0.5"),
        ("number", r"\boxed{\frac{2}{6}} is 1/3", "1/3"),
        ("number", "1/0", "1/0"),
        ("number", "on 12/25/2024", "2024"),
        ("number", "9" * 5000 + "/7", "7"),
        ("json", "no { json } here", None),
        ("json", "[3, 1]", "[3, 1]"),
        ("json", "[" * 5000, None),
        ("json", "[" * 1200 + "]" * 1200, None),
        ("json", r'{"a": "\ud800"}', r'{"a": "\ud800"}'),
        ("choice", "A man has a dog. The answer is (B).", "B"),
        ("choice", "The correct answer: **C**", "C"),
        ("choice", "Option A is wrong, so I choose option D", "D"),
        ("choice", r"Answer is B, no: \boxed{E}", "E"),
        ("choice", "B. Because it is.", "B"),
        ("choice", " c)\n(D) ", "D"),
        ("choice", "I think\nF\n", "F"),
        ("choice", "A man walks", None),
        ("choice", "The answer is C. Option A is wrong.", "C"),
        ("choice", "Answer: I don't know", None),
        ("choice", "Answer: I", "I"),
        ("choice", "Washington, D.C.", None),
        ("choice", r"\boxed{\text{B}}. A. is close", "B"),
        ("choice", r"The answer is $\text{(B)}$, not A.", "B"),
        ("code", "Here:\n```python\nx = 1  \n```\nand\n```\ny = 2\n```", "y = 2"),
        ("code", "```py\nx = 1\nprint(", "x = 1\nprint("),
        ("code", "x = 1 \n", "x = 1"),
        # As CommonMark has fences: code in a line is none, and a longer one holds shorter ones.
        ("code", "Use ```x``` so:\n```python\ny = 1\n```", "y = 1"),
        ("code", "````md\n```py\nx\n```\n````", "```py\nx\n```"),
        ("code", "~~~py\nx\n~~~", "x"),
        ("code", "```py\nx = '```'\ny\n```", "x = '```'\ny"),
        ("code", "So: ```py\nx = 1```\nDone.", "x = 1"),
        ("code", "\n", None),
    ],
)
def test_what_is_found_in_a_completion(kind, text, answer):
    assert PARSERS[kind](text) == answer


@pytest.mark.parametrize(
    ("kind", "given_answer", "answer"),
    [
        ("number", "6 x 7 = <<6*7=42>>42\n#### 42", "42"),
        ("number", "1,000", "1000"),
        ("choice", "2", "C"),
        ("choice", "B", "B"),
        ("json", '{"b": 1, "a": 2}', '{"a": 2, "b": 1}'),
    ],
)
def test_what_a_file_gives_is_in_the_form_that_is_found(kind, given_answer, answer):
    assert expected_answer(given_answer, kind, PARSERS[kind]) == answer


def test_tokens_may_flip_where_the_answer_does_not(build):
    samples = [
        build.reference("so=1"),
        build.sample(1, "so=1"),
        build.sample(2, "is=1"),  # other tokens, the same answer
        build.sample(3, "so=2"),  # another answer
        build.sample(4, "none"),  # no answer at all
    ]
    probe = Probe("p1", "x", answer="1")
    found = build.probe(samples, answer="number", probes=(probe,))
    assert found.diverged_trials == 3
    assert found.answers.flipped_trials == 2
    assert (found.answers.n_unique, found.answers.n_without) == (3, 1)
    assert found.answers.n_correct == 3
    assert found.metrics.tar_a == 0
    assert sum(load.answer_flips for load in found.loads) == 2
    assert sum(load.n_diverged_trials for load in found.loads) == 3
    right = accuracies([found])
    assert sum(each.n_right for each in right) == 3
    assert sum(each.n_samples for each in right) == 5
    assert build.probe(samples, probes=(probe,)).answers is None


def test_one_answer_in_other_words_agrees(build):
    samples = [build.reference("so=1"), build.sample(1, "it=1")]
    found = build.probe(samples, answer="number")
    assert (found.metrics.tar_r, found.metrics.tar_a) == (0, 1)
    assert found.answers.flipped_trials == 0
    assert found.answers.n_correct is None
    assert accuracies([found]) == []
