"""The batch is exactly the one asked for, and its tokens are those of `model.generate`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from ndcheck.errors import TrialError, UsageError
from ndcheck.plan.trials import plan_trials
from ndcheck.records import AXES, Decoding, Fault, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.decoding.selection import lowest_argmax
from ndcheck.samplers.local.device import choose_device
from ndcheck.samplers.local.loading import DTYPES
from ndcheck.samplers.local.sampler import TransformersSampler, digest_weights

PROBE = Probe("p1", "tell me about the order of a sum")
N_TOKENS = 12
GREEDY = Decoding(N_TOKENS)
FAMILIES = ("qwen3", "llama", "gemma3")


@pytest.fixture(scope="module")
def samplers(tiny_models):
    return {
        family: TransformersSampler(replace(DEFAULTS, model=str(directory)))
        for family, directory in tiny_models.items()
    }


ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def exact_batch(sampler, rows, n_tokens):
    width = max(map(len, rows)) + n_tokens
    batch = ExactBatch(sampler._model, sampler._device, len(rows), width)
    batch.reset(rows)
    return batch


def sample(sampler, load, decoding=GREEDY, fault=None):
    return sampler.sample(Trial(0, "stock", "p1", "slot", load, 0, fault=fault), PROBE, decoding)


def mixed_load(sampler, cache_state="whole"):
    length = sampler.count_tokens(PROBE.prompt)
    return Load(4, (1,), (length + 5, 1, length - 3), 11, cache_state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", ["alone", "copies", "mixed"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_tokens_equal_generate_on_the_same_batch(tiny_models, device, family, shape):
    # On CUDA in fp32: bf16 logits are often equal, and torch's argmax there takes any of them.
    spec = replace(DEFAULTS, model=str(tiny_models[family]), device=device)
    sampler = TransformersSampler(replace(spec, dtype="fp32") if device == "cuda" else spec)
    load = {"alone": Load(1), "copies": Load(3, (0, 1, 2)), "mixed": mixed_load(sampler)}[shape]
    rows = sampler.rows(load, PROBE)
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    generated = sampler._model.generate(
        padded.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=N_TOKENS,
        min_new_tokens=N_TOKENS,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        # min_new_tokens masks the stop token's logit; without one, nothing is masked.
        eos_token_id=-1,
    )[:, width:]
    batch = exact_batch(sampler, rows, N_TOKENS)
    with torch.inference_mode():
        logits = batch.prefill("whole")
        ours = [lowest_argmax(logits)]
        for _ in range(N_TOKENS - 1):
            ours.append(lowest_argmax(batch.step(ours[-1])))
    assert torch.equal(torch.stack(ours, dim=1), generated)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache_state", ["whole", "chunked", "prefix"])
def test_padding_and_cache_state_keep_the_mathematics(tiny_models, family, cache_state):
    """In fp32 a padded row beside fillers gives the logits of the row alone, to rounding."""
    sampler = TransformersSampler(
        replace(DEFAULTS, model=str(tiny_models[family]), dtype="fp32", attention="eager")
    )
    length = sampler.count_tokens(PROBE.prompt)
    load = Load(3, (1,), (length + 2, length - 1), 5, cache_state)
    rows = sampler.rows(load, PROBE)
    with torch.inference_mode():
        alone = exact_batch(sampler, [rows[1]], 4)
        beside = exact_batch(sampler, rows, 4)
        expected, seen = alone.prefill("whole"), beside.prefill(cache_state)[1:2]
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
        token = lowest_argmax(expected)
        step = beside.step(token.expand(3).contiguous())[1:2]
        torch.testing.assert_close(step, alone.step(token), rtol=1e-4, atol=1e-4)


def test_the_batch_that_ran_is_witnessed(samplers):
    sampler = samplers["qwen3"]
    for load, prefill_calls in ((Load(5, (0, 4), (3, 9, 2)), 1), (Load(2, cache_state="chunked",
        filler_lengths=(9,)), 3)):  # fmt: skip
        for result in sample(sampler, load):
            assert result.witness.achieved_batch_size == load.batch_size
            assert result.witness.prefill_calls == prefill_calls
            assert result.witness.decode_calls == N_TOKENS - 1


def test_rows_hold_probe_and_fillers_where_the_load_says(samplers):
    sampler = samplers["qwen3"]
    probe_ids = sampler._prompts.encode(PROBE.prompt)
    rows = sampler.rows(Load(4, (2,), (3, 20, 1), filler_seed=1), PROBE)
    assert rows[2] == probe_ids
    assert [len(row) for row in rows] == [3, 20, len(probe_ids), 1]
    again = sampler.rows(Load(4, (2,), (3, 20, 1), filler_seed=1), PROBE)
    other = sampler.rows(Load(4, (2,), (3, 20, 1), filler_seed=2), PROBE)
    assert rows == again
    assert rows != other


def test_a_finished_row_does_not_change_the_batch(samplers):
    """The stop token ends a sample; the row decodes on, so the other rows' batch stays."""
    sampler = samplers["llama"]
    longest = sample(sampler, Load(2, (0, 1)))[0]
    stop = longest.token_ids[3]
    first_stop = longest.token_ids.index(stop)
    original, sampler._stop_ids = sampler._stop_ids, {stop}
    try:
        (ended,) = sample(sampler, Load(1))
    finally:
        sampler._stop_ids = original
    assert ended.finish_reason == "stop"
    assert ended.token_ids == longest.token_ids[: first_stop + 1]
    assert longest.finish_reason == "length"


def test_same_load_twice_gives_the_same_bits(samplers):
    sampler = samplers["gemma3"]
    first, second = (sample(sampler, mixed_load(sampler))[0] for _ in range(2))
    assert first.row_digests == second.row_digests
    assert first.logprobs == second.logprobs
    assert replace(first, elapsed_s=0) == replace(second, elapsed_s=0)


def test_control_shows_where_it_was_planted(samplers):
    sampler = samplers["qwen3"]
    (clean,), (faulty,) = sample(sampler, Load(1)), sample(sampler, Load(1), fault=Fault(3, 6))
    bits = [t for t in range(N_TOKENS) if clean.row_digests[t] != faulty.row_digests[t]]
    tokens = [t for t in range(N_TOKENS) if clean.token_ids[t] != faulty.token_ids[t]]
    assert bits[:2] == [3, 6]
    assert tokens[0] == 6


def test_sampled_completions_depend_on_seed_not_on_load(tiny_models):
    sampler = TransformersSampler(replace(DEFAULTS, model=str(tiny_models["qwen3"]), dtype="fp32"))
    decoding = Decoding(N_TOKENS, temperature=1.0, seed=1)
    (alone,) = sample(sampler, Load(1), decoding)
    copies = sample(sampler, Load(3, (0, 1, 2)), decoding)
    (other,) = sample(sampler, Load(1), replace(decoding, seed=2))
    assert {result.token_ids for result in copies} == {alone.token_ids}
    assert other.token_ids != alone.token_ids


def test_texts_concatenate_to_the_decoded_completion(samplers):
    for sampler in samplers.values():
        (result,) = sample(sampler, Load(1), Decoding(40))
        assert len(result.token_texts) == len(result.token_ids)
        assert result.text == sampler._prompts._tokenizer.decode(list(result.token_ids))


def test_characters_of_several_tokens_belong_to_the_last(samplers):
    sampler = samplers["qwen3"]
    token_ids = tuple(sampler._prompts._tokenizer("é🧪x")["input_ids"])
    texts = sampler._prompts.token_texts(token_ids)
    assert "".join(texts) == "é🧪x"
    assert "" in texts


def test_nan_logits_are_a_failed_trial(samplers, monkeypatch):
    sampler = samplers["qwen3"]
    nan = torch.full((1, 279), torch.nan, device=sampler._device)
    monkeypatch.setattr(ExactBatch, "prefill", lambda self, state, cut: nan)
    with pytest.raises(TrialError, match="NaN at token 1"):
        sample(sampler, Load(1))


def test_out_of_memory_names_the_load(samplers, monkeypatch):
    def refuse(self, state, cut):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(ExactBatch, "prefill", refuse)
    with pytest.raises(TrialError, match="out of memory at batch size 2, and at 1"):
        sample(samplers["qwen3"], Load(2, (0, 1)))


def test_the_default_plan_runs_on_every_family(samplers):
    for sampler in samplers.values():
        lengths = {PROBE.probe_id: sampler.count_tokens(PROBE.prompt)}
        spec = replace(
            DEFAULTS, probes=(PROBE,), decoding=Decoding(3), batch_sizes=(1, 3), n_samples=33
        )
        trials = plan_trials(spec, lengths, sampler.context)
        assert {t.purpose for t in trials} > set(AXES)
        for trial in trials:
            results = sampler.sample(trial, PROBE, spec.decoding)
            assert [r.slot for r in results] == list(trial.load.slots)


def test_model_identity(samplers):
    identities = [sampler.describe() for sampler in samplers.values()]
    assert len({identity["digest"] for identity in identities}) == len(FAMILIES)
    model = samplers["qwen3"]._model
    before = digest_weights(model)
    with torch.no_grad():
        parameter = next(model.parameters())
        parameter[0, 0] += 1
        changed = digest_weights(model)
        parameter[0, 0] -= 1
    assert before != changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "no/such-model"}, "no/such-model"),
        ({"device": "warp"}, "--device warp is not available"),
        ({"device": "meta"}, "--device meta is not available"),
        ({"chat": True}, "has no chat template"),
        ({"attention": "warp"}, "warp"),
    ],
)
def test_what_cannot_be_used_is_one_line(tiny_models, changed, message):
    spec = replace(DEFAULTS, **{"model": str(tiny_models["qwen3"]), **changed})
    with pytest.raises(UsageError, match=message) as caught:
        TransformersSampler(spec)
    assert "\n" not in str(caught.value)


def test_directories_that_hold_no_usable_model(tiny_models, tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        TransformersSampler(replace(DEFAULTS, model=str(tmp_path)))
    for file in tiny_models["qwen3"].iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UsageError, match="tokenizer"):
        TransformersSampler(replace(DEFAULTS, model=str(tmp_path)))


def test_weights_other_than_safetensors_are_refused(tiny_models, tmp_path):
    source = tiny_models["qwen3"]
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        TransformersSampler(replace(DEFAULTS, model=str(tmp_path)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(UsageError, match="--device cuda is not available"):
        choose_device("cuda")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", "bf16"), ("cpu", "fp32"), pytest.param("cuda", "fp32", marks=ON_CUDA)],
)
def test_invariant_kernels_give_the_same_bits_under_every_load(tiny_models, device, family, dtype):
    """The fix, with its control: stock kernels change bits under these same loads.

    In bf16 such narrow products do not on CUDA, so there `test_captured_steps` has wide ones.
    """
    spec = replace(DEFAULTS, model=str(tiny_models[family]), device=device, dtype=dtype)
    sampler = TransformersSampler(replace(spec, arms=("stock", "invariant")))
    lengths = {PROBE.probe_id: sampler.count_tokens(PROBE.prompt)}
    spec = replace(
        DEFAULTS,
        probes=(PROBE,),
        decoding=Decoding(4),
        batch_sizes=(1, 3),
        # In bf16 on AVX-512 stock parts only beside the long neighbours of later rounds.
        n_samples=44,
        arms=("stock", "invariant"),
    )
    digests = {"stock": set(), "invariant": set()}
    for trial in plan_trials(spec, lengths, sampler.context):
        if trial.role == "control":
            continue
        for result in sampler.sample(trial, PROBE, spec.decoding):
            digests[trial.arm].add(result.row_digests)
            assert bool(result.witness.override_fires) == (trial.arm == "invariant")
    assert len(digests["invariant"]) == 1
    assert len(digests["stock"]) > 1


def test_an_override_that_does_not_fire_is_an_error(samplers, monkeypatch):
    import ndcheck_kernels

    monkeypatch.setattr(ndcheck_kernels.Scope, "missing", lambda self: ("attention",))
    trial = Trial(0, "invariant", "p1", "slot", Load(1), 0)
    with pytest.raises(UsageError, match="no attention ran in a batch-invariant kernel"):
        samplers["qwen3"].sample(trial, PROBE, GREEDY)
    assert samplers["qwen3"]._model.config._attn_implementation == "sdpa"


def test_random_weights_follow_their_seed_and_need_a_config_only(tmp_path):
    config = transformers.Qwen3Config(
        vocab_size=5000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    spec = replace(DEFAULTS, model=str(tmp_path), device="cpu")
    with pytest.raises(UsageError, match="tokenizer"):
        TransformersSampler(spec)
    one, same, other = (TransformersSampler(replace(spec, random_weights=n)) for n in (1, 1, 2))
    assert one.describe() == same.describe()
    assert one.describe()["digest"] != other.describe()["digest"]
    assert sample(one, Load(1))[0].token_ids == sample(same, Load(1))[0].token_ids
    in_bf16 = TransformersSampler(replace(spec, random_weights=1, dtype="bf16"))._model
    for weight, rounded in zip(one._model.parameters(), in_bf16.parameters(), strict=True):
        assert torch.equal(weight.bfloat16(), rounded)  # One model, whatever it computes in.
    transformers.AutoConfig.from_pretrained(tmp_path, vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="vocab_size is 300"):
        TransformersSampler(replace(spec, random_weights=1))


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "fp32"), ("float32", "bf16")])
def test_buffers_of_random_weights_have_the_dtypes_that_transformers_gives_them(
    tmp_path, stored, dtype
):
    """Those made in the model's dtype follow it; angles are fp32 in every one."""
    config = transformers.Gemma3TextConfig(
        vocab_size=5000, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, dtype=stored,
        architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    spec = replace(DEFAULTS, model=str(tmp_path), device="cpu", random_weights=1, dtype=dtype)
    found = dict(TransformersSampler(spec)._model.named_buffers())
    like = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    expected = {name: buffer.dtype for name, buffer in like.named_buffers()}
    assert {name: buffer.dtype for name, buffer in found.items()} == expected
    assert {torch.float32, DTYPES[dtype]} == set(expected.values())
