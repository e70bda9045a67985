"""State-space mixers on CPU: what of them is not the scan itself."""

from __future__ import annotations

import pytest
import torch
import transformers

from bench.models import families
from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.models import state_space
from ndcheck_kernels.models.caches.argument import cache_argument

LENGTH, PADS = 9, 4


def make_mixer(model_type, **changes):
    """A mixer with biases in its projections, which stock code convolves into the first tokens."""
    _, own = families.FAMILIES["Mamba-2" if model_type == "mamba2" else "Mamba"]
    config = transformers.AutoConfig.for_model(
        model_type, **{**families._COMMON, **own, "use_bias": True, **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    state_space.replace_mixers(model)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.in_proj.bias.normal_()
    return mixer, lambda: transformers.StaticCache(config=config, max_cache_len=LENGTH + PADS)


def rows(n, width=64):
    return torch.randn(n, LENGTH, width, generator=torch.Generator().manual_seed(1))


def in_passes(mixer, cache, x, starts, mask=None):
    out, name = [], cache_argument(mixer.forward)
    for begin, end in zip(starts, [*starts[1:], x.shape[1]], strict=True):
        part = None if mask is None else mask[:, begin:end]
        out.append(mixer(x[:, begin:end], **{name: cache}, attention_mask=part))
    return torch.cat(out, 1)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_padding_of_any_content_changes_no_bit(model_type):
    mixer, open_cache = make_mixer(model_type)
    x = rows(2)
    with torch.inference_mode(), invariant_kernels():
        alone = in_passes(mixer, open_cache(), x[:1], [0])
        for filler in (0.0, -3.0, float("nan")):
            padded = torch.nn.functional.pad(x, (0, 0, PADS, 0), value=filler)
            mask = torch.ones(padded.shape[:2], dtype=torch.int64)
            mask[:, :PADS] = 0
            for starts in ([0], [0, 2, PADS + 1, PADS + 2]):
                got = in_passes(mixer, open_cache(), padded, starts, mask)
                assert torch.equal(got[:1, PADS:], alone), (filler, starts)


def test_a_models_own_mixer_of_the_same_name_is_another():
    mixer, _ = make_mixer("mamba2")
    kind = type(mixer)
    assert state_space.is_covered(mixer)
    mixer.__class__ = type(kind.__name__, (kind,), {})
    assert not state_space.is_covered(mixer)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_a_cache_that_is_used_again_begins_anew(model_type):
    mixer, open_cache = make_mixer(model_type)
    cache = open_cache()
    with torch.inference_mode(), invariant_kernels():
        first = in_passes(mixer, cache, rows(1), [0, 1, 2])
        cache.reset()
        assert torch.equal(in_passes(mixer, cache, rows(1), [0, 1, 2]), first)
        assert torch.equal(mixer(rows(1)), first)


def test_limits_on_time_steps_hold_in_decode_as_in_prefill():
    mixer, open_cache = make_mixer("mamba2", time_step_limit=(0.5, 0.7))
    each = list(range(LENGTH))
    with torch.inference_mode():
        stock = [in_passes(mixer, open_cache(), rows(1), starts) for starts in ([0], each)]
        with invariant_kernels():
            ours = [in_passes(mixer, open_cache(), rows(1), starts) for starts in ([0], each)]
    assert torch.equal(*ours)
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*stock, rtol=1e-2)


def test_a_gate_without_a_norm():
    """Falcon-H1's smaller models."""
    _, own = families.FAMILIES["Falcon-H1 (hybrid)"]
    config = transformers.AutoConfig.for_model(
        "falcon_h1", **{**families._COMMON, **own, "mamba_rms_norm": False}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    state_space.replace_mixers(model)
    mixer = model.model.layers[0].mamba
    assert isinstance(mixer.norm, torch.nn.Identity)
    with torch.inference_mode():
        stock = mixer(rows(1))
        with invariant_kernels():
            torch.testing.assert_close(mixer(rows(1)), stock, rtol=1e-4, atol=1e-5)


def test_packed_sequences_and_training_are_refused():
    mixer, _ = make_mixer("mamba2")
    with invariant_kernels():
        with pytest.raises(UncoveredOpError, match="packed"):
            mixer(rows(1), seq_idx=torch.zeros(1, LENGTH, dtype=torch.int32))
        with pytest.raises(UncoveredOpError, match="training"):
            mixer.train()(rows(1))
