"""Choose the sample of a failed run that is explained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ndcheck.analysis.divergence import first_divergence, latent_divergence, read_stream
from ndcheck.analysis.summarising import summarise
from ndcheck.errors import UsageError
from ndcheck.judging.comparison import find_references
from ndcheck.records import Probe, Run, Sample
from ndcheck.storage.run_directory import SampleReader, read_run


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that differs from its arm's reference: ``position`` is the token where they part.

    ``bits_position`` is the token from which on their logits differ, if that is earlier.
    ``is_latent`` says that only bits differ, and there the two are the same.
    """

    run: Run
    probe: Probe
    sample: Sample
    position: int
    bits_position: int
    is_latent: bool


def _rank(failure: Failure) -> tuple[bool, bool, bool, bool, int, int]:
    """Stock first, then whole prefills, be it that bits alone differ: an op of the pass does that.

    What another prefill leaves in the cache comes from passes that the run alone does not make.
    What a draft proposed is not kept: passes as wide over the completion are seen as they were.
    """
    sample, load = failure.sample, failure.sample.load
    is_in_parts = load.cache_state != "whole"
    return (
        *(sample.arm != "stock", is_in_parts, load.drafts, failure.is_latent),
        *(load.batch_size, failure.position),
    )


def find_failure(directory: Path, sample_id: int | None) -> Failure:
    """The sample asked for, or that of those which differ whose difference an op introduces.

    Raises UsageError where the run has no such sample, or it does not differ from its reference.
    """
    run = read_run(directory)
    probes = {probe.probe_id: probe for probe in run.spec.probes}
    samples = SampleReader(directory, run)
    references = find_references(samples, summarise(samples, run.spec))
    best: Failure | None = None
    for sample in samples:
        if sample.sample_id == sample_id and (sample.error or sample.role == "control"):
            raise UsageError(f"--sample {sample_id} is a control or failed: choose another")
        if sample.error or sample.role == "control":
            continue
        reference = references.get((sample.arm, sample.probe_id))
        if reference is None:
            if sample.sample_id == sample_id:
                raise UsageError(f"--sample {sample_id} has no reference: the probe alone failed")
            continue
        failure = _compare(run, probes[sample.probe_id], sample, reference)
        if sample.sample_id == sample_id:
            if failure is None:
                raise UsageError(f"--sample {sample_id} has the bits of its reference")
            return failure
        if failure and (best is None or _rank(failure) < _rank(best)):
            best = failure
    if sample_id is not None:
        raise UsageError(f"--sample {sample_id}: {directory} has no such sample")
    if best is None:
        raise UsageError(f"{directory}: no sample differs from its reference")
    return best


def _compare(run: Run, probe: Probe, sample: Sample, reference: Sample) -> Failure | None:
    ours, theirs = read_stream(sample), read_stream(reference)
    position = first_divergence(ours.token_ids, theirs.token_ids)
    n_shared = len(ours.token_ids) if position is None else position
    bits_position = latent_divergence(ours, theirs, n_shared)
    if position is not None:
        first = position if bits_position is None else bits_position
        return Failure(run, probe, sample, position, first, False)
    if bits_position is not None:
        return Failure(run, probe, sample, bits_position, bits_position, True)
    return None
