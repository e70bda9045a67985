"""Continuous batching computes what the model's forward pass does, or is refused by name."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers

from ndcheck.errors import UsageError
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local import serving
from ndcheck.samplers.local.checkpoint.thresholds import Rows
from ndcheck.samplers.local.prompts import plain_ids
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.samplers.options import SCHEDULED_AXES

CPU = torch.device("cpu")
SHORT, LONG = Rows(7, 13, 3), Rows(30, 40, 20)
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES = {
    "StableLm": {},
    "DeepseekV3": LATENT,
    "Moshi": {"sliding_window": 16, "ffn_dim": 128},
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"sliding_window": 8, "head_dim": 16},
    "OlMoE": {"num_experts": 4, "num_experts_per_tok": 2},
}
NAMES = {"OlMoE": "Olmoe"}


def make(family, dtype=torch.float32):
    name = NAMES.get(family, family)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **FAMILIES[family])
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


@contextmanager
def stock():
    yield lambda: None


def require(model, rows=SHORT):
    serving.require_served(model, CPU, rows, stock)


@pytest.mark.parametrize("family", ["StableLm", "DeepseekV3"])
def test_what_the_managers_cache_does_not_fit_is_refused_by_name(family):
    with pytest.raises(
        UsageError, match=rf"^--batching continuous: {family}ForCausalLM cannot be served: [^\n]+$"
    ):
        require(make(family))


def test_what_it_computes_otherwise_is_refused():
    """Moshi makes its window itself, for a cache that the manager's is not."""
    model, prompt = make("Moshi"), plain_ids(make("Moshi"), 30)
    try:
        require(model)
    except UsageError:
        pytest.skip("this transformers does not serve it at all")
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1)
    room = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    served = model.generate_batch([prompt], config, continuous_batching_config=room)
    model.set_attn_implementation("sdpa")
    alone = model.generate(torch.tensor([prompt]), generation_config=config, pad_token_id=0)
    (request,) = served.values()
    assert request.generated_tokens != alone[0, 30:].tolist()  # By transformers alone.
    with pytest.raises(UsageError, match="MoshiForCausalLM computes something else there"):
        require(model, LONG)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "OlMoE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["enough", "scarce"])
def test_sound_models_are_not_accused(monkeypatch, family, dtype, memory):
    if memory == "scarce":
        monkeypatch.setattr("ndcheck.samplers.local.memory.free_bytes", lambda device: 0)
    model = make(family, dtype)
    before = [(p.dtype, p.data_ptr()) for p in model.parameters()]
    for rows in (SHORT, LONG):
        require(model, rows)
    assert before == [(p.dtype, p.data_ptr()) for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_positions_are_seen(monkeypatch, dtype):
    """The check's own control."""
    stock_load = serving.serve_load

    def serve(model, *args, **kwargs):
        def shift(module, args, given):
            return args, given | {"position_ids": given["position_ids"] // 2}

        hook = model.register_forward_pre_hook(shift, with_kwargs=True)
        try:
            return stock_load(model, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(serving, "serve_load", serve)
    with pytest.raises(UsageError, match="LlamaForCausalLM computes something else there"):
        require(make("Llama", dtype))


def test_chance_is_left_to_the_run(monkeypatch):
    """Of four tries the last is right."""
    stock_load, tries = serving.serve_load, iter([1.0, 2.0, 3.0, 0.0])

    def serve(*args, **kwargs):
        (served,), n_fires = stock_load(*args, **kwargs)
        off = next(tries)
        served.readings = [
            (token, margin, logprob - off, digest)
            for token, margin, logprob, digest in served.readings
        ]
        return [served], n_fires

    monkeypatch.setattr(serving, "serve_load", serve)
    require(make("Llama"))
    assert next(tries, None) is None


def test_a_run_is_refused_before_its_first_trial(tmp_path):
    config = transformers.StableLmConfig(
        **{**COMMON, "vocab_size": 8000}, architectures=["StableLmForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    spec = replace(
        DEFAULTS, model=str(tmp_path), random_weights=0, dtype="fp32", device="cpu",
        batching="continuous", axes=SCHEDULED_AXES,
    )  # fmt: skip
    with pytest.raises(UsageError, match=re.escape("--batching continuous: StableLmForCausalLM")):
        TransformersSampler(spec)
