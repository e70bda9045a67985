"""Fused decoder layers: the numbers of transformers' own, and one row's bits in any company."""

from __future__ import annotations

import os

import pytest
import torch
import transformers

from ndcheck_kernels import invariant_kernels, register_attention
from ndcheck_kernels.cuda.attention.qkv import qkv
from ndcheck_kernels.models import decoder, experts
from ndcheck_kernels.models.caches.argument import cache_argument
from ndcheck_kernels.models.caches.fp8 import keep_fp8
from ndcheck_kernels.models.decoder import fused_layers

FAMILIES = {
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3-moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
CHANGES = {
    "mistral": {"sliding_window": None},
    "qwen3-moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "norm_topk_prob": True, "initializer_range": 0.2},
}  # fmt: skip
PROBE = [5, 17, 90, 33, 21, 8, 64, 2, 11]
OTHERS = [[3] * 14, [9, 4], [77] * 11]
# Half a minute each under the interpreter: float32 has one schedule, which one family shows.
COMPANY = [
    *((family, torch.float16) for family in ("qwen2", "qwen3", "qwen3-moe")),
    ("qwen3-moe", torch.float32),
    *(
        pytest.param(family, dtype, marks=[] if torch.cuda.is_available() else pytest.mark.slow)
        for family, dtype in (("qwen2", torch.float32), ("qwen3", torch.float32))
    ),
]
if torch.cuda.is_available():
    COMPANY += [(family, torch.bfloat16) for family in ("qwen2", "qwen3", "qwen3-moe")]

pytestmark = pytest.mark.usefixtures("cuda_registrations")


@pytest.fixture
def make_model(dtype, device, sizes):
    def make(family, n_layers=2):
        register_attention()
        experts.register_experts()
        config_class, model_class = FAMILIES[family]
        torch.manual_seed(0)
        values = sizes | CHANGES.get(family, {}) | {"num_hidden_layers": n_layers}
        config = config_class(**values, attn_implementation="ndcheck_invariant")
        config._experts_implementation = experts.NAME
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model.to(device=device, dtype=dtype).eval()

    return make


@torch.no_grad()
def logits_of(model, prompts, chunk=None, steps=()):
    """Last logits after the prompt and after each of `steps`: [B, 1 + len(steps), V]."""
    length = max(map(len, prompts))
    device = model.device
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=device)
    pads = torch.tensor([length - len(p) for p in prompts], device=device)
    width = length + len(steps)
    mask = (torch.arange(width, device=device) >= pads[:, None]).long()
    cache = transformers.StaticCache(config=model.config, max_cache_len=width)
    rows, begin = [], 0
    pieces = [ids[:, b : b + (chunk or length)] for b in range(0, length, chunk or length)]
    pieces += [torch.full((len(prompts), 1), step, device=device) for step in steps]
    for piece in pieces:
        columns = torch.arange(begin, begin + piece.shape[1], device=device)
        out = model(
            input_ids=piece,
            attention_mask=mask,
            position_ids=(columns - pads[:, None]).clamp(min=0),
            logits_to_keep=1,
            **{cache_argument(model.forward): cache},
        )
        begin += piece.shape[1]
        rows.append(out.logits[:, -1])
    return torch.stack(rows[-1 - len(steps) :], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_compute_what_transformers_does(family, make_model, dtype) -> None:
    model = make_model(family)
    with invariant_kernels() as scope:
        plain = logits_of(model, [PROBE, OTHERS[1]], steps=[4])
        before = scope.fires.copy()
        with fused_layers(model) as n_layers:
            fused = logits_of(model, [PROBE, OTHERS[1]], steps=[4])
    assert n_layers == 2
    fires = scope.fires - before
    assert fires["qkv"] == 2 * n_layers
    assert fires["_grouped_mm"] == (4 * n_layers if family == "qwen3-moe" else 0)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)


def _by_its_own_name(layer) -> None:
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (kind,), {})


def _norm(width) -> torch.nn.Module:
    return torch.nn.LayerNorm(width, dtype=torch.float32)


OWN = {
    "class of the layer": _by_its_own_name,
    "class of a norm": lambda layer: _by_its_own_name(layer.post_attention_layernorm),
    "hook": lambda layer: layer.mlp.register_forward_hook(lambda module, args, out: out / 2),
    "forward": lambda layer: setattr(layer.mlp, "forward", lambda x: x),
    "no attention": lambda layer: setattr(layer, "self_attn", torch.nn.Identity()),
    "norm of torch": lambda layer: setattr(layer, "input_layernorm", _norm(64)),
    "norm of heads of torch": lambda layer: setattr(layer.self_attn, "q_norm", _norm(32)),
}


@pytest.mark.parametrize("change", OWN)
def test_layers_with_code_of_the_models_own_are_not_fused(change, make_model) -> None:
    model = make_model("qwen3")
    OWN[change](model.model.layers[1])
    with invariant_kernels(), fused_layers(model) as n_layers:
        assert n_layers == 0


@pytest.mark.parametrize(("family", "dtype"), COMPANY, ids=str)
def test_a_row_has_the_same_bits_in_any_company(family, dtype, make_model) -> None:
    # From one layer to the next the dense families go, and a mixture where that takes no minute.
    model = make_model(family, 1 if family == "qwen3-moe" and not torch.cuda.is_available() else 2)
    with invariant_kernels(), fused_layers(model):
        alone = logits_of(model, [PROBE], steps=[4])[0]
        together = logits_of(model, [OTHERS[0], PROBE, OTHERS[1], PROBE], steps=[4])
        for place in (1, 3):
            assert torch.equal(together[place], alone), f"slot {place}"
        assert torch.equal(logits_of(model, [PROBE, OTHERS[0]], 5, [4])[0], alone)
        changed = logits_of(model, [[*PROBE[:-1], 12]])[0]
    assert not torch.equal(changed, alone[:1])


def test_a_row_has_the_same_bits_over_an_fp8_cache(make_model, monkeypatch) -> None:
    model, plain = make_model("qwen3"), transformers.StaticCache
    with invariant_kernels(), fused_layers(model):
        over_floats = logits_of(model, [PROBE], steps=[4])[0]

    def narrow(**options):
        cache = plain(**options)
        keep_fp8(cache, model.dtype)
        caches.append(cache)
        return cache

    caches: list[transformers.StaticCache] = []
    monkeypatch.setattr(transformers, "StaticCache", narrow)
    with invariant_kernels(), fused_layers(model):
        alone = logits_of(model, [PROBE], steps=[4])[0]
        assert torch.equal(logits_of(model, [*OTHERS[1:], PROBE], steps=[4])[-1], alone)
        assert torch.equal(logits_of(model, [PROBE, OTHERS[1]], 5, [4])[0], alone)
    kept = {layer.keys.dtype for cache in caches for layer in cache.layers}
    assert kept == {torch.float8_e4m3fn}
    difference = (alone - over_floats).norm() / over_floats.norm()
    assert 2.0**-12 < difference < 2.0**-3  # Keys and values are rounded by a 32nd on average.


def test_the_model_is_as_before_when_the_block_ends(make_model) -> None:
    model = make_model("qwen3")
    names = [name for name, _ in model.named_parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    with fused_layers(model):
        pass
    assert "forward" not in vars(model.model.layers[0])
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_other_models_and_windows_are_left_alone(make_model) -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2))
    with fused_layers(gpt2) as n_layers:
        assert n_layers == 0
    model = make_model("qwen3")
    model.model.layers[1].self_attn.sliding_window = 8
    with fused_layers(model) as n_layers:
        assert n_layers == 0
    mistral = make_model("mistral")  # Its attention has no attribute for it.
    with fused_layers(mistral) as n_layers:
        assert n_layers > 0
    mistral.config.sliding_window = 8
    with fused_layers(mistral) as n_layers:
        assert n_layers == 0


def test_qkv_refuses_what_it_cannot_split(device) -> None:
    x, angles = torch.zeros(1, 2, 48, device=device), torch.zeros(1, 2, 12, device=device)
    cache = torch.zeros(1, 1, 4, 12, device=device)
    with pytest.raises(ValueError, match="heads of 12"):
        qkv(x, angles, angles, cache, cache, torch.tensor(0, device=device))


def test_layers_whose_kernel_does_not_compile_run_unfused(make_model, monkeypatch, capfd) -> None:
    """As Triton 3.6 once refused heads of 32: one line, and the unfused layer's numbers."""

    def qkv_that_fails(*args, **kwargs):
        os.write(2, b"module { tt.func public @_qkv_kernel }\n" * 100)
        raise RuntimeError("PassManager::run failed")

    model = make_model("qwen3")
    with invariant_kernels():
        plain = logits_of(model, [PROBE])
        monkeypatch.setattr(decoder, "qkv", qkv_that_fails)
        monkeypatch.setattr(decoder, "_compile_failures", {})
        announced = pytest.warns(UserWarning, match=r"unfused.*does not compile under Triton")
        with announced, fused_layers(model) as n_layers:
            assert n_layers == 0
            assert torch.equal(logits_of(model, [PROBE]), plain)
    assert "tt.func" not in capfd.readouterr().err


def test_another_error_of_a_kernel_is_not_taken_for_the_compiler(make_model, monkeypatch) -> None:
    monkeypatch.setattr(decoder, "_compile_failures", {})
    monkeypatch.setattr(decoder, "qkv", lambda *args, **kwargs: 1 / 0)
    model = make_model("qwen3")
    with pytest.raises(ZeroDivisionError), fused_layers(model):
        pass
