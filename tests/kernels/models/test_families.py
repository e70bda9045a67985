"""Model families on CPU: the support table is current, and faults in a model are caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

import ndcheck_kernels
from bench.models import families, support
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.models import attention, own_attention

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NAMES = list(families.FAMILIES)
PROPERTIES = (
    *("run-to-run", "batch-size", "slot", "neighbours", "cache"),
    *("width", "scoring"),
)
# The prompt, and a step after a step.
GRID = replace(support.QUICK, max_tokens=3)


@pytest.fixture(scope="module")
def on_cpu():
    """The committed rows of the table for this kind of device, by family and dtype."""
    results = {result["device"]: result for result in support.load_results()}
    return {(row["family"], row["dtype"]): row for row in results["cpu"]["rows"]}


def test_the_table_shows_the_results():
    (table,) = support.TABLE.findall(support.README.read_text())
    assert table == support.render(support.load_results())


def test_the_table_has_every_family_in_two_dtypes(on_cpu):
    assert sorted(on_cpu) == sorted((name, dtype) for name in NAMES for dtype in ("bf16", "fp32"))


# In fp32 every rounding shows; in bf16 one family of each kind by default.
ROUNDED = ("Qwen3", "Qwen2-MoE", "Qwen3.5 (hybrid)", "OLMo 3", "GPT-2")
CELLS = [
    *((family, "fp32") for family in NAMES),
    *(
        pytest.param(family, "bf16", marks=[] if family in ROUNDED else pytest.mark.slow)
        for family in NAMES
    ),
]


@pytest.mark.parametrize(("family", "dtype"), CELLS)
def test_the_table_is_current(family, dtype, on_cpu):
    expected = on_cpu[family, dtype]["invariant"]
    measured = support.measure(family, dtype, "cpu", "invariant", GRID)
    assert measured.get("refused") == expected.get("refused")
    if "refused" not in expected:
        assert measured["outcome"] == expected["outcome"] == "PASS", measured
        assert set(measured["axes"]) == set(PROPERTIES)
        assert all(axis["n_trials"] for axis in measured["axes"].values())


def test_a_neighbour_dependent_router_is_caught(monkeypatch):
    """The planted fault: a capacity of 12 tokens per expert; those that come later lose theirs."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    own = MixtralTopKRouter.forward

    def limited(router, hidden_states):
        logits, weights, index = own(router, hidden_states)
        place = torch.nn.functional.one_hot(index, router.num_experts).sum(1).cumsum(0)
        return logits, weights * (place.gather(1, index) <= 12), index

    own_sampler = support.TransformersSampler

    def load_then_plant(spec):
        sampler = own_sampler(spec)
        # Before, the check of the model against generate() would refuse it unmeasured.
        monkeypatch.setattr(MixtralTopKRouter, "forward", limited)
        return sampler

    monkeypatch.setattr(support, "TransformersSampler", load_then_plant)
    outcome = support.measure("Mixtral", "fp32", "cpu", "invariant", GRID)
    assert outcome["outcome"] == "FAIL"
    assert outcome["axes"]["slot"]["outcome"] == "FAIL"
    assert outcome["axes"]["neighbours"]["outcome"] == "FAIL"
    assert outcome["axes"]["run-to-run"]["outcome"] == "PASS"


def test_a_window_that_follows_the_padding_is_caught(monkeypatch):
    """The planted fault: the window begins at a multiple of 8, counted from the padded column."""
    own = attention.spans_from_mask

    def rounded(visible, origin=None):
        spans = own(visible, origin)
        begin = torch.maximum(spans[..., 0], spans[..., 1] // 8 * 8)
        return torch.stack([spans[..., 0], begin, spans[..., 2]], -1)

    monkeypatch.setattr(attention, "spans_from_mask", rounded)
    outcome = support.measure("OLMo 3", "fp32", "cpu", "invariant", GRID)
    assert outcome["axes"]["neighbours"]["outcome"] == "FAIL"
    assert outcome["axes"]["run-to-run"]["outcome"] == "PASS"


def test_the_model_has_its_own_ways_again():
    model = families.build_model("Mixtral")
    own = model.config._attn_implementation, model.config._experts_implementation
    with ndcheck_kernels.invariant_model(model):
        assert model.config._attn_implementation == "ndcheck_invariant"
        assert model.config._experts_implementation == "ndcheck_invariant"
    assert (model.config._attn_implementation, model.config._experts_implementation) == own


OWN_ATTENTION = ("BLOOM (ALiBi)", "MPT (ALiBi)", "Falcon (ALiBi)", "Falcon", "GPT-J")
MIXERS = (
    *("Mamba", "Falcon-Mamba", "Mamba-2", "Nemotron-H (hybrid)", "Granite 4 (hybrid, MoE)"),
    *("Falcon-H1 (hybrid)", "Bamba (hybrid)", "Zamba 2 (hybrid)", "Jamba (hybrid, MoE)"),
    "LFM2 (hybrid)",
)


@pytest.mark.parametrize("family", [*OWN_ATTENTION, "Qwen3.5 (hybrid)", *MIXERS])
def test_replaced_modules_are_stock_outside_the_scope(family):
    model, ids = families.build_model(family), torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        with ndcheck_kernels.invariant_model(model), invariant_kernels():
            inside = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, after)
    assert torch.allclose(inside, before, atol=1e-3)
    assert not torch.equal(inside, before)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 112])
def test_alibi_has_the_slopes_of_each_model(heads):
    from transformers.models.bloom import modeling_bloom
    from transformers.models.mpt import modeling_mpt

    ones = torch.ones(1, 3, dtype=torch.int64)
    bloom = modeling_bloom.build_alibi_tensor(ones, heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(
        own_attention.alibi_slopes(heads, torch.device("cpu")), bloom, rtol=1e-6, atol=0
    )
    steps = modeling_mpt.build_mpt_alibi_tensor(heads, 3).diff(dim=-1)[:, 0, 0]
    torch.testing.assert_close(
        own_attention.mpt_slopes(heads, torch.device("cpu")), steps, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("rope", "most"), [("longrope", 512), ("dynamic", 511)])
def test_frequencies_that_follow_the_longest_row_are_refused(rope, most):
    """The control: token 8 has other angles in a batch with token 599."""
    if rope == "longrope":
        model = families.build_model("Phi-3 (long rope)")
    else:
        config = families.build_model("Qwen3").config
        config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        model = transformers.AutoModelForCausalLM.from_config(config).eval()

    refusal = rf"rotary frequencies .* beyond {most} positions"
    with torch.inference_mode(), ndcheck_kernels.invariant_model(model), invariant_kernels():
        model(torch.arange(most)[None])
        with pytest.raises(UncoveredOpError, match=refusal):
            model(torch.arange(most + 1)[None])
    short, long = (
        model.model.rotary_emb(torch.ones(1), torch.tensor([places]))[0]
        for places in ([0, 8], [0, 8, 599])
    )
    assert not torch.equal(short[0, 1], long[0, 1])


def assert_refused(model, match):
    with pytest.raises(UncoveredOpError, match=match), ndcheck_kernels.invariant_model(model):
        pass


def test_quantised_weights_are_refused_by_name():
    model = families.build_model("Qwen3")
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert_refused(
        model, r"quantised weights \(torch.float8_e4m3fn on cpu\) in model\.layers\.1\.mlp"
    )


def test_products_with_quantised_weights_are_refused_by_name():
    class Int8Linear(torch.nn.Module):
        def forward(self, x):
            weight, scales = torch.ones(8, 16, dtype=torch.int8), torch.ones(8).bfloat16()
            return torch.ops.aten._weight_int8pack_mm(x, weight, scales)

    with (
        invariant_kernels(),
        pytest.raises(UncoveredOpError, match=r"_weight_int8pack_mm.*\(Int8Linear\)"),
    ):
        torch.nn.Sequential(Int8Linear())(torch.ones(3, 16).bfloat16())


def test_other_linear_attention_is_refused_by_name():
    config = transformers.AutoConfig.for_model(
        "minimax",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=2,
        layer_types=["full_attention", "linear_attention"],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert_refused(model, r"linear attention .* in model\.layers\.1\.self_attn \(MiniMaxLightning")


@pytest.mark.parametrize("cache_state", ["whole", "chunked", "prefix"])
@pytest.mark.parametrize("family", ["OLMo 3", "Llama 4", "Qwen3.5 (hybrid)", *MIXERS])
def test_padded_rows_over_windows_and_states(family, cache_state):
    """Prefixes longer than the window, shorter than it, and none at all; 0 is the padding token."""
    model = families.build_model(family)
    rows = [list(range(5, 5 + length)) for length in (30, 47, 1, 60)]
    with (
        torch.inference_mode(),
        ndcheck_kernels.invariant_model(model),
        invariant_kernels(),
    ):
        beside = ExactBatch(model, torch.device("cpu"), len(rows), max(map(len, rows)) + 3)
        beside.reset(rows)
        together = [beside.compute_prompt(cache_state)]
        tokens = together[0].argmax(-1)
        together.append(beside.step(tokens))
        for slot, row in enumerate(rows):
            alone = ExactBatch(model, torch.device("cpu"), 1, len(row) + 3)
            alone.reset([row])
            assert torch.equal(alone.compute_prompt("whole")[0], together[0][slot])
            assert torch.equal(alone.step(tokens[slot : slot + 1])[0], together[1][slot])
