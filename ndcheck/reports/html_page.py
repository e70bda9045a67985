"""The report of a run as one HTML file: no network, no outside file, readable without scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ndcheck.analysis.summary import Completion, LoadFinding, Summary
from ndcheck.records import Arm, Run, RunSpec
from ndcheck.reports import phrases
from ndcheck.reports.claims import claims, exclusions
from ndcheck.reports.document import published
from ndcheck.reports.figures import ArmFigures, bins, histogram
from ndcheck.reports.markdown import METRIC_MEANINGS
from ndcheck.reports.remedies import remedies
from ndcheck.reports.reproduction import PROMPTS_FILE, prompts_file, wrapped_command
from ndcheck.reports.trunks import Trunk, find_trunk, walk
from ndcheck.reports.untrusted import quoted, quoted_tail, visible, without_controls
from ndcheck.verdict import Judgement, ProbeVerdict, Verdict, worst

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("vendor/uPlot.iife.min.js", "vendor/diff.min.js", "charts.js", "strip.js", "compare.js")
STYLES = ("vendor/uPlot.min.css", "report.css")
MAX_IN_TREE = 150
MAX_TOKENS = 1_200_000
"""Tokens embedded for the comparison of any two completions: about 3 bytes each."""
N_COLOURS = 7
COMMAND_WIDTH = 88


@dataclass(frozen=True, slots=True)
class ArmView:
    """One arm of one probe, as the template reads it."""

    index0: int
    arm: Arm
    figures: ArmFigures
    tree: Trunk | None
    colours: Mapping[int, int]
    """By completion: 0 the main trunk's, then 1 to N_COLOURS in turn."""
    verdict: Verdict
    axes: Mapping[str, Verdict]


@dataclass(frozen=True, slots=True)
class ProbeView:
    """One probe in all its arms."""

    index0: int
    probe_id: str
    prompt: str
    arms: tuple[ArmView, ...]

    @property
    def has_margins(self) -> bool:
        return any(arm.figures.reference_margins or arm.figures.forks for arm in self.arms)

    @property
    def outcome(self) -> str:
        return worst([arm.verdict.outcome for arm in self.arms])


def html_report(
    run: Run,
    figures: Mapping[tuple[Arm, str], ArmFigures],
    summary: Summary,
    judgement: Judgement,
    defaults: RunSpec,
) -> str:
    """The whole page; a function of its arguments alone, so it renders to the same bytes.

    ``figures`` are what `ndcheck.reports.figures.gather` finds.
    """
    probes = _probes(run, figures, judgement)
    scripts = [Markup(_asset(name)) for name in SCRIPTS]
    styles = [Markup(_asset(name)) for name in STYLES]
    page = _environment().get_template("report.html.jinja")
    return page.render(
        run=run,
        summary=summary,
        judgement=judgement,
        headline=_headline(summary, judgement),
        probes=probes,
        multiple=len(probes) > 1,
        worst_probe=next((p for p in probes if p.outcome == judgement.verdict.outcome), None),
        command_lines=wrapped_command(run.spec, defaults, COMMAND_WIDTH),
        prompts_file=PROMPTS_FILE if prompts_file(run.spec, defaults) else None,
        remedies=remedies(run, summary, judgement, defaults, "", COMMAND_WIDTH),
        claims=claims(summary, visible),
        exclusions=exclusions(run),
        environment=_facts(run),
        policy=_policy(scripts, styles),
        scripts=scripts,
        styles=styles,
        data=Markup(_json(_data(probes))),
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_controls,
    )
    environment.globals["phrases"] = phrases
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


def _headline(summary: Summary, judgement: Judgement) -> str:
    if judgement.verdict.outcome == "PASS":
        return "No divergence under these loads"
    if judgement.verdict.outcome == "INCONCLUSIVE":
        return "Not enough evidence"
    if any(probe.diverged_trials for probe in summary.probes):
        return "The output depends on the load"
    return "Equal tokens, but not equal bits"


def _asset(name: str) -> str:
    """A vendored file carries its licence into the page."""
    text = (PAGE / name).read_text(encoding="utf-8").strip()
    licence = PAGE / f"{name.partition('.')[0]}.LICENSE"
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


def _probes(
    run: Run, figures: Mapping[tuple[Arm, str], ArmFigures], judgement: Judgement
) -> list[ProbeView]:
    verdicts = {(verdict.arm, verdict.probe_id): verdict for verdict in judgement.probes}
    views: list[ProbeView] = []
    for probe in run.spec.probes:
        keys = [key for key in figures if key[1] == probe.probe_id]
        if keys:
            arms = tuple(_arm(i, figures[key], verdicts[key]) for i, key in enumerate(keys))
            views.append(ProbeView(len(views), probe.probe_id, probe.prompt, arms))
    return views


def _arm(index0: int, figures: ArmFigures, verdict: ProbeVerdict) -> ArmView:
    order = [trunk for trunk, _ in walk(figures.trunk)] if figures.trunk else []
    colours = {
        trunk.completion.completion_id: 1 + (i - 1) % N_COLOURS if i else 0
        for i, trunk in enumerate(order)
    }
    return ArmView(
        index0=index0,
        arm=figures.probe.arm,
        figures=figures,
        tree=find_trunk(figures.probe, MAX_IN_TREE),
        colours=colours,
        verdict=verdict.verdict,
        axes={str(axis): v for axis, v in verdict.axes.items()},
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """All loads of one kind and batch size."""

    n_unique: int
    n_samples: int
    n_diverged: int
    n_latent: int
    n_trials: int


def load_matrix(arm: ArmView) -> tuple[list[int], dict[str, list[Cell | None]]]:
    """Batch sizes, and for each kind of load one cell for each of them."""
    loads = arm.figures.probe.loads
    sizes = sorted({load.batch_size for load in loads})
    grouped: dict[str, dict[int, list[LoadFinding]]] = {}
    for load in loads:
        row = grouped.setdefault(phrases.load(load), {})
        row.setdefault(load.batch_size, []).append(load)
    unique = arm.figures.unique_by_load
    return sizes, {
        name: [_cell(row.get(size, ()), len(unique.get((name, size), ()))) for size in sizes]
        for name, row in grouped.items()
    }


def _cell(loads: Iterable[LoadFinding], n_unique: int) -> Cell | None:
    loads = list(loads)
    if not loads:
        return None
    return Cell(
        n_unique=n_unique,
        n_samples=sum(load.n_samples for load in loads),
        n_diverged=sum(load.n_diverged_trials for load in loads),
        n_latent=sum(load.latent for load in loads),
        n_trials=sum(load.n_trials for load in loads),
    )


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


def _data(probes: list[ProbeView]) -> dict[str, Any]:
    """What the scripts draw. Each token is stored once for each path that it is on."""
    arms = [arm for probe in probes for arm in probe.arms]
    budget = MAX_TOKENS // max(1, len(arms))
    stored = [_stored_trunks(arm, budget) for arm in arms]
    counts: Counter[tuple[int, str]] = Counter()
    for trunks, n_with_tokens in stored:
        for trunk, _ in trunks[:n_with_tokens]:
            counts.update(_own_tokens(trunk))
    ranks = {token: rank for rank, (token, _) in enumerate(counts.most_common())}
    codes = {token: _varint(rank) for token, rank in ranks.items()}
    of_arm = iter(
        _arm_data(arm, trunks, n_with_tokens, codes)
        for arm, (trunks, n_with_tokens) in zip(arms, stored, strict=True)
    )
    return {
        "vocabulary": [without_controls(text) for _, text in ranks],
        "probes": [
            {"arms": [next(of_arm) for _ in probe.arms], "charts": _charts(probe)}
            for probe in probes
        ],
    }


def _own_tokens(trunk: Trunk) -> Iterable[tuple[int, str]]:
    """Those that its parent does not have: from where it leaves."""
    completion: Completion = trunk.completion
    ids = completion.token_ids[trunk.start :].tolist()
    return zip(ids, completion.token_texts[trunk.start :], strict=True)


def _stored_trunks(arm: ArmView, budget: int) -> tuple[list[tuple[Trunk, int]], int]:
    """Trunks with their parents' indices (-1: none), and how many of them come with tokens.

    The most frequent first, so that a trunk comes after its parent.
    """
    pairs = list(walk(arm.figures.trunk)) if arm.figures.trunk else []
    pairs.sort(key=lambda pair: (pair[1] is not None, -pair[0].n_samples))
    indices = {id(trunk): index for index, (trunk, _) in enumerate(pairs)}
    trunks = [(trunk, indices[id(parent)] if parent else -1) for trunk, parent in pairs]
    n_with_tokens = 0
    for trunk, _ in trunks:
        budget -= trunk.completion.n_tokens - trunk.start
        if budget < 0:
            break
        n_with_tokens += 1
    return trunks, n_with_tokens


def _varint(number: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first."""
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _arm_data(
    arm: ArmView,
    trunks: list[tuple[Trunk, int]],
    n_with_tokens: int,
    codes: Mapping[tuple[int, str], bytes],
) -> dict[str, Any]:
    places = {trunk.completion.completion_id: i for i, (trunk, _) in enumerate(trunks)}
    in_strip = walk(arm.figures.trunk) if arm.figures.trunk else ()
    order = {trunk.completion.completion_id: place for place, (trunk, _) in enumerate(in_strip)}
    loads = sorted({row.load for row in arm.figures.rows})
    tokens = b"".join(
        codes[token] for trunk, _ in trunks[:n_with_tokens] for token in _own_tokens(trunk)
    )
    return {
        "arm": arm.arm,
        "n_samples": arm.figures.probe.n_samples,
        "reference": next((t.completion.completion_id for t, _ in trunks if t.is_reference), None),
        # completion, parent, start, tokens, samples, colour, place in the strip
        "trunks": [
            [
                trunk.completion.completion_id,
                parent,
                trunk.start,
                trunk.completion.n_tokens,
                trunk.completion.count,
                arm.colours[trunk.completion.completion_id],
                order[trunk.completion.completion_id],
            ]
            for trunk, parent in trunks
        ],
        "n_with_tokens": n_with_tokens,
        "tokens": base64.b64encode(tokens).decode("ascii"),
        "loads": loads,
        # sample, trial, load, batch size, slot, trunk
        "rows": [
            [
                row.sample_id,
                row.trial_id,
                loads.index(row.load),
                row.batch_size,
                row.slot,
                places[row.completion_id],
            ]
            for row in arm.figures.rows
        ],
    }


def _charts(probe: ProbeView) -> dict[str, Any]:
    figures = [arm.figures for arm in probe.arms]
    edges = bins(figures)
    sizes = sorted({s for arm in figures for s in (*arm.unique_by_batch_size, *arm.tokens_per_s)})
    # The first arm that forks: its reference's margins are what its forks are seen against.
    main = next((arm for arm in figures if arm.forks), figures[0])
    return {
        "sizes": sizes,
        "edges": edges,
        "margins": [_rounded(margin) for margin in main.reference_margins],
        "arms": [
            {
                "arm": arm.probe.arm,
                "unique": [arm.unique_by_batch_size.get(size) for size in sizes],
                "speed": [_rounded(arm.tokens_per_s.get(size, math.nan)) for size in sizes],
                "histogram": histogram(arm, edges),
                "forks": [[position, _rounded(margin)] for position, margin in arm.forks],
            }
            for arm in figures
        ],
    }


def _rounded(number: float) -> float | None:
    """Four significant digits: as many as a picture shows."""
    return float(f"{number:.4g}") if math.isfinite(number) else None
