"""`trace` and `order` on models and functions with one planted fault, from the command line."""

from __future__ import annotations

import importlib.machinery
import json
import sys

import pytest
import torch

from ndcheck.cli.app import run_command_line

MODEL = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def by_rows(x, weight):
    rows = x.reshape(-1, x.shape[-1])
    return torch.stack([(row * weight).sum(-1) for row in rows]).view(*x.shape[:-1], -1)


class PlantedConfig(LlamaConfig):
    model_type = "planted_llama"

    def __init__(self, fault="none", **others):
        self.fault = fault
        super().__init__(**others)


class Plain(nn.Linear):
    def forward(self, x):
        return by_rows(x, self.weight)


class Split(nn.Linear):
    def forward(self, x):
        parts = zip(x.chunk(len(x), -1), self.weight.chunk(len(x), -1))
        return sum(by_rows(part, weight) for part, weight in parts)


class Neighbours(nn.Linear):
    def forward(self, x):
        y = by_rows(x, self.weight)
        return y + 1e-4 * (y.sum(0, keepdim=True) - y)


class Chance(nn.Linear):
    def forward(self, x):
        y = by_rows(x, self.weight)
        return y * (1 + 1e-4 * torch.rand_like(y)) if len(x) > 1 else y


class Hidden(nn.Linear):
    def forward(self, x):
        y = by_rows(x, self.weight)
        if len(x) > 1:
            array = y.numpy()
            array *= 1.0001
        return y


class PlantedForCausalLM(LlamaForCausalLM):
    config_class = PlantedConfig

    def __init__(self, config):
        super().__init__(config)
        for name, module in list(self.named_modules()):
            if type(module) is nn.Linear:
                kinds = {kind.__name__: kind for kind in (Split, Neighbours, Chance, Hidden)}
                kind = kinds.get(config.fault, Plain) if name.endswith("1.mlp.down_proj") else Plain
                other = kind(module.in_features, module.out_features, bias=False)
                other.weight = module.weight
                parent, _, last = name.rpartition(".")
                setattr(self.get_submodule(parent), last, other)
"""

CONFIG = {
    "model_type": "planted_llama",
    "architectures": ["PlantedForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_planted.PlantedConfig",
        "AutoModelForCausalLM": "modeling_planted.PlantedForCausalLM",
    },
    "vocab_size": 4096,
    "hidden_size": 64,  # whole vectors: the tail of one is computed otherwise by some ops
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

SUMS = """
def in_order(x):
    total = x[:, 0].clone()
    for i in range(1, x.shape[1]):
        total = total + x[:, i]
    return total

def other_precision(x):
    return in_order(x) if len(x) < 4 else in_order(x.double()).float()

def mean(x):
    return in_order(x) / x.shape[1]

def sorts(x):
    return in_order(x.sort(-1).values)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = run_command_line([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("mode", ["copies", "mixed"])
@pytest.mark.parametrize(
    ("fault", "follows"),
    [("Split", "shape"), ("Neighbours", "neighbours"), ("Chance", "chance"), ("Hidden", "shape")],
)
def test_trace_names_the_planted_module(here, tmp_path, fault, follows, mode):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "modeling_planted.py").write_text(MODEL)
    (tmp_path / "m" / "config.json").write_text(json.dumps({**CONFIG, "fault": fault}))
    options = ("--trust-remote-code", "--random-weights", "0", "--dtype", "fp32", "--no-swaps")
    code, out, err = here(
        "trace", "--model", "m", *options, "--loads", "3", "--mode", mode, "-q", "--exit-code"
    )
    assert code == 1, out + err
    assert out.count(f"FOUND {fault}") == 2  # in the prefill and in a step
    rows = [line.split() for line in out.splitlines() if line.startswith(fault)]
    assert [(row[0], row[1], row[6]) for row in rows] == [
        (fault, "layers.1.mlp.down_proj", follows)
    ] * 2
    assert "No op adds" not in out
    assert "not compared" not in out


def test_trace_does_not_accuse_a_model_that_iterates_over_its_rows(here, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "modeling_planted.py").write_text(MODEL)
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    options = ("--trust-remote-code", "--random-weights", "0", "--dtype", "fp32")
    code, out, err = here("trace", "--model", "m", *options, "--loads", "2,3", "-q", "--exit-code")
    assert code == 0, out + err
    assert out.count("CLEAN") == 2


@pytest.mark.parametrize(
    ("function", "expected", "shown"),
    [
        ("other_precision", 1, "VARIES  the bits of a sum change at rows = 4"),
        ("mean", 3, "INCONCLUSIVE"),
        ("sorts", 3, "INCONCLUSIVE"),
        ("in_order", 0, "FIXED"),
    ],
)
def test_order_says_what_it_confirmed_and_no_more(here, tmp_path, function, expected, shown):
    (tmp_path / "sums.py").write_text(SUMS)
    options = ("--rows", "1-5", "--terms", "16", "-q")
    code, out, err = here("order", "--fn", f"sums.py:{function}", *options)
    assert code == expected, out + err
    assert out.startswith(shown)
    assert ("confirmed at 1-5 rows" in out) == (expected == 0)
    assert ("16 terms" in out) == (expected != 3)


def test_a_file_is_read_whatever_module_has_its_name(here, tmp_path):
    (tmp_path / "json.py").write_text(SUMS)
    options = ("--rows", "1-2", "--terms", "8", "-q")
    code, out, err = here("order", "--fn", "json.py:in_order", *options)
    assert (code, out[:5]) == (0, "FIXED"), out + err
    # Nor does anything that is imported later take the file for the module.
    found = importlib.machinery.PathFinder.find_spec("json", sys.path)
    assert found.origin != str(tmp_path / "json.py")


def test_a_failing_prefix_is_shrunk_and_shown(here, tmp_path):
    """Skipped where this machine does not part it."""
    options = ("--axes", "cache", "--loads", "1", "--kernels", "stock", "-n", "12")
    code, out, err = here("run", *options, "--max-tokens", "70", "--out", "run", "-q")
    assert code in (0, 1), out + err
    if code == 0:
        pytest.skip("no trial diverged on this machine")
    code, out, err = here("shrink", "--run", "run", "-q")
    assert code == 1, out + err
    assert out.startswith("SHOWN")
    assert "prefix" in out
    code, out, err = here("trace", "--run", "run", "--no-swaps", "-q", "--exit-code")
    assert code == 1, out + err
    assert "FOUND" in out
