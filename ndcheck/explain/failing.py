"""The sample of a run that is to be explained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ndcheck.analysis.divergence import first_divergence, latent_divergence, read_stream
from ndcheck.errors import UsageError
from ndcheck.records import Arm, Probe, Run, Sample
from ndcheck.store import SampleReader, read_run


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


def find_failure(directory: Path, sample_id: int | None) -> Failure:
    """The sample asked for, or the one that diverged in the smallest batch, tokens before bits.

    Raises UsageError where the run has no such sample, or it does not differ from its reference.
    """
    run = read_run(directory)
    probes = {probe.probe_id: probe for probe in run.spec.probes}
    references: dict[tuple[Arm, str], Sample] = {}
    best: Failure | None = None
    for sample in SampleReader(directory, run):
        if sample.sample_id == sample_id and (sample.error or sample.axis == "control"):
            raise UsageError(f"--sample {sample_id} is a control or failed: choose another")
        if sample.error or sample.axis == "control":
            continue
        reference = references.setdefault((sample.arm, sample.probe_id), sample)
        failure = _compare(run, probes[sample.probe_id], sample, reference)
        if sample.sample_id == sample_id:
            if failure is None:
                raise UsageError(f"--sample {sample_id} has the bits of its reference")
            return failure
        if failure and _rank(failure) < _rank(best):
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


def _rank(failure: Failure | None) -> tuple[bool, bool, int, int]:
    if failure is None:
        return True, True, 0, 0
    load = failure.sample.load
    # Whole prefills first: there the prefill itself can be compared.
    return failure.is_latent, load.cache_state != "whole", load.batch_size, failure.position
