from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from ndcheck.reports.document import METRIC_NAMES
from ndcheck.reports.markdown import METRIC_MEANINGS, markdown_report
from ndcheck.request import DEFAULTS

EXAMPLES = [
    "failing",
    "two_arms",
    "passing",
    "inconclusive",
    "empty",
    "all_errors",
    "many",
    "hostile",
]


def render(example) -> str:
    return markdown_report(example, DEFAULTS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_structure_does_not_depend_on_the_text(name, request) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(render(request.getfixturevalue(name)))
    assert not any(token.type.startswith("html") for token in tokens)
    inline = {child.type for token in tokens for child in token.children or ()}
    assert inline <= {
        "text",
        "text_special",
        "strong_open",
        "strong_close",
        "code_inline",
        "softbreak",
    }
    headers = cells = 0
    for token in tokens:
        if token.type == "tr_open":
            cells = 0
        elif token.type == "th_open":
            cells = headers = cells + 1
        elif token.type == "td_open":
            cells += 1
        elif token.type == "tr_close":
            assert cells == headers


def test_it_leads_with_the_verdict_and_the_command(failing) -> None:
    lines = render(failing).splitlines()
    assert lines[0] == "# ndcheck: FAIL"
    assert lines[2] == "- **FAIL** 8 of 1000 loads diverged (0.8 %, 95 % CI 0.345-1.57 %)"
    assert "ndcheck run --loads 1,2,4,8,16,32 -n 1000 --kernels stock" in lines[:24]


def test_claims_are_ranked_and_bounded(two_arms, empty) -> None:
    report = render(two_arms)
    claims = report.partition("## Claims")[2].partition("Not claimed:")[0].strip().splitlines()
    assert claims == [
        "- invariant: equal tokens and equal bits across these loads: 0 of 28 loads diverged; "
        "rate < 12.4 % at 95 % for this distribution of loads.",
        "- stock: output depends on the load: 9 of 28 loads diverged from the commonest "
        "completion of the probe alone; for this distribution of loads the rate is in 0.345-1.57 % "
        "at 95 %.",
    ]
    assert "- Anything on other hardware" in report
    assert "- None: nothing was measured." in render(empty)


def test_metrics_have_their_published_names(failing) -> None:
    report = render(failing)
    assert set(METRIC_MEANINGS) == set(METRIC_NAMES.values())
    assert "| `Div_Index` | 102 |" in report
    assert "| `TARa@N` | unknown |" in report
    assert "| modal share | 992 of 1000 |" in report


def test_many_completions_are_cut(many) -> None:
    assert "and 60 more in `completions.csv`." in render(many)
