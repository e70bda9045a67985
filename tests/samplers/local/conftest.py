"""What tests of the in-process sampler on a GPU share."""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture(scope="session")
def qwen3_shape(tmp_path_factory):
    """A directory with the config of a model wide enough for a GPU; weights are drawn."""
    directory = tmp_path_factory.mktemp("qwen3")
    transformers.Qwen3Config(
        vocab_size=50000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(directory)
    return directory
