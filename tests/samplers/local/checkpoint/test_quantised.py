"""Quantised checkpoints: FP8 in blocks runs, other layouts are refused by name or dequantised."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ndcheck.errors import UsageError
from ndcheck.records import Decoding, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.base import open_sampler
from ndcheck.samplers.local.checkpoint.quantised import check_quantisation, read_quantisation
from ndcheck_kernels.ops.block_fp8 import quantise_weight

PROBE = Probe("p1", "tell me about the order of a sum")
SPEC = replace(DEFAULTS, probes=(PROBE,), decoding=Decoding(6), device="cpu")
BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
LAYOUTS = {
    "static rows": {**BLOCKS, "activation_scheme": "static"},
    "other blocks": {**BLOCKS, "weight_block_size": [64, 64]},
    "powers of two": {**BLOCKS, "scale_fmt": "ue8m0"},
    "gptq": {"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "bitsandbytes 4 bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes 8 bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torchao": {"quant_method": "torchao"},
}
NAMES = {
    "static rows": r"FP8 in blocks of \[128, 128\], static rows",
    "other blocks": r"FP8 in blocks of \[64, 64\]",
    "powers of two": r"FP8 in blocks of \[128, 128\], dynamic rows, ue8m0 scales",
    "gptq": "gptq with settings that are not known",
    "awq": "awq of 4 bits, version gemv",
}


def copy_of(directory, to, quantised):
    to.mkdir()
    for file in directory.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] = quantised
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.fixture(scope="module")
def fp8(tiny_models, tmp_path_factory):
    """`fp8(family)`: a checkpoint in the form in which FP8 models are published."""

    def make(family):
        to = tmp_path_factory.mktemp("fp8") / family
        copy_of(tiny_models[family], to, BLOCKS)
        plain, stored = load_file(to / "model.safetensors"), {}
        for name, tensor in plain.items():
            if re.search(r"layers\.\d+\..*(proj)\.weight$", name) and tensor.dim() == 2:
                stored[name], stored[f"{name}_scale_inv"] = quantise_weight(tensor)
            else:
                stored[name] = tensor
        assert len(stored) > len(plain)
        save_file(stored, to / "model.safetensors", metadata={"format": "pt"})
        return to

    return make


def sampled(sampler, arm, batch_size):
    others = (11,) * (batch_size - 1)
    load = Load(batch_size, slots=(batch_size // 2,), filler_lengths=others)
    trial = Trial(0, arm, "p1", "slot", load, 0)
    return [(s.token_ids, s.row_digests) for s in sampler.sample(trial, PROBE, SPEC.decoding)]


def test_fp8_stays_fp8_and_a_row_has_its_bits_in_any_batch(fp8):
    sampler = open_sampler(replace(SPEC, model=str(fp8("qwen3"))))
    layer = sampler.model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == "FP8Linear"
    assert layer.weight.dtype == torch.float8_e4m3fn
    alone = sampled(sampler, "invariant", 1)
    assert set(sampled(sampler, "invariant", 5)) == set(alone)
    # Rows are quantised in this arm alone: it is no stock under another name.
    assert sampled(sampler, "stock", 1) != alone


def test_stock_is_what_transformers_computes_without_a_gpu(fp8, monkeypatch):
    # Where there is one, transformers leaves FP8 to it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    directory = fp8("qwen3")
    sampler = open_sampler(replace(SPEC, model=str(directory), arms=("stock",)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert theirs.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(sampler.model(ids).logits, theirs(ids).logits)


def test_dequantised_is_plain_in_both_arms(fp8):
    directory = fp8("qwen3")
    sampler = open_sampler(replace(SPEC, model=str(directory), dequantise=True))
    stored = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    scales = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    rows, columns = stored[name].shape
    expected = (stored[name].float() * scales[:rows, :columns]).bfloat16()
    assert torch.equal(sampler.model.get_parameter(name), expected)
    assert set(sampled(sampler, "invariant", 3)) == set(sampled(sampler, "invariant", 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_refused_by_name(layout, tiny_models, tmp_path):
    directory = copy_of(tiny_models["qwen3"], tmp_path / "model", LAYOUTS[layout])
    with pytest.raises(UsageError, match=NAMES.get(layout, layout)) as caught:
        open_sampler(replace(SPEC, model=str(directory)))
    said = str(caught.value)
    assert "no batch-invariant kernel reads" in said
    assert "--kernels stock runs it as transformers does" in said
    is_made_plain = LAYOUTS[layout]["quant_method"] == "fp8"
    assert ("--dequantise computes it as bf16" in said) == is_made_plain
    if not is_made_plain:
        with pytest.raises(UsageError, match="no plain weights can be made"):
            open_sampler(replace(SPEC, model=str(directory), dequantise=True))
    with pytest.raises(UsageError, match="--random-weights draws no"):
        open_sampler(replace(SPEC, model=str(directory), random_weights=0))


def test_plain_weights_are_not_dequantised(tiny_models):
    with pytest.raises(UsageError, match="are not quantised"):
        open_sampler(replace(SPEC, model=str(tiny_models["qwen3"]), dequantise=True))


def test_random_fp8_weights_follow_their_seed(fp8):
    spec = replace(SPEC, model=str(fp8("qwen3")), arms=("invariant",))
    one, same, other = (open_sampler(replace(spec, random_weights=n)) for n in (1, 1, 2))
    assert one.describe() == same.describe()
    assert one.describe()["digest"] != other.describe()["digest"]
    layer = one.model.model.layers[1].self_attn.o_proj
    assert layer.weight.dtype == torch.float8_e4m3fn
    std = (layer.weight.float() * layer.weight_scale_inv.repeat_interleave(64, 1)[:, :1]).std()
    assert std.item() == pytest.approx(one.model.config.initializer_range, rel=0.1)
    plain = open_sampler(replace(spec, random_weights=1, dequantise=True))
    assert plain.model.model.layers[1].self_attn.o_proj.weight.dtype == torch.bfloat16


def test_what_a_config_says_may_be_anything():
    config = transformers.Qwen3Config()
    assert read_quantisation(config) is None
    for said in (5, {}, {"quant_method": 7}, {"quant_method": "fp8", "weight_block_size": 9}):
        config.quantization_config = said
        assert not read_quantisation(config).is_covered
    config.quantization_config = BLOCKS
    assert read_quantisation(config).is_covered


def test_static_fp8_with_one_scale_is_dequantised(tiny_models, tmp_path):
    said = {**LAYOUTS["static rows"], "weight_block_size": None}
    directory = copy_of(tiny_models["qwen3"], tmp_path / "model", said)
    plain, stored, expected = load_file(directory / "model.safetensors"), {}, {}
    for name, tensor in plain.items():
        stored[name] = tensor
        if re.search(r"layers\.\d+\..*proj\.weight$", name):
            stored[name] = (tensor.float() / 2.0**-9).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.tensor(2.0**-9)
            stored[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
            expected[name] = (stored[name].double() * 2.0**-9).bfloat16()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    sampler = open_sampler(replace(SPEC, model=str(directory), dequantise=True))
    for name, tensor in expected.items():
        assert torch.equal(sampler.model.get_parameter(name), tensor)


def test_mxfp4_has_the_bits_of_its_plain_weights(tiny_models, tmp_path):
    """Two e2m1 numbers a byte, the lower half first, a power of two for each 32 (OCP MX 1.0)."""
    config = transformers.GptOssConfig(
        vocab_size=300, hidden_size=64, intermediate_size=32, num_hidden_layers=1, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["full_attention"], architectures=["GptOssForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    directory = tmp_path / "model"
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(directory)
    for file in tiny_models["qwen3"].glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    stored = load_file(directory / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values, expected = torch.cat([values, -values]), {}
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, k, n = stored.pop(name).shape
        codes = torch.randint(0, 16, (n_experts, n, k // 32, 32), dtype=torch.uint8)
        scales = torch.randint(120, 126, (n_experts, n, k // 32), dtype=torch.uint8)
        stored[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        stored[f"{name}_scales"] = scales
        wide = values[codes.long()] * torch.exp2(scales[..., None].float() - 127)
        expected[name] = wide.flatten(-2).transpose(1, 2).bfloat16()
    assert len(expected) == 2
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((directory / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(document))
    sampler = open_sampler(replace(SPEC, model=str(directory), dequantise=True))
    for name, tensor in expected.items():
        assert torch.equal(sampler.model.get_parameter(name), tensor)
    packed = open_sampler(replace(SPEC, model=str(directory)))
    experts = packed.model.model.layers[0].mlp.experts
    assert experts.down_proj_blocks.dtype == torch.uint8
    assert "stock arm: torch's products" in packed.notes[-1]
    for arm, batch_size in product(("stock", "invariant"), (1, 3)):
        assert sampled(packed, arm, batch_size) == sampled(sampler, arm, batch_size)
    assert set(sampled(packed, "invariant", 3)) == set(sampled(packed, "invariant", 1))
    experts.down_proj_blocks[:, 5, 0] ^= 7  # The control: other codes are seen.
    assert sampled(packed, "invariant", 1) != sampled(sampler, "invariant", 1)
    spec = replace(SPEC, model=str(directory), arms=("invariant",))
    one, same, other = (open_sampler(replace(spec, random_weights=n)) for n in (1, 1, 2))
    assert one.describe()["digest"] == same.describe()["digest"] != other.describe()["digest"]
    plain = one.model.model.layers[0].mlp.experts.gate_up_proj
    assert plain.float().std().item() == pytest.approx(config.initializer_range, rel=0.1)


def test_mxfp4_of_other_models_is_refused(tiny_models, tmp_path):
    directory = copy_of(tiny_models["qwen3"], tmp_path / "model", {"quant_method": "mxfp4"})
    with pytest.raises(UsageError, match="it has no experts that are read from mxfp4"):
        open_sampler(replace(SPEC, model=str(directory)))


def test_ranks_share_fp8_that_is_drawn_only(fp8):
    found = read_quantisation(transformers.AutoConfig.from_pretrained(fp8("qwen3")))
    spec = replace(SPEC, tensor_parallel=2)
    for changed in ({}, {"arms": ("invariant",)}):
        with pytest.raises(UsageError, match="--tp 2: ranks share FP8 in blocks of 128 x 128 only"):
            check_quantisation("m", found, replace(spec, **changed))
    check_quantisation("m", found, replace(spec, random_weights=0))
