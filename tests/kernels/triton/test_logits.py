"""What is read off a row of logits."""

from __future__ import annotations

import pytest
import torch

from ndcheck_kernels.cuda.rows.logits import BLOCK, read_logits
from ndcheck_kernels.measure.reference import digest_reference

N = 2 * BLOCK + 37


@pytest.fixture
def logits(dtype, device, wide):
    return wide(5, N, dtype=dtype, device=device)


def test_the_winner_its_margin_and_the_logsumexp(logits) -> None:
    reading = read_logits(logits)
    top = logits.float().topk(2).values
    assert torch.equal(reading.token_ids, logits.argmax(-1))
    assert torch.equal(reading.margins, top[:, 0] - top[:, 1])
    exact = logits.double().logsumexp(-1)
    torch.testing.assert_close(reading.logsumexps.double(), exact, rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_lowest_index_and_have_no_margin(device) -> None:
    logits = torch.zeros(3, N, device=device)
    logits[0, [11, BLOCK + 3]] = 2
    logits[1, [7, 8]] = 2
    logits[2, 9] = float("-inf")
    reading = read_logits(logits)
    assert reading.token_ids.tolist() == [11, 7, 0]
    assert reading.margins.tolist() == [0, 0, 0]


def test_nan_shows_in_the_margin(logits) -> None:
    logits[2, BLOCK + 5] = float("nan")
    assert read_logits(logits).margins.isnan().tolist() == [False, False, True, False, False]


def test_a_masked_row_has_a_finite_reading(logits) -> None:
    logits[1, 1:] = float("-inf")
    reading = read_logits(logits)
    assert reading.token_ids[1] == 0
    assert reading.logsumexps[1] == logits[1, 0].float()


def test_the_digest_is_that_of_its_formula_and_follows_every_bit(logits) -> None:
    digests = read_logits(logits).digests
    assert digests.tolist() == [digest_reference(row) for row in logits]
    changed = logits.clone()
    changed[0, 3], changed[1, N - 1] = torch.nextafter(logits[0, 3], logits[0, 3] + 9), -0.0
    changed[2, [4, 5]] = changed[2, [5, 4]]
    assert (read_logits(changed).digests != digests).tolist() == [True, True, True, False, False]


def test_a_row_reads_the_same_in_any_company(logits) -> None:
    together = read_logits(logits)
    strided = torch.empty(5, N + 3, dtype=logits.dtype, device=logits.device)[:, 3:]
    for rows, picked in (
        (logits[3:4], [3]),
        (logits[[4, 3, 3]], [4, 3, 3]),
        (strided.copy_(logits), range(5)),
    ):
        for part, whole in zip(read_logits(rows), together, strict=True):
            assert torch.equal(part, whole[list(picked)])
