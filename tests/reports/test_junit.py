"""JUnit XML keeps to its schema whatever the run holds."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import xmlschema

from ndcheck.judging.rules import GateVerdict, RuleSet, Ruling, judge_gate
from ndcheck.judging.verdict import Verdict
from ndcheck.reports.gate import CheckResult, gate_markdown, github_annotations
from ndcheck.reports.junit import junit_xml

SCHEMA = xmlschema.XMLSchema(Path(__file__).parent / "junit.xsd")
HOSTILE = "\x1b[31m <b>&\u202e\ud800 \x00 \ufffe ]]> a|b\n::error::x"


def result_of(example, name="check"):
    verdict = judge_gate(example.run, example.summary, RuleSet())
    return CheckResult(name, "ndcheck run", "runs/a", example.run.started_at, 1.5, verdict)


@pytest.mark.parametrize(
    "example", ["failing", "two_arms", "passing", "inconclusive", "empty", "all_errors", "hostile"]
)
@pytest.mark.parametrize("wish", ["exit-3", "pass", "fail"])
def test_every_run_gives_a_valid_document(example, wish, request):
    found = request.getfixturevalue(example)
    failed = CheckResult("failed", "ndcheck run", error="the model is gone")
    text = junit_xml([result_of(found), failed], wish)
    SCHEMA.validate(text)
    suite, other = ET.fromstring(text)
    verdict = judge_gate(found.run, found.summary, RuleSet())
    assert int(suite.get("tests")) == len(verdict.rulings)
    n_failing = sum(r.verdict.outcome == "FAIL" for r in verdict.rulings)
    n_open = sum(r.verdict.outcome == "INCONCLUSIVE" for r in verdict.rulings)
    extra = {"exit-3": (0, n_open, 0), "fail": (n_open, 0, 0), "pass": (0, 0, n_open)}
    assert tuple(int(suite.get(n)) for n in ("failures", "errors", "skipped")) == tuple(
        a + b for a, b in zip((n_failing, 0, 0), extra[wish], strict=True)
    )
    assert other.get("errors") == "1"


def test_hostile_text_stays_text():
    ruling = Ruling("max_unique", "stock", HOSTILE, None, Verdict("FAIL", (HOSTILE,)))
    result = CheckResult(HOSTILE, HOSTILE, verdict=GateVerdict("FAIL", (ruling,)))
    text = junit_xml([result])
    SCHEMA.validate(text)
    (failure,) = ET.fromstring(text).iter("failure")
    assert "<b>&\\u202e\\ud800 \\x00 \\ufffe ]]> a|b" in failure.text
    (line,) = github_annotations([result])
    assert line.startswith("::error title=ndcheck FAIL%3A ")
    assert line.count("\n") == 0
    assert not {"\x1b", "\u202e", "\x00"} & set(gate_markdown([result]))


def test_the_schema_refuses_what_is_not_junit():
    text = junit_xml([CheckResult("a", "ndcheck run", error="gone")])
    SCHEMA.validate(text)
    for before, after in (
        ("testsuites", "suites"),
        ('errors="1"', 'errors="one"'),
        ('message="gone"', ""),
        ("error ", "broken "),
        ("testcase", "case"),
    ):
        broken = text.replace(before, after).replace(
            "</error>", "</broken>" if "broken" in after else "</error>"
        )
        ET.fromstring(broken)
        with pytest.raises(xmlschema.XMLSchemaException):
            SCHEMA.validate(broken)
