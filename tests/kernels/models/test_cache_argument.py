"""The cache has another name in each release of transformers; no layer is left without it."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers

from ndcheck.errors import UsageError
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.models.caches.argument import cache_argument, given_cache
from ndcheck_kernels.models.state_space import replace_mixers

NAMES = ("cache", "past_key_values", "cache_params", "layer_past")


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_that_of_the_signature(name):
    made = {}
    exec(f"def forward(self, ids, {name}=None, **kwargs): ...", made)
    assert cache_argument(made["forward"]) == name


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_given_its_cache_under_any_name(name):
    cache = object()
    assert given_cache({"cache": None, "use_cache": True, name: cache}) is cache
    assert given_cache({"use_cache": True}) is None


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "MambaForCausalLM", "BloomForCausalLM"])
def test_models_of_this_release_take_theirs(name):
    forward = getattr(transformers, name).forward
    assert cache_argument(forward) in inspect.signature(forward).parameters


def test_a_model_that_takes_none_is_refused_by_name():
    class Stateless(torch.nn.Linear):
        config = transformers.Qwen3Config(num_hidden_layers=1)
        dtype = torch.float32

        def forward(self, input_ids):
            return input_ids

    with pytest.raises(UsageError, match=r"^Stateless takes none of cache, past_key_values"):
        ExactBatch(Stateless(1, 1), torch.device("cpu"), 1, 4)


def test_a_mixer_that_another_releases_model_calls_writes_to_its_cache():
    config = transformers.MambaConfig(
        vocab_size=8, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    mixer, x = model.backbone.layers[0].mixer, torch.randn(1, 6, 16)
    replace_mixers(model)
    with torch.inference_mode(), invariant_kernels():
        whole = mixer(x)
        for name in NAMES[:3]:
            cache = transformers.StaticCache(config=config, max_cache_len=6)
            parts = [mixer(x[:, a:b], **{name: cache}) for a, b in ((0, 4), (4, 5), (5, 6))]
            assert torch.equal(torch.cat(parts, 1), whole), name
        # The control: without a cache every pass begins from an empty state.
        parts = [mixer(x[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 6))]
        assert not torch.equal(torch.cat(parts, 1), whole)
