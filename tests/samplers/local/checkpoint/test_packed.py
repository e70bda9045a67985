"""Checkpoints of 4 and 8 bits, written here as their formats are described, against plain ones.

The right weights are (code - zero) * scale in float64, rounded to bf16 once.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ndcheck.errors import UsageError
from ndcheck.samplers.base import open_sampler
from ndcheck.samplers.local.checkpoint.packed import METHODS, read_packed
from ndcheck.samplers.local.checkpoint.quantised import read_quantisation

from .test_quantised import SPEC, copy_of, sampled

LAYER = re.compile(r"layers\.\d+\..*proj\.weight$")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # The column that each half byte of a word holds.


def words(numbers, bits, order=None):
    """Unsigned numbers [R, C] -> int32 [R, C * bits / 32], low bits first."""
    n = 32 // bits
    made = torch.zeros(len(numbers), -(-numbers.shape[1] // n), dtype=torch.int64)
    for column in range(numbers.shape[1]):
        place = column % n if order is None else order.index(column % n)
        made[:, column // n] |= numbers[:, column].long() << (bits * place)
    return torch.where(made >= 2**31, made - 2**32, made).to(torch.int32)


def drawn(n, k, bits, group, *, has_zeros):
    """Codes [N, K], zeros and scales [N, K / group]; zeros at both ends, small scales."""
    codes = torch.randint(0, 2**bits, (n, k))
    zeros = torch.full((n, k // group), 2 ** (bits - 1))
    if has_zeros:
        zeros = torch.randint(0, 2**bits, zeros.shape)
        zeros[0], zeros[1] = 0, 2**bits - 1
    scales = (torch.rand(zeros.shape) + 0.5) * 2 ** (2.0 - bits) * 0.2
    scales[2, 0], scales[3, 0] = 0, 2.0**-24
    return codes, zeros, scales


def compressed(name, n, k, bits, group, *, has_zeros=False, has_order=False):
    size = k if group == -1 else group
    codes, zeros, scales = drawn(n, k, bits, size, has_zeros=has_zeros)
    scales, index = scales.bfloat16(), torch.arange(k) // size
    stored = {
        f"{name}_packed": words(codes, bits),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor([n, k]),
    }
    if has_zeros:
        stored[f"{name}_zero_point"] = words(zeros.t(), bits).t().contiguous()
    if has_order:
        index = index[torch.randperm(k)]
        stored[f"{name}_g_idx"] = index.to(torch.int32)
    return stored, (codes - zeros[:, index]).double() * scales.double()[:, index]


def gptq(name, n, k, bits, group, *, has_zeros=True, has_order=False, offset=1):
    size = k if group == -1 else group
    codes, zeros, scales = drawn(n, k, bits, size, has_zeros=has_zeros)
    scales, index = scales.half(), torch.arange(k) // size
    index = index[torch.randperm(k)] if has_order else index
    name = name.removesuffix("weight")
    # As GPTQModel stores them, in convert_gptq_v2_to_v1_format_module: 1 less in each half byte or
    # byte of a word, by one subtraction of words.
    ones = offset * {4: 0x11111111, 8: 0x01010101}[bits]
    stored = {
        f"{name}qweight": words(codes, bits).t().contiguous(),
        f"{name}qzeros": words(zeros.t(), bits) - ones,
        f"{name}scales": scales.t().contiguous(),
        f"{name}g_idx": index.to(torch.int32),
    }
    # A word of qweight holds neighbouring columns of the weight.
    return stored, (codes - zeros[:, index]).double() * scales.double()[:, index]


def awq(name, n, k, group):
    codes, zeros, scales = drawn(n, k, 4, group, has_zeros=True)
    scales, index = scales.half(), torch.arange(k) // group
    name = name.removesuffix("weight")
    stored = {
        f"{name}qweight": words(codes.t(), 4, AWQ_ORDER),
        f"{name}qzeros": words(zeros.t(), 4, AWQ_ORDER),
        f"{name}scales": scales.t().contiguous(),
    }
    return stored, (codes - zeros[:, index]).double() * scales.double()[:, index]


def compressed_config(bits, group, *, has_zeros=False, has_order=False):
    weights = {
        "num_bits": bits, "type": "int", "symmetric": not has_zeros, "dynamic": False,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group, "actorder": "group" if has_order else None,
    }  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme}, "quantization_status": "compressed",
    }  # fmt: skip


def gptq_config(bits, group, **said):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, **said}


FORMS = {
    "compressed-tensors of 4 bits in groups of 32": (compressed, compressed_config, (4, 32), {}),
    "compressed-tensors of 8 bits in a scale a row": (compressed, compressed_config, (8, -1), {}),
    "compressed-tensors of 4 bits in groups of 64 with zero points": (
        compressed, compressed_config, (4, 64), {"has_zeros": True},
    ),
    "compressed-tensors of 8 bits in groups of 32 with zero points": (
        compressed, compressed_config, (8, 32), {"has_zeros": True, "has_order": True},
    ),
    "gptq of 4 bits in groups of 32 with zero points": (gptq, gptq_config, (4, 32), {}),
    "gptq of 8 bits in a scale a row with zero points": (
        gptq, gptq_config, (8, -1), {"has_zeros": False},
    ),
    "gptq of 4 bits in groups of 64 with zero points": (
        gptq, gptq_config, (4, 64), {"has_order": True},
    ),
    "gptq of 8 bits in groups of 64 with zero points": (
        gptq, lambda *size: gptq_config(*size, checkpoint_format="gptq_v2"), (8, 64),
        {"offset": 0},
    ),
    "awq of 4 bits in groups of 32 with zero points": (
        awq, lambda group: {"quant_method": "awq", "bits": 4, "group_size": group,
                            "zero_point": True, "version": "gemm"}, (32,), {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tiny_models, tmp_path_factory):
    """`stored(form)`: directories of a packed checkpoint and of its plain weights in bf16."""
    made = {}

    def make(form):
        if form in made:
            return made[form]
        torch.manual_seed(len(form))
        write, configure, sizes, options = FORMS[form]
        root = tmp_path_factory.mktemp("packed")
        said = {name: v for name, v in options.items() if name != "offset" and write is compressed}
        packed = copy_of(tiny_models["qwen3"], root / "packed", configure(*sizes, **said))
        plain = copy_of(tiny_models["qwen3"], root / "plain", None)
        tensors, kept = load_file(plain / "model.safetensors"), {}
        for name, tensor in list(tensors.items()):
            if not LAYER.search(name):
                kept[name] = tensor
                continue
            fields, weight = write(name, *tensor.shape, *sizes, **options)
            tensors[name] = weight.bfloat16()
            kept |= fields
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        save_file(kept, packed / "model.safetensors", metadata={"format": "pt"})
        made[form] = packed, plain
        return made[form]

    return make


def spec_of(directory, **changes):
    return replace(SPEC, model=str(directory), **changes)


@pytest.mark.parametrize("form", FORMS)
def test_both_arms_have_the_bits_of_the_plain_weights(form, stored):
    packed, plain = map(open_sampler, map(spec_of, stored(form)))
    said = transformers.AutoConfig.from_pretrained(stored(form)[0])
    assert read_quantisation(said).layout == form
    layer = packed.model.model.layers[1].mlp.down_proj
    assert type(layer).__name__ == "WeightOnlyLinear"
    assert layer.codes.dtype == torch.uint8
    for arm in ("invariant", "stock"):
        for batch_size in (1, 3):
            theirs = sampled(plain, arm, batch_size)
            assert sampled(packed, arm, batch_size) == theirs
    assert set(sampled(packed, "invariant", 5)) == set(sampled(packed, "invariant", 1))
    assert packed.notes[-1].startswith("stock arm: torch's products with weights dequantised")


@pytest.mark.parametrize("form", FORMS)
def test_dequantised_weights_are_the_plain_ones(form, stored):
    packed, plain = stored(form)
    sampler = open_sampler(spec_of(packed, dequantise=True))
    expected = load_file(plain / "model.safetensors")
    names = [name for name in expected if LAYER.search(name)]
    assert len(names) == 14
    for name in names:
        assert torch.equal(sampler.model.get_parameter(name), expected[name])


def test_another_code_has_other_bits(stored, tmp_path):
    """The control of the comparison above: one of 16384 codes is seen."""
    form = "gptq of 4 bits in groups of 32 with zero points"
    packed, plain = stored(form)
    changed = tmp_path / "model"
    changed.mkdir()
    for file in packed.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.qweight"][3, 5] ^= 8
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    got = sampled(open_sampler(spec_of(changed)), "invariant", 1)
    assert got != sampled(open_sampler(spec_of(plain)), "invariant", 1)


def test_random_weights_follow_their_seed(stored):
    directory = stored("compressed-tensors of 4 bits in groups of 32")[0]
    spec = spec_of(directory, arms=("invariant",))
    one, same, other = (open_sampler(replace(spec, random_weights=n)) for n in (1, 1, 2))
    assert one.describe() == same.describe()
    assert one.describe()["digest"] != other.describe()["digest"]
    layer = one.model.model.layers[1].self_attn.o_proj
    from ndcheck_kernels.ops.weight_only import dequantise

    std = dequantise(layer.packed, torch.float32).std().item()
    assert std == pytest.approx(one.model.config.initializer_range, rel=0.1)
    assert set(sampled(one, "invariant", 4)) == set(sampled(one, "invariant", 1))


REFUSED = {
    "gptq in the format 'marlin'": gptq_config(4, 128, checkpoint_format="marlin"),
    "gptq with settings of single layers": gptq_config(4, 128, dynamic={"-:lm_head": {}}),
    "gptq with settings that are not known": gptq_config(3, 128),
    "awq of 4 bits, version gemv": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "compressed-tensors as float-quantized": {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"a": {}},
    },
    "compressed-tensors with quantised activations": {
        **compressed_config(8, -1),
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {"a": 1}}
        },
    },
    "compressed-tensors with settings that are not known": {
        **compressed_config(4, 32), "config_groups": {"a": {"weights": {"strategy": "channel"}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_by_name(name, tiny_models, tmp_path):
    directory = copy_of(tiny_models["qwen3"], tmp_path / "model", REFUSED[name])
    with pytest.raises(UsageError, match=f"no batch-invariant kernel reads {name}"):
        open_sampler(spec_of(directory))


@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_has_the_scheme_of_the_most_specific_target(order):
    """As `match_targets` of compressed-tensors sorts them: names, expressions, classes."""
    groups = {
        size: {**compressed_config(4, size)["config_groups"]["group_0"], "targets": [target]}
        for target, size in (("Linear", 32), ("re:.*down_proj$", 64), ("1.down_proj", 128))
    }
    said = compressed_config(4, 32) | {"config_groups": dict([*groups.items()][::order])}
    layout, linear = read_packed(said), torch.nn.Linear(128, 128)
    found = [layout.scheme_of(name, linear) for name in ("1.up_proj", "0.down_proj", "1.down_proj")]
    assert [scheme.group_size for scheme in found] == [32, 64, 128]


@pytest.mark.parametrize("said", ["group", "dynamic", True])
def test_columns_in_order_of_activations_have_several_names(said):
    config = compressed_config(4, 32)
    config["config_groups"]["group_0"]["weights"]["actorder"] = said
    (scheme,) = read_packed(config).schemes
    assert scheme.has_order


SAID = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.sampled_from(
        ["Linear", "re:(", "group", "channel", "int", "pack-quantized", "gptq_v2", "gemm", ""]
    ),
    lambda part: st.lists(part, max_size=2) | st.dictionaries(
        st.sampled_from(["a", "weights", "targets", "num_bits", "strategy", "format"]), part
    ),
    max_leaves=8,
)  # fmt: skip


@given(
    st.sampled_from(METHODS),
    st.dictionaries(
        st.sampled_from([
            "config_groups", "format", "bits", "group_size", "version", "ignore", "dynamic", "sym",
            "modules_in_block_to_quantize", "modules_to_not_convert", "sparsity_config", "lm_head",
        ]),
        SAID,
    ),
)  # fmt: skip
@settings(deadline=None)
def test_what_a_config_says_may_be_anything(method, said):
    found = read_packed({"quant_method": method, **said})
    assert isinstance(found, str) or 0 < len(found.label) < 1000


def test_tensors_that_do_not_fit_are_named(stored, tmp_path):
    packed = stored("gptq of 4 bits in groups of 64 with zero points")[0]
    tensors = load_file(packed / "model.safetensors")

    def refused(match, change=None, config=None):
        to = tmp_path / match[:5]
        to.mkdir()
        for file in packed.iterdir():
            (to / file.name).write_bytes(file.read_bytes())
        if config:
            (to / "config.json").write_text(
                json.dumps(json.loads((to / "config.json").read_text())
                           | {"quantization_config": config})
            )  # fmt: skip
        save_file(
            {**tensors, **(change or {})}, to / "model.safetensors", metadata={"format": "pt"}
        )
        with pytest.raises(UsageError, match=match):
            open_sampler(spec_of(to))

    name = "model.layers.0.mlp.up_proj.g_idx"
    refused("mlp.up_proj: a column has a group", {name: torch.full((64,), 7, dtype=torch.int32)})
    refused("another shape", {name: torch.zeros(63, dtype=torch.int32)})
    refused("groups of 48 do not divide the 64 columns", config=gptq_config(4, 48))
    refused("missing from the checkpoint", config=compressed_config(4, 32))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_of_zeros_may_be_left_over(value, stored, tmp_path):
    """As tools for GPTQ store them for layers without; vLLM's loaders skip them."""
    packed = stored("gptq of 4 bits in groups of 32 with zero points")[0]
    directory = tmp_path / "model"
    shutil.copytree(packed, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.bias"] = torch.full((64,), value).half()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if value:
        with pytest.raises(UsageError, match="no place for 1 tensors"):
            open_sampler(spec_of(directory))
    else:
        found = sampled(open_sampler(spec_of(directory)), "invariant", 1)
        assert found == sampled(open_sampler(spec_of(packed)), "invariant", 1)


def test_experts_of_integers_are_refused(tmp_path):
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, intermediate_size=64, moe_intermediate_size=32, num_experts=2, vocab_size=4096,
        architectures=["Qwen3MoeForCausalLM"], quantization_config=gptq_config(4, 32),
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no kernel reads experts"):
        open_sampler(spec_of(tmp_path, random_weights=0))


def test_an_adapter_needs_plain_weights(stored, tmp_path):
    from ndcheck.samplers.local.loading import load_config, load_model

    spec = spec_of(stored("compressed-tensors of 4 bits in groups of 32")[0])
    config = load_config(spec.model, spec)
    with pytest.raises(UsageError, match="merged into plain weights: --dequantise"):
        load_model(spec.model, config, spec, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize("change", [{"tensor_parallel": 2}, {"tp_groups": 2}])
def test_parts_are_refused(change, stored):
    from ndcheck.samplers.local.checkpoint.quantised import check_quantisation

    directory = stored("compressed-tensors of 4 bits in groups of 32")[0]
    found = read_quantisation(transformers.AutoConfig.from_pretrained(directory))
    with pytest.raises(UsageError, match="is not cut into parts: --dequantise"):
        check_quantisation("m", found, spec_of(directory, **change))


def test_a_cache_that_the_config_alone_quantises_is_named(stored, tmp_path, caplog):
    """Of weights in 4 bits, where such a config was refused."""
    packed, _ = stored("compressed-tensors of 4 bits in groups of 32")
    said = json.loads((packed / "config.json").read_text())["quantization_config"]
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}
    directory = copy_of(packed, tmp_path / "model", said | {"kv_cache_scheme": scheme})
    expected = open_sampler(spec_of(packed))
    assert "quantised cache" not in caplog.text
    sampler = open_sampler(spec_of(directory, kv_cache_dtype="fp8"))
    assert "(kv_cache_scheme) is not followed: keys and values are e4m3 without" in caplog.text
    assert sampler.describe()["digest"] == expected.describe()["digest"]
