"""Whole models on CPU: the logits of a probe row, under every load, against the probe alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers

from ndcheck_kernels import UncoveredOpError, invariant_kernels, register_attention
from ndcheck_kernels.models.caches.argument import cache_argument

DTYPES = [torch.bfloat16, torch.float32]
COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "bos_token_id": None}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {}),
    # A window shorter than the prompts, and capped scores.
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"sliding_window": 48}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"sliding_window": 48}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"eos_token_id": None}),
}
MAIN = ["qwen3", "llama", "gemma"]
STEPS = 3

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def models():
    """`get(family, dtype)`: a model with random weights, built once."""
    register_attention()
    built = {}

    def get(family, dtype, attention="ndcheck_invariant"):
        if (family, dtype) not in built:
            model_class, config_class, changes = FAMILIES[family]
            torch.manual_seed(0)
            values = changes if family == "gpt2" else COMMON | changes
            config = getattr(transformers, config_class)(**values, attn_implementation=attention)
            model = getattr(transformers, model_class)(config).to(dtype).eval()
            built[family, dtype] = model
        built[family, dtype].set_attn_implementation(attention)
        return built[family, dtype]

    return get


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (count,), generator=generator).tolist()


PROBE = tokens(70, 0)


@torch.no_grad()
def greedy_logits(model, prompts, *, static=False, chunk=None):
    """Last logits of a prefill and of STEPS greedy steps: [B, STEPS + 1, V]."""
    batch, length = len(prompts), max(map(len, prompts))
    ids = torch.zeros(batch, length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    mask = torch.cat([mask, mask.new_ones(batch, STEPS)], -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=length + STEPS + 37)
    else:
        cache = transformers.DynamicCache(config=model.config)
    ends = [*range(chunk or length, length, chunk or length), length]
    ends += range(length + 1, length + STEPS + 1)
    logits, start = [], 0
    for end in ends:
        if end > length:
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], -1)
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            logits_to_keep=1,
            **{cache_argument(model.forward): cache},
        )
        if end >= length:
            logits.append(out.logits[:, -1])
        start = end
    return torch.stack(logits, 1)


def filled(batch, *slots):
    """The probe among fillers, shorter and longer ones, so that it is padded on the left."""
    prompts = [tokens(20 + (53 * i) % 130, i + 1) for i in range(batch)]
    for slot in slots:
        prompts[slot] = PROBE
    return prompts


def violations(model, batches=(2, 3, 5, 8, 17)):
    """Loads under which the probe's logits were not those of the probe alone, as they are found."""
    alone = greedy_logits(model, [PROBE])[0]
    for batch in batches:
        # Side by side where fillers stay between them: a large batch takes long.
        places = [(0, batch // 2, batch - 1)] if batch > 3 else [(slot,) for slot in range(batch)]
        for slots in places:
            rows = greedy_logits(model, filled(batch, *slots))
            yield from (
                f"batch {batch}, slot {s}" for s in slots if not torch.equal(rows[s], alone)
            )
    loads = {
        "copies": ([PROBE] * 6, {}),
        "static cache": ([PROBE], {"static": True}),
        "static cache, padded": (filled(4, 1), {"static": True}),
        **{f"chunks of {chunk}": ([PROBE], {"chunk": chunk}) for chunk in (1, 7, 64)},
        "chunks, padded": (filled(4, 1), {"chunk": 50}),
    }
    for name, (prompts, options) in loads.items():
        rows = greedy_logits(model, prompts, **options)
        probes = [row for row, prompt in zip(rows, prompts, strict=True) if prompt == PROBE]
        if not all(torch.equal(row, alone) for row in probes):
            yield name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", MAIN)
def test_a_row_does_not_depend_on_its_load(family, dtype, models):
    model = models(family, dtype)
    with invariant_kernels() as scope:
        assert list(violations(model)) == []
    assert scope.missing(["gemm", "attention", "mean"]) == ()
    assert not scope.refused


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MAIN])
def test_nor_in_other_families(family, models):
    with invariant_kernels():
        assert list(violations(models(family, torch.bfloat16), batches=(3, 9))) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", MAIN)
def test_the_stock_arm_fails(family, dtype, models):
    assert any(violations(models(family, dtype, "sdpa"), batches=(3, 17)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, models):
    model = models("qwen3", dtype)
    with invariant_kernels():
        one = greedy_logits(model, filled(5, 2))
        torch.set_num_threads(2)
        two = greedy_logits(model, filled(5, 2))
    assert torch.equal(one, two)


def test_sdpa_inside_the_scope_has_the_same_bits(models):
    with invariant_kernels():
        ours = greedy_logits(models("qwen3", torch.bfloat16), filled(5, 2))
        sdpa = greedy_logits(models("qwen3", torch.bfloat16, "sdpa"), filled(5, 2))
    assert torch.equal(ours[2], sdpa[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_arm_is_as_accurate_as_stock(dtype, models):
    model = models("qwen3", dtype, "sdpa")
    logits = {}
    for arm in ("sdpa", "ndcheck_invariant"):
        model = models("qwen3", dtype, arm)
        with nullcontext() if arm == "sdpa" else invariant_kernels():
            logits[arm] = greedy_logits(model, [PROBE])[0, 0].double()
    exact = greedy_logits(models("qwen3", dtype, "sdpa").to(torch.float64), [PROBE])[0, 0]
    models("qwen3", dtype).to(dtype)
    error = {arm: (value - exact).abs().max() for arm, value in logits.items()}
    assert error["ndcheck_invariant"] <= 2 * error["sdpa"]


def test_arms_can_take_turns_in_one_process(models):
    model = models("qwen3", torch.float32)
    results = {"sdpa": [], "ndcheck_invariant": []}
    for _ in range(2):
        for arm, seen in results.items():
            model.set_attn_implementation(arm)
            with nullcontext() if arm == "sdpa" else invariant_kernels():
                seen.append(greedy_logits(model, filled(3, 1)))
    assert all(torch.equal(*seen) for seen in results.values())


def test_generate_runs_in_the_scope(models):
    model = models("llama", torch.float32)
    with invariant_kernels():
        alone = model.generate(torch.tensor([PROBE]), max_new_tokens=4, do_sample=False)
        both = model.generate(torch.tensor([PROBE] * 2), max_new_tokens=4, do_sample=False)
    assert torch.equal(both, alone.expand(2, -1))


def test_the_attention_name_needs_the_scope(models):
    with pytest.raises(RuntimeError, match="only runs inside"):
        models("qwen3", torch.float32)(torch.tensor([PROBE]))


def test_a_window_under_sdpa_is_refused(models):
    model = models("gemma3", torch.bfloat16, "sdpa")
    with invariant_kernels(), pytest.raises(UncoveredOpError, match=r"layers\.0\.self_attn"):
        greedy_logits(model, [PROBE])


def test_eager_attention_is_reported_as_a_missing_override(models):
    """Its reductions run over the padded keys, so it cannot be invariant, and is not counted."""
    with invariant_kernels() as scope:
        greedy_logits(models("qwen3", torch.bfloat16, "eager"), [PROBE])
    assert scope.missing() == ("attention",)


def test_a_convolution_is_refused_by_module():
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, lru_width=16
    )
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    with invariant_kernels(), pytest.raises(UncoveredOpError, match=r"layers\.0\.temporal_block"):
        model(torch.tensor([PROBE[:5]]) % 64, use_cache=False)
