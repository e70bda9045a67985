"""A trained model for the reference experiment: the embedded model's corpus, tokenizer and trainer,
fifty times as many parameters, and a clock in the place of a number of steps.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ndcheck.builtin.corpus import Document, is_held_out, read_corpus, read_topics
from ndcheck.builtin.measurement import held_out_loss
from ndcheck.builtin.options import RUNNING_STDLIB
from ndcheck.builtin.recipe import Recipe
from ndcheck.builtin.trainer import Trainer, likelihood_learning_rate
from ndcheck.builtin.vocabulary import encode_stream

RECIPE = Recipe(
    layers=16,
    hidden_size=1024,
    intermediate_size=3072,
    head_size=128,
    dropout=0.2,
    learning_rate=6e-4,
    steps=1000,  # Only the unit of the learning rate's course: the clock says when it ends.
    rounds=0,
)
TINY = replace(
    RECIPE, layers=2, hidden_size=64, intermediate_size=128, head_size=16, context_tokens=320,
    batch_rows=2, vocabulary_size=512, round_tokens=1,
)  # fmt: skip
TINY_SECONDS = 3.0


def train(directory: Path, seconds: float, *, tiny: bool) -> dict[str, Any]:
    """Train for so long and save bf16 weights with the tokenizer; returns what became of it.

    Another run has other weights: how many steps fit the time depends on the machine.
    """
    recipe, documents = RECIPE, _documents(tiny=tiny)
    if tiny:
        recipe, seconds = TINY, min(seconds, TINY_SECONDS)
    device = "cpu" if tiny else "cuda"
    trainer = Trainer(recipe, documents, device)
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"training {n_parameters / 1e6:.0f} M parameters for {seconds:.0f} s", flush=True)
    started_s = time.monotonic()
    first = loss = _step(trainer, 0)  # Compiles, so it comes before the clock starts.
    compiled_s = time.monotonic() - started_s
    started_s, n_steps = time.monotonic(), 1
    while (share := (time.monotonic() - started_s) / seconds) < 1:
        loss = _step(trainer, int(share * recipe.steps))
        n_steps += 1
        if n_steps % 100 == 0:
            print(f"step {n_steps}: loss {loss:.3f}", flush=True)
    trained_s = time.monotonic() - started_s
    held_out_N = encode_stream(trainer.tokenizer, [d.text for d in documents if d.held_out])
    trainer.export(directory)
    training = {
        "parameters": n_parameters,
        "seconds": round(trained_s, 1),
        "first_step_seconds": round(compiled_s, 1),
        "steps": n_steps,
        "training_tokens": len(trainer.tokens_N),
        "tokens_seen": n_steps * recipe.batch_rows * recipe.context_tokens,
        "first_loss": round(first, 4),
        "last_loss": round(loss, 4),
        "held_out_loss": round(
            held_out_loss(trainer.model.eval(), held_out_N, recipe.context_tokens), 4
        ),
        "corpus_sha256": trainer.corpus_sha256,
        "torch": torch.__version__,
        "recipe": asdict(recipe),
    }
    print(f"trained: {training}", flush=True)
    del trainer
    if device == "cuda":
        torch.cuda.empty_cache()  # The measurement runs in a process of its own.
    return training


def _step(trainer: Trainer, step: int) -> float:
    trainer.set_learning_rate(likelihood_learning_rate(trainer.recipe, step))
    return trainer.update(trainer.likelihood_loss(trainer.forward))


def _documents(*, tiny: bool) -> list[Document]:
    if not tiny:
        return read_corpus(RUNNING_STDLIB)
    return [
        Document(name, text, is_held_out(group))
        for group, name, text in read_topics(RUNNING_STDLIB)
    ]
