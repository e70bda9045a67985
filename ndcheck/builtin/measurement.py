"""What is measured on a trained model: held-out loss, loops, and how sure it is of its text."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndcheck.builtin.corpus import Document
from ndcheck.builtin.repetition import repeated_share
from ndcheck.builtin.vocabulary import encode_stream

PROMPTS = (
    "Return a list of",
    "The following function",
    "When an exception is raised",
    "def read(self",
    "class",
    "import os\n",
    "Tell me about Richard Feynman",
)
HELD_OUT_PROMPTS = 20
PROMPT_TOKENS = 32
GREEDY_TOKENS = 200
LONG_TOKENS = 1000
REPEAT_TOKENS = 8
CHECK_TOKENS = 16_384  # the part of the held-out text that a quick test measures again


@dataclass(frozen=True, slots=True)
class Greedy:
    """A greedy continuation and how sure the model was of it."""

    prompt: str
    text: str
    repeated_share: float
    gaps: list[float]


@dataclass(frozen=True, slots=True)
class Figures:
    """What the card says about a model."""

    parameters: int
    weight_bytes: int
    held_out_bytes: int
    held_out_tokens: int
    loss_nats: float
    bits_per_byte: float
    check_loss_nats: float
    loop_worst: float
    loop_mean: float
    loop_people: float
    loop_long_worst: float
    gap_median: float
    samples: list[Greedy]


def measure(directory: Path, documents: list[Document]) -> Figures:
    """Everything about the model of `directory` on the CPU: the loss in fp32, the text in bf16."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    held_out_texts = [document.text for document in documents if document.held_out]
    held_out_N = encode_stream(tokenizer, held_out_texts)
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)

    prompts, people = draw_prompts(tokenizer, held_out_texts)
    greedy = [continue_greedily(model, tokenizer, prompt, GREEDY_TOKENS) for prompt in prompts]
    samples, long = (
        [
            continue_greedily(model, tokenizer, tokenizer(prompt)["input_ids"], n_tokens)
            for prompt in PROMPTS
        ]
        for n_tokens in (GREEDY_TOKENS, LONG_TOKENS)
    )
    window_tokens = model.config.max_position_embeddings
    loss_nats = held_out_loss(model.float(), held_out_N, window_tokens)
    return Figures(
        parameters=model.num_parameters(),
        weight_bytes=(directory / "model.safetensors").stat().st_size,
        held_out_bytes=held_out_bytes,
        held_out_tokens=len(held_out_N),
        loss_nats=loss_nats,
        bits_per_byte=loss_nats / math.log(2) * len(held_out_N) / held_out_bytes,
        check_loss_nats=held_out_loss(model, held_out_N[:CHECK_TOKENS], window_tokens),
        loop_worst=max(text.repeated_share for text in greedy),
        loop_mean=mean(text.repeated_share for text in greedy),
        loop_people=mean(repeated_share(text, REPEAT_TOKENS) for text in people),
        loop_long_worst=max(text.repeated_share for text in long),
        gap_median=median(gap for text in (*greedy, *samples) for gap in text.gaps),
        samples=samples,
    )


def held_out_loss(model: Any, tokens_N: torch.Tensor, window_tokens: int) -> float:
    """The mean loss in nats per token, over consecutive windows that share no context."""
    total_nats = 0.0
    with torch.no_grad():
        for window_N in tokens_N.to(model.device).split(window_tokens):
            logits_N_V = model(input_ids=window_N[None]).logits[0].float()
            total_nats += F.cross_entropy(logits_N_V[:-1], window_N[1:], reduction="sum").item()
    return total_nats / (len(tokens_N) - math.ceil(len(tokens_N) / window_tokens))


def draw_prompts(tokenizer: Any, texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts from the middle of the longest held-out texts, and what people wrote after them."""
    prompts, people = [], []
    for text in sorted(texts, key=len, reverse=True)[:HELD_OUT_PROMPTS]:
        tokens = tokenizer(text, verbose=False)["input_ids"]
        middle = len(tokens) // 2
        prompts.append(tokens[middle - PROMPT_TOKENS : middle])
        people.append(tokens[middle : middle + GREEDY_TOKENS])
    return prompts, people


def continue_greedily(model: Any, tokenizer: Any, prompt: list[int], n_tokens: int) -> Greedy:
    """Generates exactly `n_tokens` at temperature 0."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        min_new_tokens=n_tokens,
        max_new_tokens=n_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, len(prompt) :].tolist()
    top_T_2 = torch.cat(output.logits).float().topk(2).values
    return Greedy(
        prompt=tokenizer.decode(prompt),
        text=tokenizer.decode(tokens),
        repeated_share=repeated_share(tokens, REPEAT_TOKENS),
        gaps=(top_T_2[:, 0] - top_T_2[:, 1]).tolist(),
    )
