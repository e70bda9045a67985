"""Repeats are found exactly, and a round unlearns nothing else."""

import pytest
import torch

from ndcheck.builtin.corpus import Document
from ndcheck.builtin.recipe import Recipe
from ndcheck.builtin.repetition import complete_repeats, repeated_share
from ndcheck.builtin.trainer import Trainer


def test_a_loop_scores_near_one_and_fresh_text_zero():
    assert repeated_share([1, 2, 3, 4] * 50, 8) > 0.95
    assert repeated_share(list(range(200)), 8) == 0


def test_the_token_that_completes_the_second_occurrence_is_marked():
    tokens_B_T = torch.tensor([[5, 1, 2, 3, 9, 1, 2, 3, 7]])
    assert complete_repeats(tokens_B_T, 3).tolist() == [[False] * 7 + [True, False]]


def test_rows_do_not_see_each_other():
    assert not complete_repeats(torch.tensor([[1, 2, 3], [1, 2, 3]]), 3).any()


@pytest.fixture(params=[0.0, 3.0], ids=["imitation", "with unlikelihood"])
def trainer(request):
    recipe = Recipe(
        vocabulary_size=300,
        layers=1,
        hidden_size=32,
        head_size=16,
        intermediate_size=32,
        dropout=0.0,
        repeat_tokens=2,
        unlikelihood_weight=request.param,
    )
    trainer = Trainer(recipe, [Document("a", "Return a list of files. " * 200, False)], "cpu")
    trainer.teacher = trainer.model
    return trainer


def test_a_pupil_equal_to_its_teacher_moves_only_where_it_repeats(trainer):
    tokens_B_T = torch.tensor([[1, 2, 1, 2, 3, 1, 2]])
    seen = {}
    forward = trainer.model.forward

    def keep_logits(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits.requires_grad and output.logits.retain_grad()
        seen.setdefault("logits", output.logits)
        return output

    trainer.model.forward = keep_logits
    trainer.unlearning_loss(tokens_B_T, prompt_length=4).backward()
    moved_T_V = seen["logits"].grad[0].abs() > 1e-6
    # Position t predicts token t+1. The repeat inside the prompt is nobody's fault; of what was
    # written, only the last token completes an n-gram (1, 2) that was there before.
    assert moved_T_V.any(-1).tolist() == [False] * 5 + [True, False]
    assert seen["logits"].grad[0, 5, 2] > 0


@pytest.mark.parametrize("trainer", [3.0], indirect=True)
def test_a_firm_loop_has_a_finite_loss(trainer):
    with torch.no_grad():
        trainer.model.model.norm.weight.mul_(1e4)  # every prediction becomes a certainty
    tokens_B_T = torch.tensor([[1, 2] * 8])
    loss = trainer.unlearning_loss(tokens_B_T, prompt_length=4)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters() if p.grad is not None)
