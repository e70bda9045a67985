"""The sentences that the screen, the Markdown report and the JSON document share."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context

from ndcheck.analysis.summary import AxisFinding, LoadFinding, ProbeSummary, Summary
from ndcheck.judging.comparison import unit as unit
from ndcheck.judging.verdict import count as count
from ndcheck.judging.verdict import draft_details, fed_details
from ndcheck.records import Load, Purpose, Run
from ndcheck.reports.untrusted import visible
from ndcheck.samplers.backends import backend_of


def percent(share: float, rounding: str = ROUND_HALF_EVEN) -> str:
    """Three significant digits: "0.8", "99.7", "100". The caller gives the denominator."""
    rounded = Context(prec=3, rounding=rounding).create_decimal_from_float(100 * share)
    if rounded == 100 and share < 1 and rounding == ROUND_HALF_EVEN:
        return f"{100 * share:.10g}"  # almost all is not all
    digits = f"{rounded:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def interval(low: float, high: float) -> str:
    """Rounded outwards: a bound must not get tighter by printing it."""
    return f"{percent(low, ROUND_FLOOR)}-{percent(high, ROUND_CEILING)} %"


def upper_bound(high: float) -> str:
    """The upper end of the interval, where its lower end is 0."""
    return f"< {percent(high, ROUND_CEILING)} %"


def draws(finding: ProbeSummary | AxisFinding) -> str:
    """What was counted: "38 loads", "45 trials"."""
    return count(finding.n_draws, finding.draw)


def shown(finding: AxisFinding) -> tuple[str, str]:
    """How many diverged, and how many did in bits only: "2 of 13 loads"."""
    n, diverged, latent = finding.shown
    of_all = f"of {count(n, finding.draw)}"
    return f"{diverged} {of_all}", f"{latent} {of_all}"


def rate(finding: ProbeSummary | AxisFinding) -> str:
    """What the draws say of the rate of divergence; empty where there was none."""
    if finding.rate_ci_high is None:
        return ""
    if finding.diverged_draws and finding.rate_ci_low is not None:
        return interval(finding.rate_ci_low, finding.rate_ci_high)
    return upper_bound(finding.rate_ci_high)


def outcome(probe: ProbeSummary) -> str:
    """The sentence beside the verdict."""
    if probe.divergence_rate is None:
        return "no trial gave a completion to compare with the probe alone"
    sentence = f"{probe.diverged_draws} of {draws(probe)} diverged"
    confidence = f"{percent(probe.confidence)} %"
    if probe.diverged_draws:
        share = percent(probe.divergence_rate)
        sentence += f" ({share} %, {confidence} CI {rate(probe)})"
        if probe.n_errors:
            sentence += f"; {count(probe.n_errors, 'sample')} failed"
    else:
        sentence += f"; rate {rate(probe)} at {confidence}"
        if probe.latent_draws:
            sentence += f"; {probe.latent_draws} latent (bits only)"
    return sentence


def draws_of(probes: Sequence[ProbeSummary]) -> str:
    """What the rates of all ``probes`` count."""
    kinds = {probe.draw for probe in probes}
    nouns = {"load": "distinct loads", "trial": "trials"}
    return nouns[kinds.pop()] if len(kinds) == 1 else "draws"


def scope(probes: Sequence[ProbeSummary]) -> str:
    """Over what the intervals of the properties are, in one line."""
    confidence = percent(probes[0].confidence) if probes else ""
    others = draws_of(probes)
    of_repeats = "" if others == "trials" else " (run-to-run: trials)"
    return f"Each interval at {confidence} %, not jointly; over {others}{of_repeats}"


def shortfall(run: Run, summary: Summary) -> str | None:
    """That fewer samples were planned than asked for, where no other load exists."""

    def n_asked(probe: ProbeSummary) -> int:
        loads = (x for x in probe.loads if x.is_decoded or run.spec.only_feeds)
        return sum(load.n_samples + load.n_errors for load in loads)

    fewest = min(map(n_asked, summary.probes), default=run.spec.n_samples)
    if run.status != "finished" or run.stop_reason or run.spec.target_rate:
        return None
    if fewest >= run.spec.n_samples:
        return None
    n_loads = min(probe.n_draws for probe in summary.probes)
    return (
        f"{fewest} of {run.spec.n_samples} samples taken: "
        f"no more than {count(n_loads, 'distinct load')} exist, and a repeat is no new draw"
    )


def subject(probe: ProbeSummary, summary: Summary) -> str:
    """What tells this arm and probe from the others in the run; empty if it is the only one."""
    parts: list[str] = []
    if not summary.arms <= {probe.arm}:
        parts.append(probe.arm)
    if not summary.probe_ids <= {probe.probe_id}:
        parts.append(visible(probe.probe_id))
    return " ".join(parts)


def token(position: int | None) -> str:
    """Prose counts tokens from 1, data from 0."""
    return "" if position is None else str(position + 1)


def first_at(finding: AxisFinding | LoadFinding) -> str:
    """Where tokens first differ, from 1; where no token does, "bits 3": where bits first do."""
    if finding.first_divergence_min is None and finding.first_latent_min is not None:
        return f"bits {token(finding.first_latent_min)}"
    return token(finding.first_divergence_min)


def at_batch_sizes(finding: AxisFinding) -> str:
    """The batch sizes at which tokens differ; where none do, those at which bits do."""
    return ", ".join(map(str, finding.batch_sizes_diverged or finding.batch_sizes_latent))


def filling(*, copies: bool) -> str:
    """How many rows of a batch hold the probe."""
    return "all rows" if copies else "one row"


def load(finding: LoadFinding) -> str:
    return load_name(finding.axis, finding)


def load_name(purpose: Purpose, load: Load | LoadFinding) -> str:
    """What is varied, and how; a repeat of it is named as such."""
    name: str = load.cache_state if load.cache_state != "whole" else ""
    if load.width > 1:
        name = f"{'draft, ' * load.drafts}width {load.width}"
    elif load.scores:
        name = f"scoring {name}".rstrip()
    if purpose == "run-to-run" and name:
        return f"{name} again"
    return name if purpose in ("cache", "width", "scoring") else purpose


def fed_notes(probes: Sequence[ProbeSummary], *, with_arm: bool) -> list[str]:
    """What the properties say of tokens that were fed again, a line each; where all of them are the
    same, one line."""
    notes = []
    for probe in probes:
        lines: list[str] = []
        alike: dict[str, int] = {}
        for finding in probe.axes:
            fed = finding.tokens
            if fed and fed.n_tokens and not fed.n_other_bits and not fed.n_other_tokens:
                alike[finding.axis] = fed.n_tokens
                lines += draft_details(finding)
            else:
                lines += fed_details(finding)
        if alike:
            tokens = count(sum(alike.values()), "token")
            lines.append(f"{' and '.join(alike)}: {tokens} fed again, all with the same bits")
        notes += [f"{probe.arm} {line}" if with_arm else line for line in lines]
    return notes


def speed(tokens_per_s: float | None) -> str:
    if tokens_per_s is None:
        return ""
    if tokens_per_s >= 99_999.5:
        return f"{tokens_per_s / 1000:.0f}k"
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"


def environment(run: Run) -> str:
    """The model and what it ran on, in one line."""
    where = run.environment
    if backend_of(run.spec).is_remote:
        return _server(run)
    device = str(where.model.get("device") or run.spec.device)
    torch, by = where.software.get("torch"), where.model.get("invariant_by")
    facts = (
        run.spec.model,
        where.model.get("dtype") or run.spec.dtype,
        device,
        where.model.get("engine"),
        by and f"invariant by {by}",
        torch and f"torch {torch}",
        where.hardware.get("gpu" if device.startswith("cuda") else "cpu"),
    )
    return ", ".join(visible(str(fact)) for fact in facts if fact and fact != "auto")


def _server(run: Run) -> str:
    model = run.environment.model
    version = f" {model['version']}" if model.get("version") else ""
    facts = (
        f"{run.spec.model} at {model.get('endpoint')}",
        f"{model.get('server')}{version}",
        f"comparing {model.get('compared')}",
        f"batch size from {model.get('witness')}",
    )
    return ", ".join(map(visible, facts))


def workload(run: Run) -> str:
    """What was decoded and how it was batched, in one line."""
    spec = run.spec
    loads = ", ".join(map(str, spec.batch_sizes))
    arrivals = backend_of(spec).arrivals(spec)
    how = "" if spec.batching == "exact" else f", continuous batching, arrivals {arrivals}"
    temperature = f"temperature {spec.decoding.temperature:g}"
    if spec.endpoint is not None and spec.endpoint.omits_temperature:
        temperature = "the server's own temperature"
    return (
        f"{spec.decoding.max_tokens} tokens at {temperature}, "
        f"{_rows(run)} {loads} ({spec.mode}{how}){_ending(run)}"
    )


def _rows(run: Run) -> str:
    backend = backend_of(run.spec)
    arrivals = backend.arrivals(run.spec)
    if not backend.is_remote or arrivals == "together":
        return "batch sizes"
    return "in flight" if run.spec.sets_batch_size else f"requests by {arrivals}"


def _ending(run: Run) -> str:
    ending = "" if run.status == "finished" else f"; {run.status}"
    return ending + (f"; {visible(run.stop_reason)}" if run.stop_reason else "")
