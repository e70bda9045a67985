"""Rotary embeddings that change for a whole batch with its longest row are found and refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers

from ndcheck.errors import UsageError
from ndcheck.records import AXES, Probe
from ndcheck.request import DEFAULTS
from ndcheck.runner import fit_spec, plan
from ndcheck.samplers.local.checkpoint.rope import rope_switch
from ndcheck.samplers.local.sampler import TransformersSampler


def phi3(directory, limit, **changed):
    config = transformers.Phi3Config(
        vocab_size=8000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        original_max_position_embeddings=limit,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": limit,
            **changed,
        },
        architectures=["Phi3ForCausalLM"],
    )
    config.save_pretrained(directory)
    return replace(
        DEFAULTS,
        model=str(directory),
        random_weights=0,
        dtype="fp32",
        decoding=replace(DEFAULTS.decoding, max_tokens=4),
        probes=(Probe("p1", "one two three four"),),
        batch_sizes=(1, 2),
        arms=("stock",),
    )


def test_a_rope_that_follows_the_longest_row_is_explained_not_accused(tmp_path):
    """The fact itself, by transformers alone: a longer neighbour turns the row's logits over."""
    sampler = TransformersSampler(phi3(tmp_path / "short", 18))
    short = sampler.model
    ids = [sampler._prompts.encode("one two three four")]
    assert len(ids[0]) + 4 <= 18
    long_row = [ids[0] * 5]
    n = len(long_row[0])
    tensor = partial(torch.tensor, device=short.device)
    padded = tensor([[0] * (n - len(ids[0])) + ids[0], long_row[0]])
    mask = tensor([[0] * (n - len(ids[0])) + [1] * len(ids[0]), [1] * n])
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = short(tensor(ids)).logits[0, -1]
        beside = short(padded, attention_mask=mask, position_ids=at).logits[0, -1]
    assert (alone - beside).abs().max() > 0.01 * alone.std()

    spec = replace(phi3(tmp_path / "again", 18), axes=AXES)
    sampler = TransformersSampler(spec)
    fitted = fit_spec(spec, sampler)
    assert fitted.axes == tuple(axis for axis in AXES if axis != "neighbours")
    assert all(set(t.load.filler_lengths) <= {len(ids[0])} for t in plan(fitted, sampler))
    with pytest.raises(UsageError, match="longrope positions change for the whole batch once"):
        fit_spec(replace(spec, axes=("neighbours",)), sampler)
    batch = sampler.open_batch([ids[0], long_row[0]], 4)
    with pytest.raises(UsageError, match="the longest row passes 18 tokens"):
        batch.prefill("whole")


def test_a_completion_that_passes_the_switch_is_refused_and_one_that_does_not_is_not(tmp_path):
    with pytest.raises(UsageError, match="the longest row passes 8 tokens"):
        TransformersSampler(phi3(tmp_path / "8", 8))
    spec = phi3(tmp_path / "100", 100)
    assert fit_spec(spec, TransformersSampler(spec)).axes == spec.axes


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, ("dynamic", 128)),
        ({"type": "su", "original_max_position_embeddings": 32}, ("su", 32)),
        (
            {
                "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64},
                "sliding_attention": {"rope_type": "default"},
            },
            ("longrope", 64),
        ),
    ],
)
def test_ropes_that_follow_the_longest_row(parameters, expected):
    config = SimpleNamespace(rope_parameters=parameters, max_position_embeddings=128)
    assert rope_switch(config) == expected
