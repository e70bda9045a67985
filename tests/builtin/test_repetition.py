"""Repeats are found exactly, and the loss falls only on them."""

import torch

from ndcheck.builtin.repetition import mask_repeats, repeated_share, unlikelihood_loss


def test_a_loop_scores_near_one_and_fresh_text_zero():
    assert repeated_share([1, 2, 3, 4] * 50, 8) > 0.95
    assert repeated_share(list(range(200)), 8) == 0


def test_only_the_second_occurrence_is_marked():
    tokens_B_T = torch.tensor([[5, 1, 2, 3, 9, 1, 2, 3, 7]])
    assert mask_repeats(tokens_B_T, 3).tolist() == [[False] * 5 + [True] * 3 + [False]]


def test_rows_do_not_see_each_other():
    assert not mask_repeats(torch.tensor([[1, 2, 3], [1, 2, 3]]), 3).any()


def test_the_loss_falls_on_repeated_generated_tokens_only():
    tokens_B_T = torch.tensor([[1, 2, 1, 2, 3, 1, 2]])
    logits_B_T_V = torch.zeros(1, 7, 4, requires_grad=True)
    unlikelihood_loss(logits_B_T_V, tokens_B_T, n=2, prompt_length=4).backward()
    touched_T = logits_B_T_V.grad.abs().sum(-1)[0] > 0
    # Position t predicts token t+1; the repeat inside the prompt (tokens 2 and 3) is not punished.
    assert touched_T.tolist() == [False] * 4 + [True, True, False]


def test_a_certain_repeat_has_a_finite_loss():
    tokens_B_T = torch.tensor([[1, 2, 1, 2]])
    logits_B_T_V = 1e4 * torch.nn.functional.one_hot(tokens_B_T.roll(-1, 1), 4).float()
    assert unlikelihood_loss(logits_B_T_V, tokens_B_T, n=2, prompt_length=2).isfinite()
