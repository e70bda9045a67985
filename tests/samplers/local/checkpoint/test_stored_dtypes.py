"""What a checkpoint stores are the numbers that are computed with, or it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ndcheck.errors import UsageError
from ndcheck.samplers.base import open_sampler

from .test_quantised import SPEC, copy_of

NAME = "model.layers.0.mlp.up_proj.weight"
CODES = {
    "codes without their config": lambda w: {
        NAME: (w * 4).to(torch.float8_e4m3fn), f"{NAME}_scale": torch.tensor(0.25),
    },
    "integers": lambda w: {NAME: (w * 64).to(torch.int8)},
    "complex numbers": lambda w: {NAME: w.to(torch.complex64)},
}  # fmt: skip


@pytest.fixture
def store(tiny_models, tmp_path):
    """`store(change)`: a spec of a model with another tensor, and that tensor."""

    def make(change):
        directory = copy_of(tiny_models["qwen3"], tmp_path / "model", None)
        tensors = load_file(directory / "model.safetensors")
        tensors |= change(tensors[NAME])
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return replace(SPEC, model=str(directory), arms=("stock",)), tensors[NAME]

    return make


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("name", CODES)
def test_codes_are_not_taken_for_weights(name, store):
    """ModelOpt, for one, says in another file than config.json that weights are quantised."""
    spec, _ = store(CODES[name])
    with pytest.raises(UsageError, match=f"{NAME}.* not be the stored model"):
        open_sampler(spec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_numbers_are_rounded_to_the_dtype_of_the_model(dtype, store):
    spec, stored = store(lambda w: {NAME: w.to(dtype)})
    loaded = open_sampler(spec).model.get_parameter(NAME)
    assert torch.equal(loaded, stored.to(loaded.dtype))


@pytest.mark.parametrize(
    ("name", "is_foreign"),
    [
        ("model.layers.1.mlp.dense.bias", True),
        ("model.layers.0.input_layernorm.bias", True),
        ("model.layers.0.self_attn.sinks", True),
        ("h.0.attn.bias", False),  # GPT-2's masks, which were stored once
        ("transformer.h.0.attn.attention.masked_bias", False),
        ("gpt_neox.layers.0.attention.bias", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
    ],
)
def test_a_tensor_of_a_layer_without_a_place_is_another_model_s(name, is_foreign, store):
    spec, _ = store(lambda _: {name: torch.ones(64)})
    if is_foreign:
        with pytest.raises(UsageError, match=f"no place for 1 tensors .*{name}"):
            open_sampler(spec)
    else:
        open_sampler(spec)


@pytest.mark.parametrize(
    "name",
    [  # As vLLM's loader knows them, by the tool that writes them.
        *("self_attn.k_scale", "self_attn.v_scale", "self_attn.q_scale", "self_attn.kv_scale"),
        *("self_attn.k_proj.k_scale", "self_attn.v_proj.output_scale", "self_attn.attn.k_scale"),
        *("self_attn.k_zero_point", "self_attn.prob_output_scale"),
    ],
)
def test_scales_of_a_cache_are_not_left_aside_without_a_word(name, store, caplog):
    name = f"model.layers.0.{name}"
    spec, _ = store(lambda _: {name: torch.tensor(0.5)})
    open_sampler(spec)
    assert f"its quantised cache ({name}) is not followed: keys and values are of" in caplog.text
