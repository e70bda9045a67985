"""What to do next, derived from what was found."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ndcheck.analysis.statistics import trials_needed
from ndcheck.analysis.summary import ProbeSummary, Summary
from ndcheck.findings import Findings
from ndcheck.judging.verdict import STOCK_DID_NOT_FAIL
from ndcheck.plan.conversations import as_text
from ndcheck.plan.coverage import has_loads, lacks_batches, samples_to_try_all
from ndcheck.records import AXES, Axis, Run, RunSpec
from ndcheck.reports.wording.phrases import percent
from ndcheck.reports.wording.reproduction import (
    argument,
    can_go_on,
    prompts_file,
    resume_command,
    wrapped_command,
)
from ndcheck.samplers.backends import backend_of

SERVER_REMEDY = "Ask the server for batch-invariant kernels, or send one request at a time"
SERVER_REMEDIES = {
    "vLLM": "Start the server with VLLM_BATCH_INVARIANT=1 and measure again",
    "SGLang": "Start the server with --enable-deterministic-inference and measure again",
    "llama.cpp": "Start the server with -np 1, which batches no requests, and measure again",
}
ALONE_BY_CHANCE = (
    "One request alone gets other answers when it is repeated, which no batch explains: look for "
    "random sampling (temperature, seed), several replicas, or requests of others"
)
MORE_SAMPLES = 2
"""The probe alone, before and after everything else."""
REPEATS_DIFFER = (
    "The same batch differs when it is repeated: kernels cure that only where an op, and no random "
    "draw, does it. Try batch-invariant ones"
)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A reason to act and the command, in lines that a shell reads as one, if there is one."""

    reason: str
    command: tuple[str, ...]


def remedies(findings: Findings, defaults: RunSpec, directory: str, width: int) -> list[Remedy]:
    """The next commands, most urgent first; ``directory`` is the run's, or empty: not named."""
    run, summary, spec = findings.run, findings.summary, findings.run.spec
    backend = backend_of(spec)
    found: list[Remedy] = []

    def suggest(reason: str, wanted: RunSpec) -> None:
        found.append(Remedy(reason, tuple(wrapped_command(wanted, defaults, width, directory))))

    has_samples = any(probe.n_samples for probe in summary.probes)
    if run.status == "failed" and not has_samples:
        found.append(Remedy("Nothing was measured: remove the cause and start anew", ()))
    elif can_go_on(run, has_samples=has_samples) and directory:
        found.append(Remedy("Go on", (resume_command(spec, directory),)))
    if any(probe.n_errors for probe in summary.probes):
        found.append(Remedy("Why samples failed is in the error column of samples.csv", ()))
    failed = {
        load.batch_size
        for probe in summary.probes
        for load in probe.loads
        if load.n_errors or (load.achieved_batch_size_min or load.batch_size) < load.batch_size
    }
    rest = tuple(size for size in spec.batch_sizes if size not in failed)
    without = replace(spec, batch_sizes=rest)
    # Without a batch nothing of what batches change would be tried.
    if 0 < len(rest) < len(spec.batch_sizes) and not lacks_batches(without, spec.axes):
        suggest("Leave out the batch sizes that failed", without)
    # By chance a control leaves its baseline before its fault: nothing is wrong with the set-up.
    if any(
        probe.control.n_caught < probe.control.n_trials and not probe.varies_by_chance
        for probe in summary.probes
    ):
        found.append(Remedy("A planted fault went unseen; test this set-up", ("ndcheck doctor",)))
    wider = _wider(spec, summary) if run.status == "finished" else None
    if wider is not None:
        suggest(*wider)
    narrower = _narrower(spec, findings)
    if narrower is not None:
        if replace(narrower, n_samples=spec.n_samples, target_rate=spec.target_rate) != spec:
            axis, size = narrower.axes[0], narrower.batch_sizes[0]
            suggest(
                f"Narrow it down to {axis} at the smallest batch that diverged, {size}", narrower
            )
        is_here = bool(run.environment.model.get("class"))
        # What a prefill in parts left in the cache is no op's of the pass that is traced.
        has_pass = any(
            load.cache_state == "whole" and (load.n_diverged_trials or load.latent)
            for probe in summary.probes
            for load in probe.loads
        )
        if directory and is_here and has_pass and backend.unseen(spec) is None:
            command = f"ndcheck trace --run {argument(directory)}"
            found.append(Remedy("Name the ops that do it", (command,)))
        by_chance = narrower.axes == ("run-to-run",)
        if backend.is_remote and spec.decoding.temperature > 0:
            decoding = replace(spec.decoding, temperature=0.0)
            suggest(
                "A server draws tokens at random above temperature 0",
                replace(spec, decoding=decoding),
            )
        elif spec.endpoint is not None and spec.endpoint.omits_temperature:
            suggest(
                "No temperature was sent, so the server may have drawn these tokens: where it "
                "takes temperature 0",
                replace(spec, endpoint=replace(spec.endpoint, omits_temperature=False)),
            )
        elif backend.is_remote and by_chance and narrower.batch_sizes == (1,):
            found.append(Remedy(ALONE_BY_CHANCE, ()))
        elif backend.is_remote:
            server = str(run.environment.model.get("server"))
            found.append(Remedy(SERVER_REMEDIES.get(server, SERVER_REMEDY), ()))
        elif "invariant" not in spec.arms:
            reason = REPEATS_DIFFER if by_chance else "Try batch-invariant kernels"
            suggest(reason, replace(spec, arms=("stock", "invariant")))
    elif any(probe.has_latent for probe in summary.probes) and not spec.allow_latent:
        suggest(
            "Bits differ but no token did; judge tokens alone", replace(spec, allow_latent=True)
        )
    elif STOCK_DID_NOT_FAIL in findings.judgement.verdict.reasons:
        decoding = replace(spec.decoding, max_tokens=2 * spec.decoding.max_tokens)
        sizes = (*spec.batch_sizes, 2 * max(spec.batch_sizes))
        suggest(
            "Longer completions and larger batches may make stock, the control, fail",
            replace(spec, decoding=decoding, batch_sizes=sizes),
        )
    elif (
        findings.judgement.verdict.outcome == "PASS"
        and (rate := _next_rate(summary)) is not None
        and has_loads(spec, trials_needed(rate, spec.confidence), _shortest_prompt(run))
    ):
        confidence = f"{percent(spec.confidence)} %"
        reason = f"Exclude a rate of {percent(rate)} % at {confidence}"
        suggest(reason, replace(spec, target_rate=rate))
    return found


def _wider(spec: RunSpec, summary: Summary) -> tuple[str, RunSpec] | None:
    """What tries the properties that no trial compared, and why."""
    tried = [{f.axis for f in probe.axes if f.n_trials} for probe in summary.probes]
    untried = [axis for axis in spec.axes if any(axis not in found for found in tried)]
    has_errors = any(probe.n_errors for probe in summary.probes)
    if not untried or has_errors or spec.target_rate is not None or spec.stop_on_divergence:
        return None
    wanted, names = spec, ", ".join(untried)
    reason = f"-n {spec.n_samples} left {names} untried; try all"
    if lacks_batches(spec, untried):
        wanted = replace(spec, batch_sizes=(*spec.batch_sizes, 2))
        reason = f"{names}: untried, as no batch had 2 rows; try all"
    needed = samples_to_try_all(wanted)
    wanted = replace(wanted, n_samples=max(spec.n_samples, needed or 0))
    return None if needed is None or wanted == spec else (reason, wanted)


def _narrower(spec: RunSpec, findings: Findings) -> RunSpec | None:
    """The most basic property that failed, alone, at the smallest batch size where it did.

    With as many samples as it takes to come to the load that diverged.
    """
    summary = findings.summary
    for axis in AXES:
        failed = [
            (min(finding.batch_sizes_diverged), probe)
            for probe in summary.probes
            for finding in probe.axes
            if finding.axis == axis and finding.batch_sizes_diverged
        ]
        if failed:
            batch_size, worst = min(failed, key=lambda pair: pair[0])
            n_samples = _samples_until(findings, axis, batch_size, worst)
            return replace(
                alone(spec, worst.probe_id),
                n_samples=n_samples or spec.n_samples,
                target_rate=None if n_samples else spec.target_rate,
                axes=(axis,),
                batch_sizes=(batch_size,),
                arms=(worst.arm,),
            )
    return None


def alone(spec: RunSpec, probe_id: str) -> RunSpec:
    """``spec`` with one of its probes, by the id that it gets from an option."""
    chosen = (probe for probe in spec.probes if probe.probe_id == probe_id)
    # Its right answer would need a file.
    return replace(
        spec, probes=tuple(replace(probe, probe_id="p1", answer=None) for probe in chosen)
    )


def alone_command(spec: RunSpec, probe_id: str, defaults: RunSpec, width: int) -> list[str]:
    """What measures one of a run's probes, in lines; none for a conversation, which is no option's:
    the run's file holds it among the others."""
    wanted = alone(spec, probe_id)
    return [] if prompts_file(wanted, defaults) else wrapped_command(wanted, defaults, width)


def _samples_until(
    findings: Findings, axis: Axis, batch_size: int, probe: ProbeSummary
) -> int | None:
    """The samples that a plan of one axis and size takes up to the load that diverged here.

    None where it would have other loads: they follow from the probe's id, which is p1 there, and
    chance may come at any repeat.
    """
    if probe.probe_id != "p1" or axis == "run-to-run" or findings.run.spec.repeats_are_draws:
        return None
    n_samples, last = 0, None
    divergences = findings.summary.samples.first_divergence
    for sample, divergence in zip(findings.samples, divergences, strict=False):
        is_of_plan = sample.load.batch_size in (1, batch_size) and sample.role != "control"
        if (sample.arm, sample.probe_id) != (probe.arm, probe.probe_id) or not is_of_plan:
            continue
        if last is not None and sample.trial_id != last:
            return n_samples + MORE_SAMPLES
        n_samples += 1
        if (sample.purpose, sample.load.batch_size) == (axis, batch_size) and divergence >= 0:
            last = sample.trial_id
    return None


def _shortest_prompt(run: Run) -> int:
    """Its tokens; in words where the backend gave none."""
    texts = [as_text(probe.content) for probe in run.spec.probes]
    ids = (*run.prompt_token_ids, *[""] * len(texts))
    lengths = [len((known or text).split()) for known, text in zip(ids, texts, strict=False)]
    return max(1, min(lengths))


def _next_rate(summary: Summary) -> float | None:
    """The next power of ten below the weakest bound that the run reached."""
    bounds = [probe.rate_ci_high for probe in summary.probes if probe.rate_ci_high is not None]
    if not bounds:
        return None
    return next((rate for rate in (0.1, 0.01, 0.001, 0.0001) if rate < max(bounds)), None)
