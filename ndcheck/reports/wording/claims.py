"""What a run entitles its reader to say, strongest first, and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ndcheck.analysis.summary import ProbeSummary
from ndcheck.findings import Findings
from ndcheck.records import Run
from ndcheck.reports.wording import phrases
from ndcheck.samplers.backends import backend_of


def claims(
    findings: Findings, escape: Callable[[str], str], probes: Sequence[ProbeSummary]
) -> list[str]:
    """A sentence for each of ``probes``; ``escape`` makes the names in it safe to show."""
    ranked = sorted(probes, key=_weakness)
    found = [_claim(probe, findings, escape) for probe in ranked]
    return found or ["None: nothing was measured."]


def _weakness(probe: ProbeSummary) -> tuple[bool, bool, bool]:
    return not probe.n_trials, probe.has_diverged, probe.has_latent


def _claim(probe: ProbeSummary, findings: Findings, escape: Callable[[str], str]) -> str:
    subject = phrases.subject(probe, findings.summary)
    start = f"{escape(subject)}: " if subject else ""
    if probe.has_diverged and not probe.diverged_draws:
        unique = f"{probe.n_unique} unique completions of {probe.n_samples}"
        return f"{start}output is not always the same: {unique}."
    if not probe.n_trials:
        return f"{start}none, since no trial gave a completion to compare."
    confidence = f"{phrases.percent(probe.confidence)} %"
    seen = f"{probe.diverged_draws} of {phrases.draws(probe)} diverged"
    if probe.diverged_draws:
        what = "depends on the load" if _is_laid_to_a_load(probe) else "is not always the same"
        return (
            f"{start}output {what}: {seen} from the commonest completion of the probe alone; for "
            f"this distribution of loads the rate is in {phrases.rate(probe)} at {confidence}."
        )
    bound = f"{seen}; rate {phrases.rate(probe)} at {confidence} for this distribution of loads"
    if probe.has_latent:
        latent = f"{probe.latent_draws} of {phrases.draws(probe)}"
        return f"{start}equal tokens, not equal bits (these differ in {latent}): {bound}."
    if probe.metrics.k1_kl is None:
        units = f"{phrases.unit(findings.run)}s"
        return f"{start}equal {units} (the backend gave no bits to compare): {bound}."
    return f"{start}equal tokens and equal bits across these loads: {bound}."


def _is_laid_to_a_load(probe: ProbeSummary) -> bool:
    return any(finding.told_apart for finding in probe.axes)


def exclusions(run: Run) -> list[str]:
    sizes = ", ".join(map(str, run.spec.batch_sizes))
    axes = ", ".join(run.spec.axes)
    distinct = (
        "That a load would be drawn so often elsewhere: the rate counts distinct loads alike."
    )
    witness = run.environment.model.get("witness")
    overlap = [
        "That the server computed these requests in one batch: their answers were seen to arrive "
        "interleaved, and the server tells no more."
    ]
    replicas = [
        "Replicas that are chosen by address or by request: each trial opens connections of its "
        "own, and nothing else can be varied from here."
    ]
    drawing = ["How the server draws its tokens: no temperature was sent."]
    omits = run.spec.endpoint is not None and run.spec.endpoint.omits_temperature
    return [
        *(drawing if omits else []),
        *(overlap if witness == "client-side overlap" else []),
        *(replicas if backend_of(run.spec).is_remote else []),
        "Anything on other hardware, other versions of the software or other numeric flags.",
        "Other models, prompts, decoding settings or longer completions.",
        f"Other loads: batch sizes {sizes} were enumerated over {axes}; the contents and lengths "
        "of fillers and the random slots are a sample.",
        "That something is deterministic: a clean run bounds a rate and does not make it zero.",
        "Independent rows: copies in one batch are one draw, so batches are counted, not samples.",
        *([] if run.spec.repeats_are_draws else [distinct]),
        "All properties, probes and arms at once: each interval holds at its confidence by itself.",
    ]
