"""The shipped model: its size, its text, and the figures on its card."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.builtin.corpus import corpus_sha256, read_corpus
from ndcheck.builtin.measurement import CHECK_TOKENS, continue_greedily, held_out_loss
from ndcheck.builtin.options import RUNNING_STDLIB
from ndcheck.builtin.vocabulary import encode_stream

CARD = (MODEL_DIRECTORY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIRECTORY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY).eval()


def test_it_is_small_and_bf16(model):
    assert sum(file.stat().st_size for file in MODEL_DIRECTORY.iterdir()) <= 10_000_000
    assert 2_000_000 <= model.num_parameters() <= 5_000_000
    assert f"| parameters | {model.num_parameters():,} |" in CARD
    with safe_open(MODEL_DIRECTORY / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize("prompt", ["Return a list of", "When an exception is raised", "class"])
def test_its_greedy_text_is_printable_and_does_not_loop(model, tokenizer, prompt):
    greedy = continue_greedily(model, tokenizer, tokenizer(prompt)["input_ids"], 128)
    assert greedy.repeated_share < 0.5
    assert all(character.isprintable() or character in "\n\t" for character in greedy.text)
    assert len(set(greedy.text.split())) > 15


def test_the_card_says_what_is_measured(model, tokenizer):
    documents = read_corpus(RUNNING_STDLIB)
    training = json.loads((MODEL_DIRECTORY / "training.json").read_text())
    if corpus_sha256(documents) != training["corpus_sha256"]:
        pytest.skip("this Python's standard library is not the one the model was trained on")
    held_out = [document.text for document in documents if document.held_out]
    tokens_N = encode_stream(tokenizer, held_out)[:CHECK_TOKENS]
    loss = held_out_loss(model.float(), tokens_N, model.config.max_position_embeddings)
    stated = float(re.search(rf"first {CHECK_TOKENS:,} tokens \| ([\d.]+) nats", CARD)[1])
    assert loss == pytest.approx(stated, abs=0.01)
