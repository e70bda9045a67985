"""Fused decoder layers with packed weights have the bits of those with plain ones."""

import pytest
import torch
import transformers

from ndcheck_kernels import invariant_kernels, register_attention
from ndcheck_kernels.models import decoder, experts
from ndcheck_kernels.models.weight_only import WeightOnlyLinear
from ndcheck_kernels.ops.weight_only import dequantise, quantise

from ..test_decoder import OTHERS, PROBE, logits_of  # noqa: TID252 - `tests` is no package

SIZES = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("cuda_registrations")


@pytest.fixture
def make_models(device):
    """Two models of equal weights: packed in 4 and 8 bits, and plain."""

    def make():
        register_attention()
        experts.register_experts()
        torch.manual_seed(0)
        config = transformers.Qwen2Config(**SIZES)  # Its projections have biases.
        config._attn_implementation = experts.NAME
        made = []
        for _ in range(2):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
            for name, parameter in model.named_parameters():
                if "norm" in name or "bias" in name:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            made.append(model.eval())
        packed_model, plain = made
        for path, linear in list(packed_model.model.named_modules()):
            if type(linear) is not torch.nn.Linear:
                continue
            bits = 8 if "down" in path else 4
            packed = quantise(linear.weight.detach(), bits, 64, is_symmetric="mlp" in path)
            weight = dequantise(packed, torch.float16)
            plain.model.get_submodule(path).weight.data = weight
            packed_model.model.set_submodule(path, WeightOnlyLinear(packed, linear.bias))
        return packed_model.to(device), plain.to(device)

    return make


def test_fused_packed_layers(make_models):
    packed, plain = make_models()
    found = []
    for model in (packed, plain):
        with invariant_kernels() as scope, decoder.fused_layers(model) as n_layers:
            found.append(logits_of(model, [*OTHERS, PROBE], steps=[4]))
            alone = logits_of(model, [PROBE], steps=[4])[0]
        assert n_layers == 1
        assert torch.equal(found[-1][-1], alone)
        assert scope.fires["weight_only_linear"] == (16 if model is packed else 0)
    assert torch.equal(*found)
    assert not torch.equal(found[0][0], found[0][-1])


def test_parts_stay_views_of_the_whole(make_models):
    packed, _ = make_models()
    before = packed.model.layers[0].self_attn.k_proj
    weight = dequantise(before.packed, torch.float32)
    (layer,) = decoder.join_weights(packed)
    own = layer.self_attn
    joined = layer._joined_qkv.weight
    assert own.k_proj.codes.data_ptr() == joined.codes[own.q_proj.out_features].data_ptr()
    assert torch.equal(dequantise(own.k_proj.packed, torch.float32), weight)
    parts = [dequantise(p.packed, torch.float32) for p in (own.q_proj, own.k_proj, own.v_proj)]
    assert torch.equal(dequantise(joined, torch.float32), torch.cat(parts))


def test_groups_of_two_kinds_are_not_joined(make_models):
    packed, _ = make_models()
    own = packed.model.layers[0].self_attn
    wide = dequantise(own.k_proj.packed, torch.float32)
    own.k_proj = WeightOnlyLinear(quantise(wide, 8, 64, is_symmetric=False), own.k_proj.bias)
    assert decoder.join_weights(packed) == []
