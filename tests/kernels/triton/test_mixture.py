"""The fused choice of experts: torch's numbers, ties to the lowest, one token's bits for any T."""

import pytest
import torch

from ndcheck_kernels.cuda.products.grouped_matmul import combine
from ndcheck_kernels.cuda.routing import choose, choose_routes
from ndcheck_kernels.ops.experts import route_by_sorting


@pytest.mark.parametrize("experts", [5, 32, 128])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_largest_k_of_the_softmax(experts, normalise, dtype, device):
    logits = torch.randn(7, experts, device=device).to(dtype)
    weights, index = choose(logits, 4, normalise)
    values, expected = logits.double().softmax(-1).sort(descending=True, stable=True)
    expected_weights = values[:, :4] / (values[:, :4].sum(-1, keepdim=True) if normalise else 1)
    assert torch.equal(index, expected[:, :4])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weights.double(), expected_weights, rtol=2 * eps, atol=1e-6)


def test_ties_go_to_the_lowest_expert(device, dtype):
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 1.0]], device=device, dtype=dtype)
    assert choose(logits, 4, True)[1].tolist() == [[1, 3, 4, 2]]


def test_a_token_has_the_same_bits_in_any_company(device, dtype, assert_batch_invariant):
    rows = torch.randn(18, 60, device=device).to(dtype)
    assert_batch_invariant(lambda x: choose(x, 8, True)[0], rows, [1, 2, 17])
    assert_batch_invariant(lambda x: choose(x, 8, True)[1].double(), rows, [1, 2, 17])


def test_nan_chooses_an_expert_that_exists(device, dtype):
    logits = torch.full((1, 6), torch.nan, device=device, dtype=dtype)
    weights, index = choose(logits, 3, True)
    assert weights.isnan().all()
    assert ((index >= 0) & (index < 6)).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_routes_of_chosen_experts_are_those_of_sorting(tokens, device, dtype):
    logits = torch.randn(tokens, 60, device=device).to(dtype)
    weights, index = choose(logits, 6, True)
    wanted = route_by_sorting(index, weights, 60)
    for ours, sorts in zip(choose_routes(logits, 6, True), wanted, strict=True):
        assert ours.dtype == sorts.dtype
        assert torch.equal(ours, sorts)


def test_the_residual_is_added_before_the_one_rounding(device, dtype):
    rows = torch.randn(6, 16, device=device).to(dtype)
    place = torch.tensor([[0, 3], [5, 1], [2, 4]], device=device)
    weights = torch.rand(3, 2, device=device).to(dtype)
    residual = torch.randn(3, 16, device=device).to(dtype)
    exact = (rows.double()[place] * weights.double()[..., None]).sum(1) + residual.double()
    ours = combine(rows, place, weights, residual)
    assert (ours.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert not torch.equal(ours, combine(rows, place, weights))


def test_refusals(device):
    with pytest.raises(ValueError, match="7 of 6 experts"):
        choose(torch.zeros(1, 6, device=device), 7, True)
    rows, place = torch.zeros(2, 4, device=device), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="combine cannot add"):
        combine(rows, place, torch.zeros(2, 1, device=device), torch.zeros(3, 4, device=device))
