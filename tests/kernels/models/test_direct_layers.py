"""Layers without a dispatch per op: the bits that the mode gives transformers' own layers."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

from ndcheck_kernels import UncoveredOpError, invariant_kernels, invariant_model
from ndcheck_kernels.models import direct_layers as module
from ndcheck_kernels.models.caches.argument import cache_argument
from ndcheck_kernels.models.direct_layers import direct_layers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": None,
}
FAMILIES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {},
}
ROWS = [[5, 17, 90, 33, 21, 8, 64, 2, 11], [3, 9, 77], [4, 40, 41, 42, 43, 44, 45]]


@pytest.fixture
def make_model():
    def make(family, dtype=torch.bfloat16):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
        return model

    return make


@torch.inference_mode()
def logits_of(model, pieces=(6, 3, 1)):
    """Logits after each piece of the padded rows, the last ones being steps: [pieces, B, V]."""
    length = max(map(len, ROWS))
    ids = torch.tensor([[0] * (length - len(row)) + row + [7] for row in ROWS])
    pads = torch.tensor([[length - len(row)] for row in ROWS])
    mask = (torch.arange(length + 1) >= pads).long()
    cache = transformers.StaticCache(config=model.config, max_cache_len=length + 1)
    found, begin = [], 0
    for size in pieces:
        columns = torch.arange(begin, begin + size)
        out = model(
            input_ids=ids[:, begin : begin + size],
            attention_mask=mask,
            position_ids=(columns - pads).clamp(min=0),
            logits_to_keep=1,
            **{cache_argument(model.forward): cache},
        )
        found.append(out.logits[:, -1])
        begin += size
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_direct_layers_have_the_bits_of_transformers_own(family, dtype, make_model):
    model = make_model(family, dtype)
    with invariant_model(model):
        with invariant_kernels() as scope:
            own = logits_of(model)
            n_fires = scope.fires.copy()
        with direct_layers(model) as n_layers, invariant_kernels() as scope:
            assert n_layers == 2
            assert "forward" in vars(model.model.norm)
            assert torch.equal(logits_of(model), own)
    assert {"linear", "attention", "mean", "rsqrt", "silu"} <= set(scope.fires)
    # As many, but for what a layer does with one op fewer: its squares are products at once.
    assert n_fires - scope.fires == {"pow": n_fires["pow"] - scope.fires["pow"]}
    assert "forward" not in {**vars(model.model.layers[0]), **vars(model.model.norm)}


def test_heads_with_norms_of_their_own_epsilon_are_left_alone(make_model):
    model = make_model("Qwen3")
    model.model.layers[1].self_attn.k_norm.variance_epsilon = 1e-3
    with invariant_model(model), direct_layers(model) as n_layers:
        assert n_layers == 0


@pytest.mark.parametrize("fault", ["_rotate", "_norm"])
def test_layers_that_compute_other_bits_are_left_alone(fault, make_model, monkeypatch):
    right = getattr(module, fault)
    monkeypatch.setattr(module, fault, lambda *args: right(*args) * 1.01)
    model = make_model("Qwen3")
    with (
        invariant_model(model),
        pytest.warns(UserWarning, match="Qwen3DecoderLayer runs op by op"),
        direct_layers(model) as n_layers,
    ):
        assert n_layers == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_layers_of_the_same_name_are_left_alone(family, make_model):
    model = make_model(family)
    layer = model.model.layers[1]  # The first one's bits are those of transformers' own.
    usual = type(layer)

    @functools.wraps(usual.forward)
    def forward(self, hidden_states, *args, **kwargs):
        out = usual.forward(self, hidden_states, *args, **kwargs)
        return hidden_states + (out - hidden_states) * self.self_attn.layer_idx / 4

    kind = type(usual.__name__, (usual,), {"forward": forward})
    for each in model.model.layers:
        each.__class__ = kind
    with invariant_model(model), invariant_kernels():
        own = logits_of(model)
    with invariant_model(model), direct_layers(model), invariant_kernels():
        assert torch.equal(logits_of(model), own)


def test_hooks_and_other_modules_keep_the_layers_as_they_are(make_model):
    model = make_model("Qwen3")
    own = model.model.layers[1].self_attn
    hook = own.q_proj.register_forward_hook(lambda *_: None)
    with invariant_model(model), direct_layers(model) as n_layers:
        assert n_layers == 0
    hook.remove()
    for part in (own.q_proj, own.q_norm):
        usual = type(part)
        part.__class__ = type("Other", (usual,), {})
        with invariant_model(model), direct_layers(model) as n_layers:
            assert n_layers == 0
        part.__class__ = usual
    with invariant_model(model), direct_layers(model) as n_layers:
        assert n_layers == 2


class Nothing(torch.nn.Identity):
    """In the place of attention, as pruned models have it, which gives weights beside."""

    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states), None


Nothing.__module__ = "torch.nn.modules.linear"
OTHERS = {
    "mlp": lambda layer: torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.1)).eval(),
    "self_attn": lambda layer: Nothing(),
    "input_layernorm": lambda layer: torch.nn.LayerNorm(48).bfloat16(),
    "post_attention_layernorm": lambda layer: torch.nn.Identity(),
}


@pytest.mark.parametrize("part", OTHERS)
def test_a_layer_with_another_part_is_computed_by_its_own_code(part, make_model):
    """Whoever's class it is: a model's code may put torch's in the place of transformers'."""
    model = make_model("Llama")
    for layer in model.model.layers:
        setattr(layer, part, OTHERS[part](layer))
    with invariant_model(model), invariant_kernels():
        own = logits_of(model)
    with invariant_model(model), direct_layers(model) as n_layers, invariant_kernels():
        assert n_layers == 0
        assert torch.equal(logits_of(model), own)


def test_heads_with_other_norms_are_left_alone(make_model):
    model = make_model("Qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_norm = torch.nn.LayerNorm(16).bfloat16()
    with invariant_model(model), direct_layers(model) as n_layers:
        assert n_layers == 0


def test_what_is_not_covered_is_refused_by_the_name_of_its_module(make_model):
    model = make_model("Qwen3", torch.float32)
    with invariant_model(model), direct_layers(model), invariant_kernels():
        torch.set_float32_matmul_precision("high")
        try:
            with pytest.raises(UncoveredOpError, match=r"layers\.0\.self_attn\.q_proj"):
                logits_of(model)
        finally:
            torch.set_float32_matmul_precision("highest")


def test_another_mode_sees_every_op(make_model):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    model = make_model("Qwen3")
    with invariant_model(model), direct_layers(model), invariant_kernels(), Watch():
        logits_of(model, pieces=(9,))
    assert seen.count("aten::linear") == 2 * 7 + 1
