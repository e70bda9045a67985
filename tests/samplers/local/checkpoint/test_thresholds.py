"""What a model's own code computes otherwise in longer rows only is refused as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from ndcheck.errors import UsageError
from ndcheck.records import AXES, Decoding, Probe
from ndcheck.request import DEFAULTS
from ndcheck.samplers.batch import ExactBatch
from ndcheck.samplers.local.sampler import TransformersSampler

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
LONG = {
    "GPTNeo": (
        {**COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "window_size",
        {"alone whole"},
    ),
    "Moshi": ({**COMMON, "audio_vocab_size": 32}, "sliding_window", {"alone chunked"}),
    "Llama": (COMMON, "attention_window", set()),
    "Mistral": (COMMON, "sliding_window", set()),
    "Qwen2": (
        {
            **COMMON,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "sliding_window",
        set(),
    ),
}


@pytest.mark.parametrize("family", LONG)
@pytest.mark.parametrize(("n_prompt", "is_beyond"), [(8, False), (40, True)])
def test_what_only_longer_rows_show_is_seen(family, n_prompt, is_beyond):
    """The right logits are those of `generate()`, of a prompt that passes the model's window."""
    settings, window, wrong = LONG[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**settings, window: 24})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    prompt = [int(i) for i in torch.randint(3, 90, (n_prompt,))]
    done = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, n_prompt, dtype=torch.int64),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    right = done.logits[0][0]
    for state in ("whole", "chunked", "prefix"):
        batch = ExactBatch(model, torch.device("cpu"), 1, n_prompt + 4)
        batch.reset([prompt])
        is_refused = is_beyond and bool({"alone whole", f"alone {state}"} & wrong)
        with torch.inference_mode():
            if is_refused:
                with pytest.raises(UsageError, match=r"which is no rounding \(in \d+ tokens: try"):
                    batch.prefill(state)
            else:
                seen = batch.prefill(state)[0]
                assert (seen - right).abs().max() < 0.001 * right.std()


def test_a_run_of_rows_beyond_a_window_is_refused(tmp_path):
    """Of GPT-Neo, whose own code reads a cache of fixed length as if it were full."""
    settings, window, _ = LONG["GPTNeo"]
    vocabulary = {"vocab_size": 8000, "max_position_embeddings": 512, window: 64}
    config = transformers.GPTNeoConfig(**{**settings, **vocabulary})
    config.architectures = ["GPTNeoForCausalLM"]
    config.save_pretrained(tmp_path)
    spec = replace(DEFAULTS, model=str(tmp_path), random_weights=0, dtype="fp32")
    TransformersSampler(replace(spec, decoding=Decoding(4)))
    with pytest.raises(UsageError, match=r"GPTNeo.* no rounding \(in \d+ tokens: try fewer\)"):
        TransformersSampler(replace(spec, decoding=Decoding(200)))


@pytest.mark.parametrize("arm", ["stock", "invariant"])
@pytest.mark.parametrize("family", ["Moshi", "Mistral"])
def test_a_model_that_decodes_otherwise_than_it_prefills_is_not_scored(tmp_path, family, arm):
    """Moshi's window in a prompt is another than in a step, as `generate()` shows."""
    settings, window, _ = LONG[family]
    config = getattr(transformers, f"{family}Config")(
        **{**settings, "vocab_size": 8000, "max_position_embeddings": 512, window: 16}
    )
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)
    probe = Probe("p1", "the order of a sum " * 9)
    spec = replace(DEFAULTS, model=str(tmp_path), random_weights=0, dtype="fp32", probes=(probe,))
    sampler = TransformersSampler(replace(spec, axes=AXES, decoding=Decoding(4), arms=(arm,)))
    prompt = torch.tensor([sampler.encode(probe.content)], device=sampler.model.device)
    assert prompt.shape[1] > 16
    done = sampler.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    decoded = torch.cat(done.logits)
    with torch.inference_mode():
        scored = sampler.model(done.sequences[:, :-1]).logits[0, -4:]
    is_other = (scored - decoded).abs().max() > 0.01 * decoded.std()
    assert is_other == (family == "Moshi")
    assert ("scoring" in dict(sampler.refused_axes)) == is_other


@pytest.mark.parametrize(("lengths", "is_beyond"), [((9, 15), False), ((30, 50), True)])
def test_attention_that_is_scaled_by_the_column_is_seen(lengths, is_beyond):
    """Llama 4 counts its temperature's steps from the first column, padded or not."""
    settings = {**COMMON, "head_dim": 16, "num_local_experts": 2, "no_rope_layers": [0, 0]}
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**settings, floor_scale=40, attn_scale=2.0)
    model = transformers.Llama4ForCausalLM(config).eval()
    batch = ExactBatch(model, torch.device("cpu"), 2, max(lengths) + 4)
    batch.reset([torch.randint(3, 90, (n,)).tolist() for n in lengths])
    with torch.inference_mode():
        if is_beyond:
            with pytest.raises(UsageError, match="of a padded row differ by"):
                batch.prefill("whole")
        else:
            batch.prefill("whole")
