from __future__ import annotations

import base64
import hashlib
import json
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ndcheck.reports.figures import gather
from ndcheck.reports.html.page import SCRIPTS, TEMPLATE, html_report
from ndcheck.request import DEFAULTS
from ndcheck.storage.explanation import save_explanation

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
VOID = {"meta", "link", "br", "rect"}


class Page(HTMLParser):
    """What a parser that knows nothing of ndcheck sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
            if tag in ("script", "style"):
                self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.texts[self._open[-1]][-1] += data
        else:
            self.texts.setdefault("", []).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts[""]).split())

    @property
    def data(self):
        return json.loads(self.texts["script"][0])


def render(example) -> str:
    return html_report(example, gather(example), DEFAULTS)


def test_what_a_trace_advises_is_shown_as_text(failing, tmp_path) -> None:
    assert "Explanation" not in render(failing)
    advice = ["linear <b>in</b> lm_head\x1b[31m follows the batch size"]
    save_explanation(tmp_path, 7, {102: advice})
    text = render(replace(failing, directory=tmp_path))
    assert "<h2>Explanation</h2>" in text
    assert "linear &lt;b&gt;in&lt;/b&gt; lm_head" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_text_from_outside_adds_no_element_and_no_attribute(name, request) -> None:
    text = render(request.getfixturevalue(name))
    text.encode("utf-8")
    assert not {"\x1b", "\x00", "\u202e"} & set(text)
    page = Page(text)
    known = {"policy", "content", "name", "http-equiv", "charset", "lang", "class", "id", "href"}
    known |= {"rel", "role", "tabindex", "type", "scope", "title", "value", "open", "width"}
    known |= {"height", "viewbox", "preserveaspectratio"}
    for _, attributes in page.elements:
        for attribute in attributes:
            assert attribute in known or attribute.startswith(("data-", "aria-")), attribute
    assert [tag for tag, _ in page.elements].count("script") == 1 + len(SCRIPTS)
    assert not {"img", "iframe", "object", "form", "base"} & {tag for tag, _ in page.elements}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_policy_allows_these_scripts_and_nothing_else(name, request) -> None:
    page = Page(render(request.getfixturevalue(name)))
    (policy,) = (a["content"] for t, a in page.elements if a.get("http-equiv"))
    for kind, texts in (
        ("script-src", page.texts["script"][1:]),
        ("style-src", page.texts["style"]),
    ):
        (sources,) = re.findall(f"{kind} ([^;]*)", policy)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        assert sources.split() == [f"'sha256-{base64.b64encode(d).decode()}'" for d in digests]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    links = [a.get("href") or a.get("src") for _, a in page.elements]
    assert {link for link in links if link} == {"data:,"}


def test_vendored_files_bring_their_licence_into_the_page(failing) -> None:
    page = render(failing)
    licences = list(TEMPLATE.glob("vendor/*.LICENSE"))
    assert len(licences) == 2
    for licence in licences:
        assert licence.read_text(encoding="utf-8").strip() in page


def test_every_file_of_the_page_is_packaged() -> None:
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["ndcheck"]
    packaged = {path for pattern in patterns for path in (root / "ndcheck").glob(pattern)}
    files = {path for path in TEMPLATE.rglob("*") if path.is_file()}
    assert len(files) == 10
    assert files <= packaged


def test_every_section_is_there(two_arms) -> None:
    text = Page(render(two_arms)).text
    for expected in (
        "FAIL The output depends on the load",
        "9 of 28 loads diverged (32.1 %, 95 % CI 0.345-1.57 %)",
        "ndcheck report DIR --html",
        "At token 103",
        "' Queens, New York,",
        "102 tokens in common",
        "1.04 x",
        "What it does not",
        "Anything on other hardware",
        "AMD EPYC 7763",
        "p = 0.0012",
    ):
        assert expected in text, expected


def test_of_several_probes_a_worst_one_is_open(hostile) -> None:
    probes = [a for tag, a in Page(render(hostile)).elements if a.get("class") == "probe"]
    outcomes = [verdict.verdict.outcome for verdict in hostile.judgement.probes]
    worst = outcomes.index(hostile.judgement.verdict.outcome)
    assert ["open" in attributes for attributes in probes] == [i == worst for i in range(2)]


def test_equal_tokens_with_other_bits_are_not_called_a_dependence_of_output(latent_only) -> None:
    text = Page(render(latent_only)).text
    assert "FAIL Equal tokens, but not equal bits" in text
    assert "The output depends" not in text


def decode(arm, vocabulary) -> list[str]:
    """Completions as the page's script decodes them."""
    stream = iter(base64.b64decode(arm["tokens"]))

    def number() -> int:
        value = shift = 0
        while True:
            byte = next(stream)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    found: list[list[int]] = []
    for trunk in arm["trunks"][: arm["n_with_tokens"]]:
        own = [number() for _ in range(trunk["end"] - trunk["start"])]
        parent = trunk["parent"]
        found.append((found[parent][: trunk["start"]] if parent >= 0 else []) + own)
    assert next(stream, None) is None
    return ["".join(vocabulary[token] for token in tokens) for tokens in found]


@pytest.mark.parametrize("name", ["failing", "two_arms", "many"])
def test_the_embedded_completions_are_the_runs(name, request) -> None:
    example = request.getfixturevalue(name)
    data = Page(render(example)).data
    for arm, probe in zip(data["probes"][0]["arms"], example.summary.probes, strict=True):
        texts = decode(arm, data["vocabulary"])
        ids = [trunk["completion"] for trunk in arm["trunks"]]
        assert sorted(ids) == [completion.completion_id for completion in probe.completions]
        assert texts == [probe.completions[i - 1].text for i in ids]
        counts = [arm["trunks"][row["trunk"]]["count"] for row in arm["rows"]]
        assert len(counts) == probe.n_samples


def test_a_run_of_a_thousand_by_a_thousand_stays_below_5_mb(big) -> None:
    page = render(big)
    assert len(page.encode()) < 5_000_000
    data = Page(page).data
    (arm,) = data["probes"][0]["arms"]
    assert arm["n_with_tokens"] == len(arm["trunks"]) == 1000
    assert len(arm["rows"]) == 1000
