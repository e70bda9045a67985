"""Fused decoder layers with FP8 weights: the bits' company, and the unfused layers' numbers."""

import pytest
import torch
import transformers

from ndcheck_kernels import invariant_kernels, register_attention
from ndcheck_kernels.models import decoder, experts
from ndcheck_kernels.models.quantised import invariant_fp8_layers

from .test_decoder import OTHERS, PROBE, logits_of

SIZES = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "initializer_range": 0.1,
}  # fmt: skip
MIXTURE = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **MIXTURE),
}

pytestmark = pytest.mark.usefixtures("cuda_registrations")


@pytest.fixture
def make_model(with_fp8_weights, device):
    def make(family, **layout):
        register_attention()
        experts.register_experts()
        torch.manual_seed(0)
        config = CONFIGS[family]()
        config._attn_implementation = config._experts_implementation = experts.NAME
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return with_fp8_weights(model, **layout).to(device).eval()

    return make


ONE_SCALE = {"weight_block_size": None}
STATIC = {**ONE_SCALE, "activation_scheme": "static"}
# Half a minute each under the interpreter.
SLOW = [] if torch.cuda.is_available() else pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param("qwen2", {}, marks=SLOW),
        pytest.param("qwen3", {}, marks=SLOW),
        ("qwen3-moe", {}),
        pytest.param("qwen2", ONE_SCALE, marks=SLOW),
        pytest.param("qwen3", ONE_SCALE, marks=SLOW),
        ("qwen3-moe", STATIC),
    ],
)
def test_fused_fp8_layers(family, layout, make_model):
    model = make_model(family, **layout)
    with invariant_fp8_layers(model), invariant_kernels() as scope:
        plain = logits_of(model, [PROBE, OTHERS[0]], steps=[4])
        before = scope.fires.copy()
        with decoder.fused_layers(model) as n_layers:
            fused = logits_of(model, [PROBE, OTHERS[0]], steps=[4])
            alone = logits_of(model, [PROBE], steps=[4])[0]
            together = logits_of(model, [OTHERS[1], PROBE], steps=[4])[-1]
    assert n_layers == 2
    fires, kind = scope.fires - before, "row" if layout else "block"
    assert fires[f"{kind}_fp8_grouped"] == (16 if family == "qwen3-moe" else 0) // 2 * 3
    assert fires[f"{kind}_fp8_linear"] > 0
    assert torch.equal(together, alone)
    assert torch.equal(fused[0], alone)
    # A fused layer rounds less often, so codes next to a tie go the other way, by a 16th, and an
    # expert that was chosen by a hair may be another. Two prompts differ by far more.
    scale = plain.float().norm()
    changed, between = ((a - b).float().norm() / scale for a, b in ((fused, plain), fused))
    assert changed < min(2.0**-2, between / 3), (changed, between)


def test_weights_whose_blocks_would_span_two_are_not_joined(make_model):
    model = make_model("qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_proj.out_features = 96
    with decoder.fused_layers(model) as n_layers:
        assert n_layers == 0
