"""JUnit XML as Jenkins, GitLab and GitHub's actions read it: a suite per check, a case per rule."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from ndcheck.judging.rules import Ruling
from ndcheck.reports.gate import CheckResult, Inconclusive, subject
from ndcheck.reports.untrusted import xml_text

ELEMENTS: dict[Inconclusive, str] = {"exit-3": "error", "pass": "skipped", "fail": "failure"}


def junit_xml(results: Sequence[CheckResult], inconclusive: Inconclusive = "exit-3") -> str:
    """The whole document. An inconclusive rule is an error, or what ``inconclusive`` makes it."""
    root = ET.Element("testsuites", name="ndcheck")
    for result in results:
        suite = ET.SubElement(root, "testsuite", name=xml_text(result.name))
        properties = {"directory": result.directory, "command": result.command}
        listed = ET.SubElement(suite, "properties")
        for name, value in properties.items():
            ET.SubElement(listed, "property", name=name, value=xml_text(value))
        if result.verdict is None:
            case = _case(suite, result, "run")
            _outcome(case, "error", "backend", result.command, [str(result.error)])
        for ruling in result.verdict.rulings if result.verdict else ():
            case = _case(suite, result, _case_name(ruling))
            reasons = ruling.verdict.reasons
            if ruling.verdict.outcome == "FAIL":
                _outcome(case, "failure", ruling.rule, result.command, reasons)
            elif ruling.verdict.outcome == "INCONCLUSIVE":
                element = ELEMENTS[inconclusive]
                _outcome(case, element, "inconclusive", result.command, reasons)
            else:
                ET.SubElement(case, "system-out").text = xml_text("\n".join(reasons))
        _count(suite)
        suite.set("time", f"{result.elapsed_s:.3f}")
        if result.started_at:
            # Without the offset, which some schemas refuse; it is always UTC.
            suite.set("timestamp", result.started_at[: len("2026-11-24T08:06:20")])
    _count(root)
    root.set("time", f"{sum(result.elapsed_s for result in results):.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, "unicode") + "\n"


def _case(suite: ET.Element, result: CheckResult, name: str) -> ET.Element:
    names = {"classname": f"ndcheck.{xml_text(result.name)}", "name": xml_text(name)}
    return ET.SubElement(suite, "testcase", names, time="0")


def _case_name(ruling: Ruling) -> str:
    return " ".join(part for part in (ruling.axis or ruling.rule, subject(ruling)) if part)


def _outcome(
    case: ET.Element, element: str, kind: str, command: str, reasons: Sequence[str]
) -> None:
    found = ET.SubElement(case, element, message=xml_text(reasons[0]))
    if element != "skipped":
        found.set("type", kind)
    found.text = xml_text("\n".join([command, *reasons]))


def _count(element: ET.Element) -> None:
    element.set("tests", str(len(list(element.iter("testcase")))))
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        if name != "skipped" or element.tag == "testsuite":
            element.set(name, str(len(list(element.iter(tag)))))
