import pytest
import torch

from ndcheck_kernels import sampling


def test_greedy_takes_the_lowest_of_the_largest(dtype, device):
    logits = torch.randn(6, 5000, device=device).to(dtype)
    logits[0, 4000] = logits[0, 17] = 9
    logits[1] = 3
    logits[2, [5, 9]] = float("nan")
    logits[3] = float("-inf")
    logits[4] = 0.0
    logits[4, :7] = -0.0
    assert sampling.greedy(logits)[:5].tolist() == [17, 0, 5, 0, 0]
    assert sampling.greedy(logits)[5] == logits[5].argmax()


def test_a_request_draws_the_same_tokens_in_any_company(dtype, device):
    logits = torch.randn(40, 5000, device=device).to(dtype)
    seeds, positions = torch.arange(40), torch.arange(40) * 3
    together = sampling.gumbel(logits, seeds, positions, 0.7)
    assert len(set(together.tolist())) > 30
    for i in (0, 17, 39):
        alone = sampling.gumbel(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1], 0.7)
        assert torch.equal(alone, together[i : i + 1])
    order = torch.randperm(40)
    shuffled = sampling.gumbel(logits[order.to(device)], seeds[order], positions[order], 0.7)
    assert torch.equal(shuffled, together[order.to(device)])


def test_seeds_that_follow_the_row_are_caught(device):
    """The fault: noise by place in the batch instead of by request."""
    logits = torch.zeros(4, 5000, device=device)
    position = torch.zeros(4, dtype=torch.int64)
    by_row = sampling.gumbel(logits, torch.arange(4), position)
    assert not torch.equal(by_row[1:2], sampling.gumbel(logits[:1], torch.arange(1), position[:1]))


def test_draws_follow_the_distribution(device):
    n = 4000
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1], device=device)).expand(n, 4)
    draws = sampling.gumbel(logits, torch.full((n,), 7), torch.arange(n))
    share = torch.bincount(draws, minlength=4).double().cpu() / n
    assert (share - torch.tensor([0.5, 0.25, 0.15, 0.1])).abs().max() < 0.03


def test_a_low_temperature_is_greedy(device):
    logits = torch.randn(8, 100, device=device)
    seeds = torch.arange(8)
    assert torch.equal(sampling.gumbel(logits, seeds, seeds, 1e-4), sampling.greedy(logits))


@pytest.mark.parametrize(
    "op", [sampling.greedy, lambda x: sampling.gumbel(x, *[torch.zeros(0)] * 2)]
)
def test_empty_batch(op, device):
    assert op(torch.empty(0, 10, device=device)).shape == (0,)
