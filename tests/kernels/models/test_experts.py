"""A mixture of experts on CPU: a token's bits do not depend on which others chose its experts."""

from __future__ import annotations

import pytest
import torch
import transformers

from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.measure.reference import experts_reference
from ndcheck_kernels.models import experts

DTYPES = [torch.float32, torch.bfloat16]
HIDDEN, INNER, EXPERTS, TOP_K = 64, 48, 8, 2
MIXTRAL = transformers.MixtralConfig(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_local_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    experts_implementation=experts.NAME,
)
# Transposed weights, interleaved gates, biases.
GPT_OSS = transformers.GptOssConfig(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_local_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    experts_implementation=experts.NAME,
)


@pytest.fixture(scope="module")
def build():
    """`build(config, dtype)`: transformers' router and experts with random weights."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts.register_experts()

    def make(config, dtype):
        torch.manual_seed(0)
        layer = (GptOssMLP if config is GPT_OSS else MixtralSparseMoeBlock)(config)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return layer.to(dtype).eval().requires_grad_(False)

    return make


def apply(layer, rows):
    with invariant_kernels():
        out = layer(rows[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


def set_experts(layer, implementation):
    layer.experts.config._experts_implementation = implementation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS], ids=["stacked", "transposed, biased"])
def test_a_token_does_not_depend_on_the_others(
    config, dtype, build, noise_rows, find_violations, threads
):
    layer = build(config, dtype)
    assert find_violations(lambda rows: apply(layer, rows), noise_rows(HIDDEN, dtype)) == []


def test_stock_fails_the_same_check(build, noise_rows, find_violations):
    layer = build(MIXTRAL, torch.float32)
    set_experts(layer, "grouped_mm")
    found = find_violations(lambda rows: layer(rows[None])[0], noise_rows(HIDDEN, torch.float32))
    set_experts(layer, experts.NAME)
    assert found


def test_a_capacity_limit_is_caught(build, noise_rows, find_violations):
    """The planted fault: an expert takes its first tokens only, so neighbours decide who is in."""
    layer = build(MIXTRAL, torch.float32)

    def limited(rows):
        with invariant_kernels():
            _, weights, index = layer.gate(rows)
            place = torch.nn.functional.one_hot(index, EXPERTS).sum(1).cumsum(0)
            weights = weights * (place.gather(1, index) <= 20)
            return layer.experts(rows, index, weights)

    assert "another order" in find_violations(limited, noise_rows(HIDDEN, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_are_as_accurate_as_stock(dtype, build):
    layer = build(MIXTRAL, dtype)
    rows = torch.randn(37, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, weights, index = layer.gate(rows)
    expected = experts_reference(
        rows, layer.experts.gate_up_proj, layer.experts.down_proj, index, weights
    )
    errors = {}
    for implementation in ("grouped_mm", experts.NAME):
        set_experts(layer, implementation)
        with invariant_kernels():
            out = layer.experts(rows, index, weights)
        errors[implementation] = (out.double() - expected).abs().max()
    assert errors[experts.NAME] <= 1.1 * errors["grouped_mm"]


@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS], ids=["stacked", "transposed, biased"])
def test_all_implementations_agree_in_float64(config, build):
    """Biases, gates and layouts are understood as the model's own code understands them."""
    layer = build(config, torch.float64)
    rows = torch.randn(9, HIDDEN, dtype=torch.float64)
    ours = apply(layer, rows)
    set_experts(layer, "eager")
    own = layer(rows[None])
    set_experts(layer, experts.NAME)
    assert torch.allclose(ours, (own[0] if isinstance(own, tuple) else own)[0], atol=1e-12)


def test_the_order_of_the_choice_changes_no_bit(build):
    layer = build(MIXTRAL, torch.bfloat16)
    rows = torch.randn(21, HIDDEN).bfloat16()
    with invariant_kernels():
        _, weights, index = layer.gate(rows)
        one = layer.experts(rows, index, weights)
        other = layer.experts(rows, index.flip(-1), weights.flip(-1))
    assert torch.equal(one, other)


def test_a_loop_over_experts_runs_too(build, find_violations, noise_rows):
    """Experts in a module list add to their tokens one after the other, each to a token once."""
    layer = build(MIXTRAL, torch.float32)
    set_experts(layer, "eager")
    found = find_violations(lambda rows: apply(layer, rows), noise_rows(HIDDEN, torch.float32))
    set_experts(layer, experts.NAME)
    assert found == []


def test_ties_go_to_the_lowest_index(find_violations):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (300, 64), generator=generator).float()
    with invariant_kernels():
        values, places = scores.topk(8)
        smallest = scores.topk(8, largest=False).indices
    order = [sorted(range(64), key=lambda i, row=row: (-row[i], i))[:8] for row in scores.tolist()]
    assert places.tolist() == order
    assert torch.equal(values, scores.gather(1, places))
    assert smallest.tolist() == [
        sorted(range(64), key=lambda i, row=row: (row[i], i))[:8] for row in scores.tolist()
    ]


def test_several_rows_added_to_one_are_refused():
    x, source = torch.zeros(3, 2), torch.ones(2, 2)
    with invariant_kernels() as scope:
        assert x.index_add(0, torch.tensor([2, 0]), source).tolist() == [[1, 1], [0, 0], [1, 1]]
        with pytest.raises(UncoveredOpError, match="several rows are added to one"):
            x.index_add(0, torch.tensor([1, 1]), source)
    assert scope.fires["index_add"] == 2


def test_quantised_experts_are_refused(build):
    layer = build(MIXTRAL, torch.bfloat16)
    narrow = layer.experts.down_proj.to(torch.float8_e4m3fn)
    layer.experts.down_proj = torch.nn.Parameter(narrow, requires_grad=False)
    with pytest.raises(UncoveredOpError, match=r"experts .*float8.* in experts .*down_proj"):
        apply(layer, torch.randn(3, HIDDEN).bfloat16())
