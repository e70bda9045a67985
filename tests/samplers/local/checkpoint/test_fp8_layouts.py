"""FP8 checkpoints as several tools publish them: one scale a tensor or an output, under many names.

Each is written as its tool writes it (compressed-tensors 0.15, fbgemm as transformers saves it,
ModelOpt 0.40's unified checkpoints, AutoFP8), and read back against the numbers that went in.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ndcheck.errors import UsageError
from ndcheck.records import Decoding, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.base import open_sampler
from ndcheck.samplers.local.checkpoint.fp8_layouts import as_fp8
from ndcheck.samplers.local.checkpoint.quantised import check_quantisation, read_quantisation

PROBE = Probe("p1", "tell me about the order of a sum")
SPEC = replace(DEFAULTS, probes=(PROBE,), decoding=Decoding(6), device="cpu")
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed_tensors(weights, rows):
    group = {
        "targets": ["Linear"],
        "weights": {**FLOAT8, "dynamic": False, **weights},
        "input_activations": {**FLOAT8, **rows},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*layers\.1\.mlp\.up_proj$"],
        "kv_cache_scheme": None,
    }


BY_CHANNEL = {"strategy": "channel"}
TOKENS = {"strategy": "token", "dynamic": True}
GROUPS = {"strategy": "group", "group_size": 128, "dynamic": True}
MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head", "*layers.1.mlp.up_proj"]}
PUBLISHED = {  # The config, a weight's scales, its name and shape there, and whether rows have one.
    "FP8 dynamic": (compressed_tensors(BY_CHANNEL, TOKENS), "channel", "weight_scale", (-1, 1), 0),
    "FP8 static": (
        compressed_tensors({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
        *("tensor", "weight_scale", (1,), "input_scale"),
    ),
    "FP8 block": (
        compressed_tensors({"strategy": "block", "block_structure": [128, 128]}, GROUPS),
        *("block", "weight_scale", None, 0),
    ),
    "fbgemm": (
        {
            "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.up_proj"],
        },
        *("channel", "weight_scale", (-1, 1), 0),
    ),
    "modelopt": ({**MODELOPT, "quant_algo": "FP8"}, "tensor", "weight_scale", (), "input_scale"),
    "AutoFP8": (
        {
            "quant_method": "fp8", "activation_scheme": "static",
            "ignored_layers": ["lm_head", "model.layers.1.mlp.up_proj"],
        },
        *("tensor", "weight_scale", (1,), "input_scale"),
    ),
    "transformers": (
        {
            "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.up_proj"],
        },
        *("tensor", "weight_scale_inv", (), "activation_scale"),
    ),
    "transformers, dynamic": (
        {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None,
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.up_proj"],
        },
        *("tensor", "weight_scale_inv", (), 0),
    ),
}  # fmt: skip


def scaled(weight, owner):
    """Codes, scales, and scales spread over the weight; with torch alone."""
    n, k = weight.shape
    parts = weight.float()
    if owner == "block":
        blocks = torch.nn.functional.pad(parts, (0, -k % 128, 0, -n % 128))
        blocks = blocks.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scales = blocks.abs().amax((1, 3)) / 448
        wide = scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    else:
        scales = parts.abs().amax(1 if owner == "channel" else None) / 448
        wide = scales.reshape(-1, 1).expand(n, k)
    return (parts / wide).to(torch.float8_e4m3fn), scales, wide


@pytest.fixture(scope="module")
def publish(tiny_models, tmp_path_factory):
    """`publish(tool, family, change)`: the directory, and the numbers that its weights are."""

    def make(tool, family="qwen3", change=lambda said: None):
        said, owner, name_of_scale, shape, name_of_row = PUBLISHED[tool]
        said = json.loads(json.dumps(said))
        change(said)
        to = tmp_path_factory.mktemp("published")
        for file in tiny_models[family].iterdir():
            (to / file.name).write_bytes(file.read_bytes())
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
        plain, stored, expected = load_file(to / "model.safetensors"), {}, {}
        for name, tensor in plain.items():
            stored[name] = tensor
            is_left = "layers.1.mlp.up_proj" in name
            if re.search(r"layers\.\d+\..*proj\.weight$", name) and not is_left:
                codes, scales, wide = scaled(tensor, owner)
                scales = scales if shape is None else scales.reshape(shape)
                stored[name] = codes
                stored[name.replace("weight", name_of_scale)] = scales.contiguous()
                expected[name] = (codes.float() * wide).bfloat16()
                if name_of_row:
                    row = torch.tensor(2.0**-5)
                    stored[name.replace("weight", name_of_row)] = row.reshape(shape)
        assert expected
        save_file(stored, to / "model.safetensors", metadata={"format": "pt"})
        return to, expected

    return make


def sampled(sampler, arm, batch_size):
    load = Load(batch_size, slots=(batch_size // 2,), filler_lengths=(11,) * (batch_size - 1))
    trial = Trial(0, arm, "p1", "slot", load, 0)
    return [(s.token_ids, s.row_digests) for s in sampler.sample(trial, PROBE, SPEC.decoding)]


@pytest.mark.parametrize("tool", PUBLISHED)
def test_a_published_layout_stays_fp8_and_a_row_has_its_bits_in_any_batch(tool, publish):
    directory, expected = publish(tool)
    sampler = open_sampler(replace(SPEC, model=str(directory)))
    layers = sampler.model.model.layers
    assert layers[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
    assert layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert layers[0].mlp.down_proj.weight_scale_inv.dtype == torch.float32
    assert (layers[0].mlp.down_proj.activation_scale is not None) == bool(PUBLISHED[tool][-1])
    # The stock arm on a CPU is made of the numbers that the tool stored.
    layer, x = layers[0].mlp.down_proj, torch.randn(3, layers[0].mlp.down_proj.in_features)
    weight = expected["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(layer(x.bfloat16()), torch.nn.functional.linear(x.bfloat16(), weight))
    alone = sampled(sampler, "invariant", 1)
    assert set(sampled(sampler, "invariant", 5)) == set(alone)
    # Rows are quantised in this arm alone: it is no stock under another name.
    assert sampled(sampler, "stock", 1) != alone


@pytest.mark.parametrize("tool", PUBLISHED)
def test_a_published_layout_is_dequantised(tool, publish):
    directory, expected = publish(tool)
    sampler = open_sampler(replace(SPEC, model=str(directory), dequantise=True))
    for name, tensor in expected.items():
        assert torch.equal(sampler.model.get_parameter(name), tensor)


@pytest.mark.parametrize("tool", ["FP8 dynamic", "AutoFP8", "fbgemm"])
def test_random_weights_are_drawn_in_the_layout(tool, publish):
    directory, _ = publish(tool)
    spec = replace(SPEC, model=str(directory), arms=("invariant",))
    one, same, other = (open_sampler(replace(spec, random_weights=n)) for n in (1, 1, 2))
    assert one.describe() == same.describe()
    assert one.describe()["digest"] != other.describe()["digest"]
    layer = one.model.model.layers[1].self_attn.o_proj
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight_scale_inv.numel() == (1 if tool == "AutoFP8" else layer.out_features)
    std = (layer.weight.float() * layer.weight_scale_inv.reshape(-1, 1)).std()
    assert std.item() == pytest.approx(one.model.config.initializer_range, rel=0.1)
    assert set(sampled(one, "invariant", 3)) == set(sampled(one, "invariant", 1))


def test_ranks_do_not_share_one_scale_a_row(publish):
    directory, _ = publish("FP8 dynamic")
    found = read_quantisation(transformers.AutoConfig.from_pretrained(directory))
    spec = replace(SPEC, arms=("invariant",), random_weights=0, tensor_parallel=2)
    with pytest.raises(UsageError, match="--tp 2: ranks share FP8 in blocks of 128 x 128 only"):
        check_quantisation("m", found, spec)


def test_parts_of_a_sum_have_no_scale_of_their_own(publish):
    directory, _ = publish("FP8 dynamic")
    spec = replace(SPEC, model=str(directory), arms=("invariant",), random_weights=0, tp_groups=2)
    with pytest.raises(Exception, match="a row's FP8 scale spans the parts of all ranks"):
        sampled(open_sampler(spec), "invariant", 1)


def dynamic_tensor(said):
    said["config_groups"]["group_0"]["input_activations"] = {
        **FLOAT8, "strategy": "tensor", "dynamic": True,
    }  # fmt: skip


def weights_alone(said):
    said["config_groups"]["group_0"]["input_activations"] = None


def int8(said):
    said["config_groups"]["group_0"]["weights"]["type"] = "int"


def other_targets(said):
    said["config_groups"]["group_0"]["targets"] = ["re:.*q_proj"]


def packed(said):
    said["format"] = "pack-quantized"


def nonsense(said):
    said["config_groups"] = 7


def rotated(said):
    apply = [{"targets": ["re:.*down_proj$"], "location": "input"}]
    said["transform_config"] = {"config_groups": {"u": {"type": "hadamard", "apply": apply}}}


def without_zeros(said):
    said["sparsity_config"] = {"format": "sparse-24-bitmask"}


@pytest.mark.parametrize(
    "change",
    [
        *(dynamic_tensor, weights_alone, int8, other_targets, packed, nonsense),
        *(rotated, without_zeros),
    ],
)
def test_others_of_the_same_tool_are_refused_by_name(change, publish):
    """A scale of the whole batch, as dynamic quantisation per tensor has, cannot be invariant."""
    directory, _ = publish("FP8 dynamic", change=change)
    with pytest.raises(UsageError, match="no batch-invariant kernel reads compressed-tensors"):
        open_sampler(replace(SPEC, model=str(directory)))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("tool", ["FP8 dynamic", "FP8 block"])
def test_other_numbers_are_not_rounded_to_codes(tool, dtype, publish):
    """transformers casts what is stored to e4m3, where 1000 is no number and 2**-12 is 0."""
    directory, expected = publish(tool)
    stored, name = load_file(directory / "model.safetensors"), min(expected)
    stored[name] = stored[name].to(dtype)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=rf"{name} is stored as (F8_E5M2|BF16)"):
        open_sampler(replace(SPEC, model=str(directory)))


def test_what_a_config_says_may_be_anything():
    config = transformers.Qwen3Config()
    for said in (
        {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
        {"quant_method": "modelopt", "quant_algo": ["FP8"], "ignore": 3},
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": "much", "modules_to_not_convert": 1},
        {"quant_method": ["fp8"]},
    ):
        config.quantization_config = said
        assert read_quantisation(config).method in (str(said["quant_method"]), "fp8")
    assert as_fp8({"quant_method": "gptq"}) is None


def test_experts_of_other_tools_are_left_to_transformers():
    config = transformers.Qwen3MoeConfig(num_experts=4)
    config.quantization_config = PUBLISHED["FP8 dynamic"][0]
    found = read_quantisation(config)
    said = (
        r"reads compressed-tensors as float-quantized: --kernels stock runs it as transformers does"
    )
    with pytest.raises(UsageError, match=said):
        check_quantisation("m", found, SPEC)
    check_quantisation("m", found, replace(SPEC, arms=("stock",)))
    config.quantization_config = PUBLISHED["transformers"][0]
    assert read_quantisation(config).is_covered
