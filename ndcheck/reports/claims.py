"""What a run entitles its reader to say, strongest first, and what it does not."""

from __future__ import annotations

from collections.abc import Callable

from ndcheck.analysis.summary import ProbeSummary, Summary
from ndcheck.records import Run
from ndcheck.reports import phrases


def claims(run: Run, summary: Summary, escape: Callable[[str], str]) -> list[str]:
    """One sentence for each probe and arm; ``escape`` makes the names in it safe to show."""
    ranked = sorted(summary.probes, key=_weakness)
    found = [_claim(probe, run, summary, escape) for probe in ranked]
    return found or ["None: nothing was measured."]


def _weakness(probe: ProbeSummary) -> tuple[bool, bool, bool]:
    return not probe.n_trials, bool(probe.diverged_trials), bool(probe.latent_trials)


def _claim(probe: ProbeSummary, run: Run, summary: Summary, escape: Callable[[str], str]) -> str:
    subject = phrases.subject(probe, summary)
    start = f"{escape(subject)}: " if subject else ""
    if not probe.n_trials:
        return f"{start}none, since no trial gave a completion to compare."
    confidence = f"{phrases.percent(probe.confidence)} %"
    trials = f"{probe.diverged_trials} of {phrases.count(probe.n_trials, 'trial')} diverged"
    if probe.diverged_trials:
        return (
            f"{start}output depends on the load: {trials}; for this distribution of loads the rate "
            f"is in {phrases.rate(probe)} at {confidence}."
        )
    bound = f"{trials}; rate {phrases.rate(probe)} at {confidence} for this distribution of loads"
    if probe.latent_trials:
        latent = f"{probe.latent_trials} of {phrases.count(probe.n_trials, 'trial')}"
        return f"{start}equal tokens, not equal bits (these differ in {latent}): {bound}."
    if probe.metrics.k1_kl is None:
        return f"{start}equal {phrases.unit(run)}s (the backend gave no bits to compare): {bound}."
    return f"{start}equal tokens and equal bits across these loads: {bound}."


def exclusions(run: Run) -> list[str]:
    sizes = ", ".join(map(str, run.spec.batch_sizes))
    axes = ", ".join(run.spec.axes)
    witness = run.environment.model.get("witness")
    overlap = [
        "That the server computed these requests in one batch: their answers were seen to arrive "
        "interleaved, and the server tells no more."
    ]
    replicas = [
        "Replicas that are chosen by address or by request: each trial opens connections of its "
        "own, and nothing else can be varied from here."
    ]
    return [
        *(overlap if witness == "client-side overlap" else []),
        *(replicas if run.spec.endpoint is not None else []),
        "Anything on other hardware, other versions of the software or other numeric flags.",
        "Other models, prompts, decoding settings or longer completions.",
        f"Other loads: batch sizes {sizes} were enumerated over {axes}; the contents and lengths "
        "of fillers and the random slots are a sample.",
        "That something is deterministic: a clean run bounds a rate and does not make it zero.",
        "Independent rows: copies in one batch are one draw, so trials are counted, not samples.",
    ]
