"""An exact batch computes what its model's plain forward pass does, or is refused by name."""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils import _python_dispatch
from transformers.models.roformer import modeling_roformer

from ndcheck.errors import UsageError
from ndcheck.records import AXES
from ndcheck.request import DEFAULTS
from ndcheck.runner import fit_spec
from ndcheck.samplers.batch import ExactBatch
from ndcheck.samplers.local.sampler import TransformersSampler

N_STEPS = 4
PROMPT = [5, 17, 33, 60, 9, 71, 12]
FILLER = [40, 3, 66, 21, 8, 90, 14, 55, 2, 77, 31, 18, 49]
CPU = torch.device("cpu")

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
STATE_SPACE = {"state_size": 8, "chunk_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1}
BART = {
    **COMMON,
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "init_std": 0.2,
    "pad_token_id": 1,
}
FAMILIES = {
    "Llama": COMMON,
    "Gemma3": {**COMMON, "head_dim": 16, "sliding_window": 8},
    "GPT2": {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "Mamba": {**COMMON, "state_size": 8},
    "FalconMamba": {**COMMON, "state_size": 8},
    "Mamba2": {**COMMON, **STATE_SPACE},
    "Bamba": {**COMMON, **MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**COMMON, **MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "Zamba2": {
        **COMMON,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
    },
    "NemotronH": {
        **COMMON,
        **STATE_SPACE,
        "num_hidden_layers": 4,
        "hybrid_override_pattern": "M*-M",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "head_dim": 16,
    },
    "Jamba": {
        **COMMON,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_d_state": 8,
        "num_experts": 2,
    },
    "Lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "RecurrentGemma": {
        **COMMON,
        "num_hidden_layers": 3,
        "lru_width": 64,
        "attention_window_size": 16,
    },
    "Qwen3Next": {
        **COMMON,
        **LINEAR,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "MiniMax": {
        **COMMON,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "block_size": 8,
    },
    "Bart": BART,
    "MBart": BART,
    "Roberta": {**COMMON, "pad_token_id": 1, "is_decoder": True},
    "RoFormer": {**COMMON, "is_decoder": True, "embedding_size": 64},
    "Rwkv": {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 128},
}
NAMES = {
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}


def make(family, dtype=torch.float32, **changed):
    config, model = NAMES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**FAMILIES[family], **changed})
    return getattr(transformers, model)(config).to(dtype).eval()


def generate(model):
    """The right logits and the tokens that they chose: by transformers alone, the row unpadded."""
    ids = torch.tensor([PROMPT])
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=N_STEPS + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return torch.cat(done.logits).float(), done.sequences[0, -N_STEPS - 1 : -1].tolist()


@functools.cache
def examined(family):
    """A model for all paths, as a run has it, with what `generate` makes of it."""
    model = make(family)
    return model, *generate(model)


@torch.inference_mode()
def decode(model, is_padded, cache_state, tokens):
    rows = [PROMPT, FILLER] if is_padded else [PROMPT]
    batch = ExactBatch(model, CPU, len(rows), max(map(len, rows)) + N_STEPS)
    batch.reset(rows)
    logits = [batch.prefill(cache_state)[0]]
    logits += [batch.step(torch.full((len(rows),), token))[0] for token in tokens]
    return torch.stack(logits).float()


REFUSED = {
    "Mamba": {"chunked", "prefix"},
    "FalconMamba": {"chunked", "prefix"},
    "Jamba": {"chunked", "prefix"},
    "RecurrentGemma": {"chunked", "prefix", "padded"},
    "MiniMax": {"whole"},
    "Rwkv": {"whole"},
    "Zamba2": {"chunked"},
    "Bart": {"padded"},
    "MBart": {"padded"},
    "RoFormer": {"padded prefix"},
}
"""What these models' own code computes otherwise; Zamba2 clamps a time step in prefill alone, and
chunks show it. No other may be refused."""
if not hasattr(modeling_roformer, "create_causal_mask"):
    # In transformers 5.17 its decoder sees later tokens.
    REFUSED["RoFormer"] = {"whole"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_padded", [False, True], ids=["alone", "padded"])
@pytest.mark.parametrize("cache_state", ["whole", "chunked", "prefix"])
def test_logits_are_those_of_generate(family, is_padded, cache_state):
    model, right, tokens = examined(family)
    spread = right.std(dim=-1).mean()
    refused = REFUSED.get(family, set())
    parts = {"whole", cache_state, *(("padded", f"padded {cache_state}") if is_padded else ())}
    if parts & refused:
        with pytest.raises(UsageError, match=f"^{type(model).__name__} [^\n]*$"):
            decode(model, is_padded, cache_state, tokens)
        return
    seen = decode(model, is_padded, cache_state, tokens)
    assert (seen - right).abs().max() < 0.001 * spread


def forward_wrongly(monkeypatch, change):
    stock = ExactBatch._forward

    def wrong(self, input_ids, position_ids):
        return stock(self, *change(self, input_ids, position_ids))

    monkeypatch.setattr(ExactBatch, "_forward", wrong)


WRONG = {
    "padded rows all at one position": (
        lambda batch, ids, at: (ids, torch.where(batch._pads > 0, 0, at)),
        {"padded whole", "padded chunked", "padded prefix"},
    ),
    "every chunk from position 0": (
        lambda batch, ids, at: (ids, at - at.min() if ids.shape[1] > 1 else at),
        {"alone chunked", "alone prefix"},
    ),
    "steps at position 0": (
        lambda batch, ids, at: (ids, at * (ids.shape[1] > 1)),
        {"alone whole"},
    ),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2", "Bamba", "Qwen3Next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_position_is_seen(monkeypatch, fault, family, dtype):
    """The check's own control."""
    from ndcheck.samplers.local import faithful

    change, expected = WRONG[fault]
    forward_wrongly(monkeypatch, change)
    found = faithful.examine(make(family, dtype), CPU)
    refused = {faithful._name(path) for path in faithful.PATHS if found.reason(path)}
    assert expected <= refused


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma3"])
def test_a_lost_mask_is_seen(monkeypatch, family):
    from ndcheck.samplers.local import faithful

    stock = ExactBatch.reset

    def reset(self, rows):
        stock(self, rows)
        self._mask.fill_(1)

    monkeypatch.setattr(ExactBatch, "reset", reset)
    found = faithful.examine(make(family), CPU)
    assert found.reason((True, "whole"))
    assert not found.reason((False, "whole"))


@pytest.mark.parametrize("family", ["Mamba", "FalconMamba", "Jamba", "Zamba2"])
def test_what_an_arm_of_its_own_mends_is_not_refused(family):
    """The control: the same models by their own code, and by an arm that changes nothing."""
    from ndcheck.samplers.local import faithful
    from ndcheck_kernels import invariant_kernels, invariant_model

    model = make(family)

    @contextmanager
    def invariant():
        with invariant_model(model), invariant_kernels():
            yield

    for arm in (None, nullcontext):
        found = faithful.examine(model, CPU, arm=arm)
        assert found.reason((False, "chunked")), arm
    found = faithful.examine(model, CPU, arm=invariant)
    assert not any(map(found.reason, faithful.PATHS)), found.describe()


@pytest.mark.parametrize("family", ["Bamba", "Lfm2", "Qwen3Next"])
def test_a_column_of_padding_is_no_token(family):
    """A pass of one column is a step to recurrent layers, which know no padding there."""
    model = make(family)
    batch = ExactBatch(model, CPU, 2, len(FILLER))
    batch.reset([PROMPT, FILLER])
    alone = ExactBatch(model, CPU, 1, len(PROMPT))
    alone.reset([PROMPT])
    with torch.inference_mode():
        right = alone.compute_prompt("whole")[0]
        found = batch.compute_prompt("chunked", cut=1)[0]
    assert (found - right).abs().max() < 0.001 * right.std()


SOUND = [family for family in FAMILIES if family not in REFUSED]


@pytest.mark.parametrize("family", SOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", ["enough", "scarce"])
def test_sound_models_are_not_accused(monkeypatch, family, dtype, memory):
    from ndcheck.samplers.local import faithful

    if memory == "scarce":
        monkeypatch.setattr("ndcheck.samplers.local.memory.free_bytes", lambda device: 0)
    model = make(family, dtype)
    before = [(p.dtype, p.data_ptr()) for p in model.parameters()]
    found = faithful.examine(model, CPU)
    assert not any(map(found.reason, faithful.PATHS)), found.describe()
    assert found.sensitivity > 0.1
    assert (found.dtype == torch.float32) == (memory == "enough" or dtype == torch.float32)
    assert before == [(p.dtype, p.data_ptr()) for p in model.parameters()]


@pytest.mark.parametrize("changed", [{}, {"is_decoder": False}, {"initializer_range": 0.02}])
def test_what_sees_later_tokens_is_no_decoder(changed):
    config = transformers.BertConfig(**{**COMMON, **changed})
    config.is_decoder = False
    model = transformers.BertLMHeadModel(config).eval()
    with pytest.raises(UsageError, match="BertLMHeadModel lets a token see those after it"):
        decode(model, False, "whole", [])


def test_the_modes_of_other_threads_hide_no_model(monkeypatch):
    """Torch has one flag for all threads, which stays set once two had modes at the same time."""
    monkeypatch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", True)
    with pytest.raises(UsageError, match="BartForCausalLM computes something else"):
        decode(make("Bart"), True, "whole", [])


def test_flex_attention_reads_the_length_before_the_step():
    """It asks for the mask's offset after the layer has counted on, in place."""
    model = make("Llama")
    batch = ExactBatch(model, CPU, 1, 16)
    batch.reset([PROMPT])
    with torch.inference_mode():
        batch.prefill("whole")
        length = batch.cache.get_seq_length()
        batch.step(torch.tensor([3]))
    assert int(length) == len(PROMPT)


def test_an_axis_that_the_model_cannot_take_is_left_out_or_refused_when_named(tmp_path):
    config = transformers.BartConfig(
        **{**BART, "vocab_size": 8000}, architectures=["BartForCausalLM"]
    )
    config.is_encoder_decoder = False
    config.save_pretrained(tmp_path)
    spec = replace(DEFAULTS, model=str(tmp_path), random_weights=0, dtype="fp32")
    sampler = TransformersSampler(spec)
    assert fit_spec(spec, sampler).axes == tuple(a for a in AXES if a != "neighbours")
    with pytest.raises(UsageError, match="--axes: BartForCausalLM computes something else"):
        fit_spec(replace(spec, axes=("slot", "neighbours")), sampler)
    assert "alone whole" in sampler.describe()["decode_check"]


def test_the_check_reads_no_more_than_it_says():
    """Its cost: some thirty short passes, once."""
    from ndcheck.samplers.local import faithful

    model = make("Llama")
    n_calls = 0
    forward = model.forward

    def counting(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        return forward(*args, **kwargs)

    counting.__signature__ = inspect.signature(forward)
    model.forward = counting
    faithful.examine(model, CPU)
    first = n_calls
    faithful.examine(model, CPU)
    assert first == n_calls <= 60


def test_what_changes_ops_is_not_taken_for_the_model():
    """A recorder, a planted fault or other kernels are not what was asked about."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Fault(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            is_product = func is torch.ops.aten.linear.default
            return -result if is_product and result.shape[0] > 1 else result

    model = make("Llama")
    right, tokens = generate(model)
    with Fault():
        assert not torch.equal(decode(model, True, "whole", tokens), right)
    torch.testing.assert_close(decode(model, True, "whole", tokens), right, rtol=1e-3, atol=1e-3)
