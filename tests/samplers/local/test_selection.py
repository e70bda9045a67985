"""Token choice and bit records: exact, and independent of the rows beside it."""

from __future__ import annotations

import pytest
import torch

from ndcheck.records import Decoding, Fault
from ndcheck.samplers.local.decoding.selection import (
    choose_tokens,
    digest_row,
    gumbel_noise,
    plant_in_logits,
    read_step,
)
from ndcheck_kernels.measure.reference import digest_reference

GREEDY = Decoding(8)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_logits(rows=16, vocabulary=300, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator) * 8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_id(dtype):
    logits = torch.zeros(3, 7, dtype=dtype)
    logits[0, 2] = logits[0, 5] = 4
    logits[1, 6] = 1
    token_ids, margins = read_step(logits, GREEDY, None)[:2]
    assert token_ids.tolist() == [2, 6, 0]
    assert margins.tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_choice_does_not_depend_on_the_batch(dtype, temperature):
    logits = random_logits(dtype=dtype)
    decoding = Decoding(8, temperature, seed=3)
    noise = gumbel_noise(3, 5, logits.shape[-1]) if temperature else None
    together = read_step(logits, decoding, noise)
    for row in range(logits.shape[0]):
        alone = read_step(logits[row : row + 1], decoding, noise)
        assert [part[0] for part in alone] == [part[row] for part in together]


def test_gumbel_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    draws = [
        int(choose_tokens(logits, 1.0, gumbel_noise(1, position, 3))[0]) for position in range(4000)
    ]
    shares = torch.bincount(torch.tensor(draws), minlength=3) / len(draws)
    assert torch.allclose(shares, torch.softmax(logits[0], 0), atol=0.03)


def test_gumbel_noise_is_a_function_of_seed_and_position():
    assert torch.equal(gumbel_noise(1, 2, 50), gumbel_noise(1, 2, 50))
    assert not torch.equal(gumbel_noise(1, 2, 50), gumbel_noise(1, 3, 50))
    assert not torch.equal(gumbel_noise(1, 2, 50), gumbel_noise(2, 2, 50))


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_sees_one_bit(dtype):
    row = random_logits(1, dtype=dtype)[0]
    integers = {2: torch.int16, 4: torch.int32}[row.element_size()]
    flipped = row.clone()
    flipped.view(integers)[17] ^= 1
    assert digest_row(row) == digest_row(row.clone())
    assert digest_row(row) != digest_row(flipped)
    assert digest_row(torch.stack([row, row])[1]) == digest_row(row)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_fault_moves_one_ulp_then_another_token_is_drawn(dtype, temperature):
    logits = random_logits(dtype=dtype)
    fault = Fault(latent_at=1, fork_at=4)
    decoding = Decoding(8, temperature, seed=3)
    noise = gumbel_noise(3, 5, logits.shape[-1]) if temperature else None
    # A draw by NumPy in float64, and the argmax that it is not where noise decides.
    scores = logits.double().numpy() / (temperature or 1)
    before = (scores + (0 if noise is None else noise.numpy())).argmax(-1)
    assert (before != scores.argmax(-1)).any() == bool(temperature)

    def drawn(faulty):
        return read_step(faulty, decoding, noise).token_ids.numpy()

    assert plant_in_logits(logits, 0, fault, decoding, noise) is logits
    latent = plant_in_logits(logits, 1, fault, decoding, noise)
    assert (drawn(latent) == before).all()
    assert (latent != logits).sum(dim=-1).tolist() == [1] * logits.shape[0]
    integers = {2: torch.int16, 4: torch.int32}[logits.element_size()]
    assert (latent.view(integers) - logits.view(integers)).abs().max() == 1
    assert (drawn(plant_in_logits(logits, 4, fault, decoding, noise)) != before).all()


def test_a_reading_holds_the_logprob_and_the_digest_of_the_row():
    logits = random_logits(3)
    reading = read_step(logits, GREEDY, None)
    expected = torch.log_softmax(logits.double(), 1).amax(1)
    torch.testing.assert_close(reading.logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    assert reading.digests.tolist() == [digest_row(row) for row in logits]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_nobody_asks_for_get_a_token_and_no_more(dtype):
    logits = random_logits(dtype=dtype)
    before = logits.clone()
    whole, part = read_step(logits, GREEDY, None), read_step(logits, GREEDY, None, (3, 9))
    others = [row for row in range(len(logits)) if row not in (3, 9)]
    for of_all, of_two in zip(whole, part, strict=True):
        assert of_two.dtype == of_all.dtype
        assert torch.equal(of_two[[3, 9]], of_all[[3, 9]])
    assert torch.equal(part.token_ids, whole.token_ids)
    assert part.margins[others].isnan().all()
    assert part.logprobs[others].isnan().all()
    assert not part.digests[others].any()
    assert torch.equal(logits, before)


def test_nan_shows_in_the_margin_of_its_row_only():
    logits = random_logits(3)
    logits[1, 7] = torch.nan
    assert read_step(logits, GREEDY, None).margins.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_is_that_of_the_kernels(dtype):
    row = random_logits(1, 5000, dtype)[0]
    assert digest_row(row) == digest_reference(row)
