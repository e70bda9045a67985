"""Training is reproducible, survives being killed, and answers bad input in one line."""

import json
from dataclasses import asdict, fields

import pytest
import torch
from safetensors.torch import load_file

from ndcheck.builtin.card import list_runs
from ndcheck.builtin.corpus import Document
from ndcheck.builtin.recipe import Recipe
from ndcheck.builtin.train import main, train
from ndcheck.builtin.trainer import Trainer
from ndcheck.errors import UsageError

TINY = Recipe(
    vocabulary_size=300,
    layers=1,
    hidden_size=32,
    head_size=16,
    intermediate_size=32,
    context_tokens=96,
    batch_rows=2,
    steps=4,
    rounds=2,
    round_rows=4,
    round_steps=2,
    round_tokens=16,
    repeat_tokens=2,
    unlikelihood_weight=1.0,
)
DOCUMENTS = [
    Document("training", "Return a list of the names of the files in a folder. " * 40, False),
    Document("held-out", "Return the name of the folder of a file. " * 10, True),
]


def train_tiny(output, recipe=TINY):
    train(recipe, DOCUMENTS, output, "cpu", checkpoint_seconds=0)
    return load_file(output / "checkpoint.safetensors")


@pytest.mark.parametrize("killed_after", [3, 5], ids=["likelihood stage", "rounds"])
def test_a_killed_run_continues_to_identical_weights_and_optimiser(
    tmp_path, monkeypatch, killed_after
):
    uninterrupted = train_tiny(tmp_path / "uninterrupted")

    save_checkpoint = Trainer.save_checkpoint

    def save_then_die(self, path):
        save_checkpoint(self, path)
        if self.done == killed_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "killed")
    continued = train_tiny(tmp_path / "killed")

    assert continued.keys() == uninterrupted.keys()
    for name, tensor in uninterrupted.items():
        assert torch.equal(continued[name], tensor), name


def test_both_stages_change_the_weights_and_the_seed_matters(tmp_path):
    likelihood = train_tiny(tmp_path / "likelihood", Recipe(**{**asdict(TINY), "rounds": 0}))
    both = train_tiny(tmp_path / "both")
    other_seed = train_tiny(tmp_path / "seed", Recipe(**{**asdict(TINY), "seed": 1}))
    name = "weight.model.embed_tokens.weight"
    assert not torch.equal(likelihood[name], both[name])
    assert not torch.equal(other_seed[name], both[name])


def test_a_run_may_start_from_another_runs_model(tmp_path):
    train_tiny(tmp_path / "first")
    rounds = Recipe(**{**asdict(TINY), "steps": 0, "rounds": 1, "round_learning_rate": 0.0})
    train(rounds, DOCUMENTS, tmp_path / "second", "cpu", 0, tmp_path / "first" / "model")
    first, second = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second")
    )
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    training = json.loads((tmp_path / "second" / "model" / "training.json").read_text())
    assert [run["recipe"]["steps"] for run in list_runs(training)] == [4, 0]


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    train_tiny(tmp_path)
    with pytest.raises(UsageError, match="other options"):
        train_tiny(tmp_path, Recipe(**{**asdict(TINY), "seed": 1}))


def test_nothing_is_pickled(tmp_path):
    train_tiny(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], "invalid int value"),
        (["--dropout", "1"], "dropout"),
        (["--hidden-size", "100"], "hidden size"),
        (["--steps", "0", "--rounds", "0"], "steps"),
        (["--round-tokens", "4000"], "context"),
        (["--vocabulary-size", "10"], "vocabulary"),
        (["--layers", "0"], "layers"),
        (["--stdlib", "missing"], "no standard library"),
        (["--checkpoint-seconds", "soon"], "invalid float value"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_help_explains_every_choice_of_the_recipe(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for choice in fields(Recipe):
        assert f"--{choice.name.replace('_', '-')}" in shown
        assert choice.metadata["help"] in shown
