"""Random checkpoints: written once, whole or not at all, and equal to what transformers makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from ndcheck.errors import BackendError
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.samplers.vllm.checkpoint import (
    digest_checkpoint,
    find_checkpoint,
    random_checkpoint,
)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "ndcheck" / "checkpoints"


def write(source, seed, dtype="auto"):
    spec = replace(DEFAULTS, model=str(source), random_weights=seed, dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(source)
    return random_checkpoint(str(source), config, spec)


def test_it_is_written_once_for_each_seed_and_dtype(tiny_models, caches):
    first = write(tiny_models["qwen3"], 1)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert write(tiny_models["qwen3"], 1) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    others = {write(tiny_models["qwen3"], 2), write(tiny_models["qwen3"], 1, "fp32")}
    others.add(write(tiny_models["llama"], 1))
    assert len(others | {first}) == 4
    assert len({digest_checkpoint(path) for path in (first, *others)}) == 4
    assert sorted(path.name for path in caches.iterdir()) == sorted(
        path.name for path in (first, *others)
    )


def test_its_weights_are_those_of_the_transformers_engine(tiny_models, caches):
    path = write(tiny_models["qwen3"], 7)
    spec = replace(DEFAULTS, model=str(tiny_models["qwen3"]), random_weights=7, arms=("stock",))
    ours = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
    theirs = TransformersSampler(spec)._model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].cpu()) for name in ours)


def test_what_is_not_whole_is_not_kept(tiny_models, caches, monkeypatch):
    def fail(self, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(BackendError, match=r"cannot write random weights .*: No space left"):
        write(tiny_models["qwen3"], 1)
    assert list(caches.iterdir()) == []


def test_the_digest_tells_checkpoints_apart(tiny_models, tmp_path):
    source = tiny_models["qwen3"]
    assert find_checkpoint(str(source)) == source
    assert find_checkpoint("nobody/nothing-of-this-name") is None
    before = digest_checkpoint(source)
    assert digest_checkpoint(source) == before
    changed = bytearray((source / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(changed)
    assert digest_checkpoint(tmp_path) != before
