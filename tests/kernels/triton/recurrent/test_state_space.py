"""Models with state-space layers by what CUDA registers: their ops are covered, their bits kept."""

from __future__ import annotations

import pytest
import torch

import ndcheck_kernels
from bench.models import families
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck_kernels import invariant_kernels

# One of each kind by default: the interpreter takes ten seconds and more for each.
ALWAYS = ("Falcon-H1 (hybrid)", "LFM2 (hybrid)", "Mamba")
FAMILIES = [
    *ALWAYS,
    *("Nemotron-H (hybrid)", "Granite 4 (hybrid, MoE)", "Bamba (hybrid)", "Mamba-2"),
    *("Jamba (hybrid, MoE)", "Falcon-Mamba", "Zamba 2 (hybrid)"),
]
CASES = [pytest.param(f, marks=[] if f in ALWAYS else pytest.mark.slow) for f in FAMILIES]

pytestmark = pytest.mark.usefixtures("cuda_registrations")


@pytest.mark.parametrize("family", CASES)
def test_a_padded_row_in_chunks_has_the_bits_that_it_has_alone(family, device, monkeypatch):
    monkeypatch.setitem(families._COMMON, "vocab_size", 64)
    model, rows = families.build_model(family).to(device), [[7, 9, 11], [5, 6, 7, 8, 9]]

    def logits(rows, cache_state):
        batch = ExactBatch(model, torch.device(device), len(rows), 7)
        batch.reset(rows)
        first = batch.compute_prompt(cache_state)
        return torch.stack([first, batch.step(torch.tensor([3] * len(rows), device=device))])

    with torch.inference_mode():
        plain = model(torch.tensor([[*rows[0], 3]], device=device)).logits[:, -1]
        with ndcheck_kernels.invariant_model(model), invariant_kernels() as scope:
            alone = logits(rows[:1], "whole")
            together = logits(rows, "chunked")
    assert torch.equal(together[:, 0], alone[:, 0])
    assert (alone[1] - plain).abs().max() < 0.001 * plain.std()
    assert scope.missing() == ()
