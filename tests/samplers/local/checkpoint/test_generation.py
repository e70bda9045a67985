"""What generation_config.json asks for changes no measurement, and is said where it is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.records import Decoding
from ndcheck.request import DEFAULTS
from ndcheck.runner import plan
from ndcheck.samplers.local.sampler import TransformersSampler

SETTINGS = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "repetition_penalty": 1.5,
    "guidance_scale": 2.0,
    "no_repeat_ngram_size": 1,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 4,
}
SAID = ["num_beams", "repetition_penalty", "guidance_scale", "no_repeat_ngram_size"]


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MODEL_DIRECTORY).save_pretrained(tmp_path)
    return replace(DEFAULTS, model=str(tmp_path), dtype="fp32", decoding=Decoding(8))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_generate_change_no_completion(model, tmp_path, caplog, name):
    """The right tokens: the largest logit each time, of passes over all tokens so far."""
    settings = {"num_beams": 2} if name == "num_return_sequences" else {}
    settings = {"eos_token_id": None, **settings, name: SETTINGS[name]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    sampler = TransformersSampler(model)
    (reference, *_) = plan(model, sampler)
    (sample,) = sampler.sample(reference, model.probes[0], model.decoding)
    ids = sampler.encode(model.probes[0].content)
    with torch.inference_mode(), sampler.model.device:
        for _ in range(8):
            logits = sampler.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids = [*ids, int(logits[0, -1].argmax())]
    assert list(sample.token_ids) == ids[-8:]
    assert (f"not followed: {name}:" in caplog.text) == (name in SAID), caplog.text


def test_settings_that_change_nothing_are_not_said(model, tmp_path, caplog):
    settings = {"repetition_penalty": 1.0, "num_beams": 1, "temperature": 0.7, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    TransformersSampler(model)
    assert "not followed" not in caplog.text
