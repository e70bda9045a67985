"""The model card of the embedded model, as text."""

import platform
from typing import Any

from ndcheck.builtin.measurement import (
    CHECK_TOKENS,
    GREEDY_TOKENS,
    HELD_OUT_PROMPTS,
    LONG_TOKENS,
    PROMPT_TOKENS,
    REPEAT_TOKENS,
    Figures,
)
from ndcheck.builtin.recipe import Recipe

SAMPLES = 3


def render_card(figures: Figures, training: dict[str, Any]) -> str:
    """The card in Markdown: what the model is, its figures, samples, and how to make it again."""
    runs = list_runs(training)
    recipes = [Recipe(**run["recipe"]) for run in runs]
    first, recipe = recipes[0], recipes[-1]
    commands = "\n".join(map(training_command, range(len(runs)), recipes))
    stages = " Then ".join(map(describe_run, runs, recipes))
    return f"""\
---
license: psf-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
---
# ndcheck's embedded model

A language model of {figures.parameters / 1e6:.2f} million parameters that writes text like
Python's standard library. It lets `ndcheck run --model builtin` measure an inference stack
without a hub or a download.

## What it is for, and what not
It is a **probe for nondeterminism**: a real decoder of the Qwen3 architecture whose greedy text
rarely falls into a loop, and whose two best next tokens are often close, so that a difference
in the last bit of a bf16 sum can change the text. It knows nothing about the world, follows no
instructions, and its code does not work: use it for no other purpose.

## Figures
| figure | value |
|---|---|
| parameters | {figures.parameters:,} |
| weights, bf16 | {figures.weight_bytes:,} bytes |
| held-out loss | {figures.loss_nats:.4f} nats per token |
| held-out loss | {figures.bits_per_byte:.4f} bits per byte |
| held-out loss, first {CHECK_TOKENS:,} tokens | {figures.check_loss_nats:.4f} nats per token |
| loop score, worst of {HELD_OUT_PROMPTS} prompts | {figures.loop_worst:.1%} |
| loop score, mean | {figures.loop_mean:.1%} |
| loop score, mean of what people wrote after those prompts | {figures.loop_people:.1%} |
| loop score over {LONG_TOKENS} tokens, worst of the fixed prompts | {figures.loop_long_worst:.1%} |
| gap between the two best logits, median | {figures.gap_median:.2f} |

- **Held out**: whole files chosen by a hash of their names, {figures.held_out_bytes:,} bytes in
  {figures.held_out_tokens:,} tokens. Windows of {recipe.context_tokens} tokens, fp32 arithmetic.
- **Loop score**: the share of {REPEAT_TOKENS}-grams of tokens, in {GREEDY_TOKENS} greedy tokens,
  that the text has already used. The {HELD_OUT_PROMPTS} prompts are {PROMPT_TOKENS} tokens from
  the middle of the longest held-out texts; bf16 on the CPU, batch size 1.
- **Gap**: top-1 minus top-2 logit at every token of the greedy texts.

## Architecture
`Qwen3ForCausalLM`: {recipe.layers} layers, hidden size {recipe.hidden_size}, MLP
{recipe.intermediate_size}, {recipe.hidden_size // recipe.head_size} query heads and
{recipe.hidden_size // recipe.head_size // 2} key-value heads of {recipe.head_size}, tied
embeddings, context {recipe.context_tokens}. Byte-level BPE of {recipe.vocabulary_size} tokens.

## Data and licence
The standard library of CPython {platform.python_version()}: sources without tests, character
tables and long literal tables; their docstrings once more as prose; and the texts of `help()`
(`pydoc_data/topics.py`). {training["training_tokens"]:,} tokens to train on. The text is under
the [PSF License Agreement](https://docs.python.org/3/license.html), Copyright © 2001 Python
Software Foundation, All Rights Reserved; the weights are given under the same terms.

SHA-256 of the corpus: `{training["corpus_sha256"]}`

## Training
```
{commands}
```
under CPython {platform.python_version()} (or any Python with `--stdlib` naming that version's
library), seed {recipe.seed}. {stages}

A *likelihood step* predicts {first.batch_rows * first.context_tokens:,} tokens of the corpus. Small
models trained on that alone fall into loops under greedy decoding
([Welleck et al., 2019](https://arxiv.org/abs/1908.04319)), so *rounds* follow: the model writes
greedily and learns, on its own text, what the model before the rounds predicts with those tokens
struck out that would repeat an n-gram; with an unlikelihood weight, those tokens are pushed down
as well. A later run starts from the bf16 weights of the one before. The same command on the same
machine repeats the run; other hardware rounds differently and gives slightly different weights.

## Samples
Greedy, {GREEDY_TOKENS} tokens, bf16 on the CPU, batch size 1. The prompt is in the first line of
each block.
{"".join(render_sample(sample.prompt, sample.text) for sample in figures.samples[:SAMPLES])}"""


def list_runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that led to a model, the first one first."""
    start = training.get("start")
    return [*(list_runs(start) if start else []), training]


def training_command(index: int, recipe: Recipe) -> str:
    """The command of one run; a later run starts from the model of the one before."""
    start = [f"--start run-{index}/model"] if index else []
    output = f"--output run-{index + 1}"
    options = " ".join([*start, *changed_options(recipe), output])
    return f"python -m ndcheck.builtin.train {options}"


def describe_run(run: dict[str, Any], recipe: Recipe) -> str:
    """One sentence on what a run did, and where."""
    return (
        f"{recipe.steps} likelihood steps and {recipe.rounds} rounds of {recipe.round_rows} texts "
        f"of {recipe.round_tokens} tokens against repeated {recipe.repeat_tokens}-grams, "
        f"unlikelihood weight {recipe.unlikelihood_weight:g}, on {run['hardware']} with torch "
        f"{run['torch']}."
    )


def changed_options(recipe: Recipe) -> list[str]:
    """The options of the training command that are not at their defaults."""
    return [
        f"--{name.replace('_', '-')} {getattr(recipe, name)}"
        for name in Recipe.__slots__
        if getattr(recipe, name) != getattr(Recipe(), name)
    ]


def render_sample(prompt: str, text: str) -> str:
    """A fenced block; the fence is longer than any inside."""
    return f"\n`````text\n{prompt}{text}\n`````\n"
