"""What a model's code prints is no result."""

from __future__ import annotations

import json

import pytest

MODEL = """
import sys, transformers

class NoisyConfig(transformers.LlamaConfig):
    model_type = "noisy"

class NoisyForCausalLM(transformers.LlamaForCausalLM):
    config_class = NoisyConfig

    def __init__(self, config):
        print("NOISE of loading")
        super().__init__(config)

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **options
    ):
        print("NOISE of a pass")
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, **options
        )
"""
CONFIG = {
    "model_type": "noisy",
    "architectures": ["NoisyForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_noisy.NoisyConfig",
        "AutoModelForCausalLM": "modeling_noisy.NoisyForCausalLM",
    },
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FUNCTION = """
def noisy(x):
    print("NOISE of a sum")
    return x.sum(-1)
"""
OPTIONS = ("--trust-remote-code", "--random-weights", "0", "--dtype", "fp32", "-q")


@pytest.mark.parametrize(
    "command",
    [
        (
            "run",
            "--model",
            "m",
            *OPTIONS,
            "--loads",
            "1,2",
            "-n",
            "8",
            "--kernels",
            "stock",
            "--max-tokens",
            "2",
        ),
        ("trace", "--model", "m", *OPTIONS, "--loads", "2", "--no-swaps"),
        ("order", "--fn", "sums.py:noisy", "--rows", "1,2", "--columns", "8"),
    ],
    ids=lambda command: command[0],
)
def test_a_document_is_one_whatever_a_model_prints(ndcheck_here, tmp_path, command):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "modeling_noisy.py").write_text(MODEL)
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "sums.py").write_text(FUNCTION)
    done = ndcheck_here(*command, "--json")
    assert done.returncode in (0, 1, 3), done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert "NOISE of" in done.stderr
