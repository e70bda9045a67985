"""The report of a run as one HTML file: no network, no outside file, readable without scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ndcheck.findings import Findings
from ndcheck.judging.verdict import NOT_TOLD_APART
from ndcheck.records import AXES, Arm, Run, RunSpec
from ndcheck.reports.document import published
from ndcheck.reports.figures import ArmFigures
from ndcheck.reports.html.data import make_data
from ndcheck.reports.html.views import load_matrix, make_views
from ndcheck.reports.markdown import METRIC_MEANINGS
from ndcheck.reports.trees.trunks import walk
from ndcheck.reports.untrusted import quoted, quoted_tail, visible, without_controls
from ndcheck.reports.wording import phrases
from ndcheck.reports.wording.claims import claims, exclusions
from ndcheck.reports.wording.remedies import remedies
from ndcheck.reports.wording.reproduction import PROMPTS_FILE, prompts_file, wrapped_command

TEMPLATE = Path(__file__).parent / "template"
SCRIPTS = ("vendor/uPlot.iife.min.js", "vendor/diff.min.js", "charts.js", "strip.js", "compare.js")
STYLES = ("vendor/uPlot.min.css", "report.css")
COMMAND_WIDTH = 88


def html_report(
    findings: Findings, figures: Mapping[tuple[Arm, str], ArmFigures], defaults: RunSpec
) -> str:
    """The whole page; a function of its arguments alone, so it renders to the same bytes.

    ``figures`` are what `ndcheck.reports.figures.gather` finds.
    """
    run, judgement = findings.run, findings.judgement
    unit = phrases.unit(run)
    probes = make_views(findings, figures)
    scripts = [Markup(_asset(name)) for name in SCRIPTS]
    styles = [Markup(_asset(name)) for name in STYLES]
    page = _environment().get_template("report.html.jinja")
    return page.render(
        run=run,
        summary=findings.summary,
        judgement=judgement,
        unit=unit,
        headline=_headline(findings),
        shortfall=phrases.shortfall(run, findings.summary),
        probes=probes,
        multiple=len(probes) > 1,
        worst_probe=next((p for p in probes if p.outcome == judgement.verdict.outcome), None),
        command_lines=wrapped_command(run.spec, defaults, COMMAND_WIDTH),
        prompts_file=PROMPTS_FILE if prompts_file(run.spec, defaults) else None,
        remedies=remedies(findings, defaults, "", COMMAND_WIDTH),
        advice=findings.advice,
        claims=claims(findings, visible, findings.summary.probes),
        exclusions=exclusions(run),
        environment=_facts(run),
        policy=_policy(scripts, styles),
        scripts=scripts,
        styles=styles,
        data=Markup(_json(make_data(probes, unit))),
    )


@cache  # Its templates take longer to compile than a page takes to write.
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_controls,
    )
    environment.globals["phrases"] = phrases
    environment.globals["axes"] = AXES
    environment.globals["not_told_apart"] = NOT_TOLD_APART
    environment.globals["meanings"] = METRIC_MEANINGS
    environment.filters |= {
        "load_matrix": load_matrix,
        "published": published,
        "quoted": quoted,
        "quoted_tail": quoted_tail,
        "token": phrases.token,
        "tree_size": lambda trunk: sum(1 for _ in walk(trunk)),
        "visible": visible,
    }
    return environment


def _without_controls(value: object) -> object:
    """Applied to whatever the template prints: a rule that no template can forget."""
    return without_controls(value) if type(value) is str else value


def _headline(findings: Findings) -> str:
    summary, outcome = findings.summary, findings.judgement.verdict.outcome
    if outcome == "PASS":
        return "No divergence under these loads"
    if outcome == "INCONCLUSIVE":
        return "Not enough evidence"
    if any(probe.has_diverged for probe in summary.probes):
        is_of_load = any(finding.told_apart for p in summary.probes for finding in p.axes)
        return "The output depends on the load" if is_of_load else "The output is not repeatable"
    return "Equal tokens, but not equal bits"


def _asset(name: str) -> str:
    """A vendored file carries its licence into the page."""
    text = (TEMPLATE / name).read_text(encoding="utf-8").strip()
    licence = TEMPLATE / f"{name.partition('.')[0]}.LICENSE"
    if not licence.is_file():
        return text
    return f"/*!\n{licence.read_text(encoding='utf-8').strip()}\n*/\n{text}"


def _policy(scripts: list[Markup], styles: list[Markup]) -> str:
    """Only these very scripts and styles run, and nothing is loaded from anywhere."""
    return (
        f"default-src 'none'; img-src data:; script-src {_digests(scripts)}; "
        f"style-src {_digests(styles)}; base-uri 'none'; form-action 'none'"
    )


def _digests(texts: list[Markup]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


def _facts(run: Run) -> dict[str, list[tuple[str, str]]]:
    where = run.environment
    groups = {
        "Model": where.model,
        "Hardware": where.hardware,
        "Software": {"ndcheck": run.ndcheck_version, **where.software},
        "Numeric flags": where.numeric_flags,
        "Run": {"id": run.run_id, "started": run.started_at, "seconds": f"{run.elapsed_s:.1f}"},
    }
    return {
        group: [(name, visible(str(value))) for name, value in facts.items() if value is not None]
        for group, facts in groups.items()
    }


def _json(value: Any) -> str:
    """JSON that no character in it can lead out of its script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
