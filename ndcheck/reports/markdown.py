"""The report of a run as Markdown, for an issue, a pull request or a wiki."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from ndcheck.analysis.summary import AxisFinding, ProbeSummary
from ndcheck.findings import Findings
from ndcheck.judging.verdict import NOT_TOLD_APART, ProbeVerdict, fed_details
from ndcheck.records import Run, RunSpec
from ndcheck.reports.document import published
from ndcheck.reports.ranking import MAX_VERDICTS, failed_probes, tally, worst_first
from ndcheck.reports.trees.branches import tree_lines
from ndcheck.reports.untrusted import code_block, code_cell, code_span, markdown_text, quoted
from ndcheck.reports.wording import answers, phrases, serving
from ndcheck.reports.wording.claims import claims, exclusions
from ndcheck.reports.wording.remedies import alone_command, remedies
from ndcheck.reports.wording.reproduction import PROMPTS_FILE, prompts_file, wrapped_command
from ndcheck.samplers.backends import backend_of

MAX_PROBES = 100
"""Each in one arm."""
MAX_COMPLETIONS = 20
TEXT_WIDTH = 60
BLOCK_WIDTH = 100
METRIC_MEANINGS = {
    "TARr@N": "all N completions agree (1) or not (0); Atil et al. 2024",
    "TARa@N": "the same for the answers parsed from them; Atil et al. 2024",
    "Div_Index": "mean first-divergence position (from 0) over diverged samples; Yuan et al. 2025",
    "Avg_Std@top1_prob": "spread of the chosen token's probability on the shared prefix; "
    "Yuan et al. 2025",
    "k1_kl": "estimate of KL(reference, sample) on shared prefixes, in nats per token",
    "k3_kl": "the same by rho - 1 - ln rho, never negative",
    "flip_rate_per_step": "first divergences per decode step at risk",
}


def markdown_report(findings: Findings, defaults: RunSpec) -> str:
    """The whole report; a function of its arguments alone, so it renders to the same bytes."""
    advice = findings.advice
    parts = [
        f"# ndcheck: {findings.judgement.verdict.outcome}",
        *_verdict(findings),
        *_reproduction(findings, defaults),
        *(["## Explanation", _bullets(map(markdown_text, advice))] if advice else []),
        *(f"{sentence}." for sentence in answers.accuracy(findings)),
        *_next_steps(findings, defaults),
        *(part for probe in _detailed(findings) for part in _probe(probe, findings)),
        "## Claims",
        _bullets(claims(findings, markdown_text, _detailed(findings))),
        "Not claimed:",
        _bullets(exclusions(findings.run)),
        *_environment(findings.run),
    ]
    return "\n\n".join(parts) + "\n"


def _detailed(findings: Findings) -> Sequence[ProbeSummary]:
    """All probes in the order of the run, of many the worst."""
    probes = findings.summary.probes
    return probes if len(probes) <= MAX_PROBES else worst_first(findings)[:MAX_PROBES]


def _verdict(findings: Findings) -> Iterator[str]:
    summary, lines = findings.summary, []
    detailed = _detailed(findings)
    if len(detailed) < len(summary.probes):
        yield (
            f"{tally(summary.probes, findings)}. This report has the worst {len(detailed)}, and "
            "the CSV files beside it have them all."
        )
    for probe in detailed:
        verdict = findings.verdicts[probe.arm, probe.probe_id].verdict
        subject = markdown_text(phrases.subject(probe, summary))
        line = f"**{verdict.outcome}** {subject + ': ' if subject else ''}{phrases.outcome(probe)}"
        lines.append(line)
        lines += [f"  - {markdown_text(reason)}" for reason in verdict.reasons]
    if summary.fisher_p is not None:
        lines.append(f"Stock against invariant: p = {summary.fisher_p:.2g} (Fisher's exact test)")
    if not lines:
        lines += [markdown_text(reason) for reason in findings.judgement.verdict.reasons]
    yield "\n".join(line if line.startswith(" ") else f"- {line}" for line in lines)


def _reproduction(findings: Findings, defaults: RunSpec) -> Iterator[str]:
    run = findings.run
    command = wrapped_command(run.spec, defaults, BLOCK_WIDTH)
    yield "To repeat this run:"
    yield code_block("\n".join(command), "sh")
    if prompts_file(run.spec, defaults) is not None:
        yield f"`{PROMPTS_FILE}` lies beside this report."
    yield f"{code_span(phrases.environment(run))}: {phrases.workload(run)}."
    shortfall = phrases.shortfall(run, findings.summary)
    if shortfall:
        yield f"{shortfall}."


def _next_steps(findings: Findings, defaults: RunSpec) -> Iterator[str]:
    found = remedies(findings, defaults, "", BLOCK_WIDTH)
    if found:
        yield "## Next"
    for remedy in found:
        yield f"{remedy.reason}:" if remedy.command else f"{remedy.reason}."
        if remedy.command:
            yield code_block("\n".join(remedy.command), "sh")
    failed = failed_probes(findings)
    for probe_id in failed[:MAX_VERDICTS] if len(failed) > 1 else ():
        command = alone_command(findings.run.spec, probe_id, defaults, BLOCK_WIDTH)
        if command:
            yield f"{markdown_text(probe_id)} fails; measure it alone:"
            yield code_block("\n".join(command), "sh")


def _probe(probe: ProbeSummary, findings: Findings) -> Iterator[str]:
    run = findings.run
    subject, unit = phrases.subject(probe, findings.summary), phrases.unit(run)
    yield f"## Findings: {markdown_text(subject)}" if subject else "## Findings"
    prompt = next((p.prompt for p in run.spec.probes if p.probe_id == probe.probe_id), None)
    if prompt is not None:
        yield f"Prompt: {code_span(quoted(prompt, BLOCK_WIDTH * 10))}"
    control = probe.control
    caught = f"Planted fault caught in {control.n_caught} of {control.n_trials} controls"
    errors = f"{phrases.count(probe.n_errors, 'sample')} failed"
    completions = f"{phrases.count(probe.n_samples, 'completion')}, {probe.n_unique} unique"
    yield f"{completions}. {caught}; {errors}."
    if probe.serving is not None:
        lines = serving.batches(probe.serving)
        if backend_of(run.spec).is_remote:
            lines.insert(0, serving.origin(probe.serving, run))
        yield _bullets(map(markdown_text, lines))
    if probe.axes:
        yield _properties(probe, findings.verdicts[probe.arm, probe.probe_id], unit)
    if (sentence := answers.flips(probe)) is not None:
        yield f"{sentence[0].upper()}{sentence[1:]}."
    if probe.loads:
        yield _loads(probe, unit)
    if probe.completions:
        yield _completions(probe, unit)
        yield "Divergence tree, with the number of samples on each branch:"
        yield code_block("\n".join(tree_lines(probe, BLOCK_WIDTH, MAX_COMPLETIONS, unit)), "text")
        yield _metrics(probe)


def _properties(probe: ProbeSummary, verdict: ProbeVerdict, unit: str) -> str:
    confidence = phrases.percent(probe.confidence)
    rows = [
        (
            finding.axis,
            _axis_outcome(finding, verdict),
            phrases.shown(finding)[0],
            phrases.rate(finding),
            phrases.shown(finding)[1],
            phrases.first_at(finding),
            phrases.at_batch_sizes(finding),
        )
        for finding in probe.axes
    ]
    table = _table(
        "Property | Verdict | Diverged | "
        f"Rate ({confidence} %) | Latent | First at {unit} (from 1) | At batch sizes",
        rows,
    )
    fed = [f"{line}." for finding in probe.axes for line in fed_details(finding)]
    return "\n\n".join((table, f"{phrases.scope([probe])}.", *fed))


def _axis_outcome(finding: AxisFinding, verdict: ProbeVerdict) -> str:
    if finding.axis not in verdict.axes:
        return "not asked for"
    unclear = f" ({NOT_TOLD_APART})" if finding.told_apart is False else ""
    return verdict.axes[finding.axis].outcome + unclear


def _loads(probe: ProbeSummary, unit: str) -> str:
    rows = [
        (
            phrases.load(load),
            str(load.batch_size),
            "all" if load.slot is None else str(load.slot),
            f"{load.n_diverged_trials} of {load.n_trials}",
            f"{load.n_unique} of {load.n_samples}",
            phrases.first_at(load),
            f"{load.latent} of {load.n_trials}",
            phrases.speed(load.tokens_per_s),
            *([f"{load.answer_flips} of {load.n_trials}"] if probe.answers else []),
        )
        for load in probe.loads
    ]
    header = (
        "Load | Batch | Slot (from 0) | Trials diverged | Unique | "
        f"First at {unit} (from 1) | Latent | {unit.capitalize()}s/s"
    )
    return _table(header + " | Answer flipped" * (probe.answers is not None), rows)


def _completions(probe: ProbeSummary, unit: str) -> str:
    rows = [
        (
            str(completion.completion_id),
            f"{completion.count} of {probe.n_samples}",
            phrases.token(completion.first_divergence),
            _token_text(completion.divergent_token),
            _token_text(completion.reference_token),
            "" if completion.margin is None else f"{completion.margin:.3g}",
            str(completion.n_tokens),
        )
        for completion in islice(probe.completions, MAX_COMPLETIONS)
    ]
    header = (
        f"Completion | Samples | First divergence at {unit} (from 1) | Its {unit} | "
        f"Reference's {unit} | "
        f"Top-2 margin | {unit.capitalize()}s"
    )
    table = _table(header, rows)
    hidden = len(probe.completions) - len(rows)
    return f"{table}\n\nand {hidden} more in `completions.csv`." if hidden else table


def _token_text(text: str | None) -> str:
    return "" if text is None else code_cell(quoted(text, TEXT_WIDTH))


def _metrics(probe: ProbeSummary) -> str:
    metrics = published(probe.metrics)
    rows = [
        (f"`{name}`", "unknown" if value is None else f"{value:.6g}", METRIC_MEANINGS[name])
        for name, value in metrics.items()
    ]
    rows.append(
        (
            "modal share",
            f"{probe.modal_count} of {probe.n_samples}",
            "samples that are the most frequent completion",
        )
    )
    if probe.unseen_mass is not None:
        meaning = "probability that the next trial brings a completion not seen yet (Good-Turing)"
        rows.append(("unseen mass", f"{probe.unseen_mass:.6g}", meaning))
    if probe.chao1 is not None:
        rows.append(("Chao1", f"{probe.chao1:.6g}", "at least so many completions exist"))
    if probe.slowdown_vs_stock is not None:
        meaning = "median over loads of the time against stock's"
        rows.append(("slowdown", f"{probe.slowdown_vs_stock:.3g}", meaning))
    return _table("Metric | Value | Meaning", rows)


def _environment(run: Run) -> Iterator[str]:
    yield "## Environment"
    where = run.environment
    groups = {
        "hardware": where.hardware,
        "software": where.software,
        "numeric flags": where.numeric_flags,
        "model": where.model,
    }
    rows = [
        (group, markdown_text(name), code_cell(str(value)))
        for group, facts in groups.items()
        for name, value in facts.items()
        if value is not None
    ]
    rows.append(("run", "id", code_cell(run.run_id)))
    rows.append(("run", "started", code_cell(run.started_at)))
    rows.append(("run", "ndcheck", code_cell(run.ndcheck_version)))
    yield _table("Part | Fact | Value", rows)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    rule = "|".join(" --- " for _ in header.split("|"))
    return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])
