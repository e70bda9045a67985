"""Small hand-made runs: tokens are letters, so that an example can be checked by eye."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from ndcheck.analysis.summarising import summarise
from ndcheck.analysis.summary import ProbeSummary
from ndcheck.records import AXES, Decoding, Load, Probe, RunSpec, Sample, Witness

# How long an example takes on a shared machine says nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LOGPROB = -0.5
ULP = 2.0**-24
SPEC = RunSpec(
    model="letters",
    probes=(Probe("p1", "prompt"),),
    decoding=Decoding(max_tokens=8),
    batch_sizes=(1, 2),
    axes=AXES,
    mode="copies",
    n_samples=8,
)


def make_sample(
    trial_id: int,
    text: str,
    *,
    slot: int = 0,
    batch_size: int = 2,
    load: Load | None = None,
    moved: tuple[int, ...] = (),
    bits: bool = True,
    achieved: int | None = -1,
    **fields: Any,
) -> Sample:
    """A batch-size trial's row against trial 0; its logits moved by one ULP at ``moved``.

    Each token has log-probability -0.5 and margin 1 unless ``fields`` say otherwise.
    """
    load = load or Load(batch_size, (slot,), (3,) * (batch_size - 1))
    n = len(text)
    sample = Sample(
        sample_id=trial_id,
        trial_id=trial_id,
        arm="stock",
        probe_id="p1",
        purpose="batch-size",
        baseline=0,
        load=load,
        slot=slot,
        witness=Witness(load.batch_size if achieved == -1 else achieved),
        token_ids=tuple(map(ord, text)),
        token_texts=tuple(text),
        finish_reason="length",
        elapsed_s=1.0,
    )
    if bits:
        sample = replace(
            sample,
            logprobs=tuple(LOGPROB - ULP * (t in moved) for t in range(n)),
            margins=(1.0,) * n,
            row_digests=tuple(f"{t:08x}{t in moved:08x}" for t in range(n)),
        )
    return replace(sample, **fields)


def make_reference(text: str, **fields: Any) -> Sample:
    """Trial 0: the probe alone."""
    return make_sample(
        **{"trial_id": 0, "text": text, "batch_size": 1, "purpose": "reference", "baseline": None}
        | fields
    )


def make_copies(trial_id: int, texts: list[str], **fields: Any) -> list[Sample]:
    """One trial whose rows all hold the probe."""
    load = Load(len(texts), tuple(range(len(texts))))
    return [
        make_sample(trial_id, text, slot=slot, load=load, **fields)
        for slot, text in enumerate(texts)
    ]


def make_error(trial_id: int, **fields: Any) -> Sample:
    return make_sample(
        trial_id,
        "",
        **{"finish_reason": "error", "error": "out of memory", "achieved": None} | fields,
    )


def summarise_probe(samples: list[Sample], **spec: Any) -> ProbeSummary:
    (probe,) = summarise(iter(samples), replace(SPEC, **spec)).probes
    return probe


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """The functions above, by short names."""
    return SimpleNamespace(
        spec=SPEC,
        sample=make_sample,
        reference=make_reference,
        copies=make_copies,
        error=make_error,
        probe=summarise_probe,
    )
