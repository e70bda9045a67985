"""Models that compute oddly: what of them is measured, what is left out, and what is an error."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from ndcheck.errors import TrialError
from ndcheck.samplers.batch import ExactBatch
from ndcheck.samplers.local import faithful
from ndcheck.samplers.local.ties import TiesByIndex

CPU = torch.device("cpu")
INDEXED = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "initializer_range": 0.2,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
IN_PADDED_ROWS = [path for path in faithful.PATHS if path[0]]


@pytest.fixture
def indexed():
    """Its indexer's scores are sums of two numbers that a ReLU left, so many of them are 0."""
    if not hasattr(transformers.models, "hy_v4"):
        pytest.skip("this transformers has no such model")
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model("hy_v4", **INDEXED)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def llama(n_layers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=n_layers,
        num_attention_heads=4, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_ties_that_a_top_k_breaks_by_place_are_for_a_run_to_find(indexed):
    found = faithful.examine(indexed, CPU)
    assert min(found.differences[path] for path in IN_PADDED_ROWS) > 1
    assert not any(found.reasons.values())


def test_a_wrong_position_is_no_tie(indexed, monkeypatch):
    stock = ExactBatch._forward

    def wrong(self, input_ids, position_ids, *n_wanted):
        at = torch.where(self._pads > 0, 0, position_ids)
        return stock(self, input_ids, at, *n_wanted)

    monkeypatch.setattr(ExactBatch, "_forward", wrong)
    found = faithful.examine(indexed, CPU)
    assert {path for path in faithful.PATHS if found.reasons[path]} == set(IN_PADDED_ROWS)


def test_equal_numbers_are_taken_in_their_order():
    x = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0, 2.0]])
    with TiesByIndex():
        (largest, at), (_, at_smallest) = x.topk(4), x.topk(2, largest=False)
    assert (largest.tolist(), at.tolist()) == ([[2.0, 2.0, 1.0, 0.0]], [[1, 5, 3, 0]])
    assert at_smallest.tolist() == [[0, 2]]


class HeadOf16Bits(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.to(torch.bfloat16))


def test_a_head_of_16_bits_in_a_model_of_32_is_measured():
    model = llama(2)
    model.lm_head = HeadOf16Bits(64, 97, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.2)
    for paths in ([faithful.ALONE], faithful.PATHS):
        found = faithful.examine(model, CPU, paths)
        assert found.reasons.keys() == set(paths)
        assert not any(found.reasons.values())
    assert found.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_mask_that_is_wrong_in_passes_alone_shows_in_their_logits(monkeypatch, is_wrong):
    """Nothing else of a single layer, whose keys and values know of no other token."""
    model = llama(1)
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(*args, attention_mask=None, **kwargs):
        n_tokens = kwargs["hidden_states"].shape[1]
        if attention_mask is not None and 1 < n_tokens < 5:
            attention_mask = attention_mask[:, :, -1:].expand_as(attention_mask)
        return own(*args, attention_mask=attention_mask, **kwargs)

    if is_wrong:
        monkeypatch.setattr(attention, "forward", forward)
    found = faithful.examine(model, CPU)
    assert bool(found.reasons[faithful.IN_PASSES]) == is_wrong
    assert found.reasons[faithful.ALONE] is None


@pytest.mark.parametrize("shown", ["[2, 1, 97]", "[3, 97]", "[3, 0, 97]", "NoneType"])
def test_logits_of_another_shape_are_an_error_of_the_trial(monkeypatch, shown):
    logits = None if shown == "NoneType" else torch.zeros(*map(int, shown[1:-1].split(",")))
    model = llama(1)
    batch = ExactBatch(model, CPU, 3, 8)
    batch.reset([[1, 2]] * 3)
    out = transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)
    monkeypatch.setattr(type(model), "forward", lambda self, cache=None, **kwargs: out)
    with pytest.raises(TrialError, match=re.escape(f"logits of {shown} where 3 rows of 1")):
        batch.compute_prompt("whole")
