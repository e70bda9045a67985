"""FP8 models on CPU: a row's bits in any company, numbers near the dequantised ones', refusals."""

import copy

import pytest
import torch
import transformers

import ndcheck_kernels
from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.ops import row_fp8
from ndcheck_kernels.ops.block_fp8 import dequantise

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.1,
}  # fmt: skip
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**SIZES),
    "Qwen2": lambda: transformers.Qwen2Config(**SIZES),  # Its projections have biases.
    "Qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "Qwen3-MoE": lambda: transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2
    ),
}


@pytest.fixture
def build(with_fp8_weights):
    def make(family, dtype=torch.bfloat16, **options):
        torch.manual_seed(0)
        plain = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
        return with_fp8_weights(plain, **options).eval()

    return make


def logits(model, rows, dtype=torch.bfloat16):
    """Last logits of rows of ids, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with ndcheck_kernels.invariant_model(model), invariant_kernels() as scope, torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert not scope.missing()
    assert scope.fires["block_fp8_linear"] or scope.fires["row_fp8_linear"]
    return out, scope


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_row_has_its_bits_in_any_company(family, dtype, build):
    model = build(family, dtype)
    probe, others = list(range(3, 20)), [[1, 2, 3], list(range(40)), [5] * 17]
    alone, scope = logits(model, [probe])
    together = logits(model, [others[0], probe, *others[1:], probe])[0]
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[4], alone[0])
    assert not torch.equal(logits(model, [[*probe[:-1], 33]])[0], alone)
    assert scope.fires["block_fp8_grouped"] == (4 if family == "Qwen3-MoE" else 0)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_row_of_one_scale_has_its_bits_in_any_company(family, scheme, build):
    model = build(family, weight_block_size=None, activation_scheme=scheme)
    probe, others = list(range(3, 20)), [[1, 2, 3], list(range(40)), [5] * 17]
    alone, scope = logits(model, [probe])
    together = logits(model, [others[0], probe, *others[1:], probe])[0]
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[4], alone[0])
    assert not torch.equal(logits(model, [[*probe[:-1], 33]])[0], alone)
    assert scope.fires["row_fp8_grouped"] == (4 if family == "Qwen3-MoE" else 0)
    assert not scope.fires["block_fp8_linear"]


LAYOUTS = [
    {},
    {"weight_block_size": None},
    {"weight_block_size": None, "activation_scheme": "static"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["blocks", "one scale", "static"])
@pytest.mark.parametrize("family", CONFIGS)
def test_numbers_are_those_of_the_dequantised_weights_within_the_format(family, layout, build):
    """The reference is transformers' own model in float64, whose rows are not quantised."""
    model = build(family, torch.float32, **layout)
    plain = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float64)
    plain.set_experts_implementation("eager")
    stored = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        scales = stored.get(f"{name}_scale_inv")
        value = stored[name]
        if scales is not None and layout:
            flat = scales.reshape(-1) if value.dim() == 2 else scales.reshape(len(value), -1)
            value = row_fp8.dequantise(value, flat, torch.float32)
        elif scales is not None:
            value = dequantise(value, scales, torch.float32)
        parameter.data = value.double()
    ids = list(range(3, 20))
    with torch.no_grad():
        exact = plain(torch.tensor([ids])).logits[0, -1]
    got = logits(model, [ids])[0][0].double()
    error = (got - exact).norm() / exact.norm()
    assert error < 2.0**-2  # Half a unit of e4m3 for each of four products in each of two layers.
    other = logits(model, [[*ids[:-1], 33]])[0][0].double()
    assert (other - exact).norm() / exact.norm() > 3 * error


def test_the_model_has_its_own_layers_again(build):
    model = build("Qwen3-MoE")
    before = {name: m.forward for name, m in model.named_modules()}
    with ndcheck_kernels.invariant_model(model):
        assert (
            model.model.layers[0].self_attn.q_proj.forward
            != before["model.layers.0.self_attn.q_proj"]
        )
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_block_size": (64, 128)}, "weight: blocks of 64 x 128, where 128 x 128"),
        (
            {"activation_scheme": "static"},
            "weight: its rows are quantised by a scale from",
        ),
        ({"scale_fmt": "ue8m0"}, "weight: its scales are torch.float8_e8m0fnu"),
    ],
)
def test_other_fp8_is_refused_by_name(options, reason):
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["Qwen3"]())
    config = transformers.FineGrainedFP8Config(**options)
    replace_with_fp8_linear(model, ["lm_head"], config, pre_quantized=True)
    with (
        pytest.raises(UncoveredOpError, match=rf"0.self_attn.q_proj \(FP8Linear\): {reason}"),
        ndcheck_kernels.invariant_model(model),
    ):
        pass


def test_experts_whose_blocks_span_gates_and_values_are_refused():
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    config = copy.copy(CONFIGS["Qwen3-MoE"]())
    config.moe_intermediate_size = 96
    model = transformers.AutoModelForCausalLM.from_config(config)
    options = transformers.FineGrainedFP8Config()
    replace_with_fp8_linear(model, ["lm_head"], options, pre_quantized=True)
    with (
        pytest.raises(UncoveredOpError, match=r"would span gates and values of 96 features"),
        ndcheck_kernels.invariant_model(model),
    ):
        pass
