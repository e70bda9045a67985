"""A whole layer of experts through what `cuda.experts` registers.

Without a GPU these registrations stand in for the CPU's, under the interpreter.
"""

import pytest
import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.cuda import experts as cuda_experts
from ndcheck_kernels.cuda import routing
from ndcheck_kernels.measure.reference import experts_reference
from ndcheck_kernels.models import experts
from ndcheck_kernels.ops.experts import combine_op, route_op
from ndcheck_kernels.scope import registry

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "experts_implementation": experts.NAME,
}
OPS = (torch.ops.aten._grouped_mm.default, route_op, combine_op)


@pytest.fixture(autouse=True)
def expert_registrations(device, monkeypatch):
    assert cuda_experts
    registry.covered_ops(device)
    experts.register_experts()
    if device == "cpu":
        for op in OPS:
            monkeypatch.setitem(
                registry._implementations["cpu"], op, registry._implementations["cuda"][op]
            )
        registry.resolved.clear()
    yield
    registry.resolved.clear()


def build(layer_class, config_class, dtype, device):
    layer = layer_class(config_class(**SIZES)).eval().requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.to(device, dtype)


def apply(layer, rows):
    with invariant_kernels() as scope:
        out = layer(rows[None])
    assert scope.fires["_grouped_mm"] == 2
    assert scope.fires["route_experts"] == scope.fires["combine_experts"] == 1
    return (out[0] if isinstance(out, tuple) else out)[0]


@pytest.mark.parametrize("most_counted", [0, 4096], ids=["sorting", "counting"])
@pytest.mark.parametrize(
    ("layer_class", "config_class"),
    [
        (MixtralSparseMoeBlock, transformers.MixtralConfig),
        (GptOssMLP, transformers.GptOssConfig),
    ],
    ids=["stacked", "transposed, biased"],
)
def test_a_token_does_not_depend_on_the_others(
    layer_class, config_class, most_counted, dtype, device, monkeypatch, assert_batch_invariant
):
    monkeypatch.setattr(routing, "MOST_COUNTED", most_counted)
    layer = build(layer_class, config_class, dtype, device)
    rows = torch.randn(18, SIZES["hidden_size"], device=device).to(dtype)
    # The neighbours that are NaN choose experts too.
    assert_batch_invariant(lambda x: apply(layer, x), rows, [1, 2, 17])


def test_accuracy(dtype, device, assert_accurate):
    layer = build(MixtralSparseMoeBlock, transformers.MixtralConfig, dtype, device)
    rows = torch.randn(11, SIZES["hidden_size"], device=device).to(dtype)
    _, weights, index = layer.gate(rows)
    own = layer.experts
    exact = experts_reference(rows, own.gate_up_proj, own.down_proj, index, weights)
    with invariant_kernels():
        ours = own(rows, index, weights)
    own.config._experts_implementation = "eager"
    assert_accurate(ours, exact, own(rows, index, weights))
