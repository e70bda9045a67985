"""The engine's sampler against a stand-in with planted faults, through real processes."""

from __future__ import annotations

import ast
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ndcheck.analysis.summarising import summarise
from ndcheck.environment import MUST_MATCH
from ndcheck.errors import BackendError, TrialError, UsageError
from ndcheck.judging.verdict import judge
from ndcheck.records import Decoding, Engine, Fault, Load, Probe, Run, Trial
from ndcheck.runner import begin, new_directory, plan, run_trials
from ndcheck.samplers.vllm.process import Worker
from ndcheck.samplers.vllm.sampler import parse_arguments
from ndcheck.storage.run_directory import SampleReader, read_run
from ndcheck_kernels.engines.seams import RELEASES

ALONE = Load(1)


def trial(load=ALONE, arm="stock", fault=None):
    return Trial(0, arm, "p1", "reference", load, 0, fault=fault)


def sample(sampler, spec, *arguments, **keywords):
    return sampler.sample(trial(*arguments, **keywords), spec.probes[0], spec.decoding)


def measure(sampler, spec, out: Path) -> Run:
    trials = plan(spec, sampler)
    directory = begin(new_directory("run", out), spec, sampler, trials)
    try:
        return run_trials(trials, sampler, directory)
    finally:
        directory.close()


def judgement(run, out):
    summary = summarise(SampleReader(out), run.spec)
    return judge(run, summary), {(p.arm): p for p in summary.probes}


def test_a_batch_is_one_pass_after_the_other_and_witnessed(open_fake, spec):
    sampler = open_fake(spec)
    n_prompt = sampler.count_tokens(spec.probes[0].prompt)
    copies = sample(sampler, spec, Load(4, (0, 1, 2, 3)))
    assert [s.slot for s in copies] == [0, 1, 2, 3]
    assert len({s.token_ids for s in copies}) == 1
    assert all(len(s.token_ids) == len(s.logprobs) == len(s.margins) == 8 for s in copies)
    assert copies[0].text == "".join(copies[0].token_texts) != ""
    witness = copies[0].witness
    assert witness.achieved_batch_size == 4
    assert witness.passes == ((1, 4, 4 * n_prompt, 4, 0, 0), (7, 4, 4, 4, 0, 0))
    assert (witness.prefill_calls, witness.decode_calls) == (1, 7)


def test_slots_and_fillers_are_where_the_load_says(open_fake, spec):
    sampler = open_fake(spec)
    alone = sample(sampler, spec)[0]
    mixed = sample(sampler, spec, Load(4, (2,), (3, 20, 1), filler_seed=1))
    assert [s.slot for s in mixed] == [2]
    assert mixed[0].token_ids == alone.token_ids
    n_prompt = sampler.count_tokens(spec.probes[0].prompt)
    assert mixed[0].witness.passes[0][:3] == (1, 4, n_prompt + 24)


@pytest.mark.parametrize("load", [Load(1), Load(4, (0, 1, 2, 3)), Load(4, (1,), (2, 40, 5))])
def test_chunks_and_prefixes_happen(open_fake, spec, load):
    sampler = open_fake(spec)
    n_prompt = sampler.count_tokens(spec.probes[0].prompt)
    chunked = sample(sampler, spec, replace(load, cache_state="chunked"))[0].witness
    assert chunked.prefill_calls == 3
    assert chunked.achieved_batch_size == load.batch_size
    assert sum(n * tokens for n, _, tokens, *_ in chunked.passes) > n_prompt
    prefix = sample(sampler, spec, replace(load, cache_state="prefix"))[0].witness
    whole = sample(sampler, spec, load)[0].witness
    assert prefix.prefill_calls == whole.prefill_calls == 1
    assert prefix.passes[0][2] < whole.passes[0][2]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong-ids", "holds no logprob of"),
        ("wrong-prompt", "another prompt"),
        ("ends-early", "7 tokens instead of 8"),
    ],
)
def test_a_wrong_answer_is_no_sample(open_fake, spec, fault, reason):
    sampler = open_fake(replace(spec, arms=("stock",)), fault)
    with pytest.raises(TrialError, match=reason):
        sample(sampler, spec, Load(4, (0, 1, 2, 3)))


def test_a_cache_state_that_did_not_happen_is_said(open_fake, spec):
    one_arm = replace(spec, arms=("stock",))
    with pytest.raises(TrialError, match="told to cut it in chunks"):
        sample(open_fake(one_arm, "ignores-chunks"), spec, Load(1, cache_state="chunked"))
    uncached = replace(one_arm, engine=Engine(arguments=("enable_prefix_caching=false",)))
    with pytest.raises(TrialError, match=r"0 tokens .* which was warmed"):
        sample(open_fake(uncached), spec, Load(1, cache_state="prefix"))
    warm = open_fake(one_arm, "stays-warm")
    sample(warm, spec)
    with pytest.raises(TrialError, match="which was cold"):
        sample(warm, spec)
    small = replace(one_arm, engine=Engine(arguments=("max_num_batched_tokens=20",)))
    with pytest.raises(TrialError, match="passes instead of one: raise max_num_batched_tokens"):
        sample(open_fake(small), spec, Load(4, (0, 1, 2, 3)))


@pytest.mark.parametrize("fault", ["splits", "queues", "preempts"])
def test_a_batch_that_did_not_form_is_inconclusive(open_fake, spec, fault, tmp_path):
    spec = replace(spec, arms=("stock",), axes=("batch-size", "slot"))
    run = measure(open_fake(spec, fault), spec, tmp_path / "run")
    verdict, probes = judgement(run, tmp_path / "run")
    assert verdict.verdict.outcome == "INCONCLUSIVE"
    assert probes["stock"].unwitnessed_trials > 0
    passes = [p for s in SampleReader(tmp_path / "run") for p in s.witness.passes]
    if fault == "queues":
        assert any(waiting for *_, waiting, _ in passes)
    if fault == "preempts":
        assert any(preempted for *_, preempted in passes)


def test_stock_fails_and_invariant_passes(open_fake, spec, tmp_path):
    run = measure(open_fake(spec, "batch-dependent"), spec, tmp_path / "run")
    verdict, probes = judgement(run, tmp_path / "run")
    assert {p.arm: p.verdict.outcome for p in verdict.probes} == {
        "stock": "FAIL",
        "invariant": "PASS",
    }
    assert probes["invariant"].control.n_caught == probes["invariant"].control.n_trials == 1
    assert run.environment.model["arms"] == "interleaved, each in an engine of its own"
    assert run.environment.model["engine"] == "vllm 0.26.0+fake"
    assert read_run(tmp_path / "run").spec == spec


def test_prompts_are_computed_beside_the_probes_tokens(open_fake, spec, tmp_path):
    """A fault of those passes alone, as FlashAttention 3 has it."""
    spec = replace(spec, decoding=Decoding(24), n_samples=100)
    run = measure(open_fake(spec, "mixed-dependent"), spec, tmp_path / "run")
    verdict, probes = judgement(run, tmp_path / "run")
    outcomes = {p.arm: p.verdict.outcome for p in verdict.probes}
    assert outcomes == {"stock": "FAIL", "invariant": "PASS"}
    failing = [a.axis for a in probes["stock"].axes if a.diverged_trials or a.latent_trials]
    assert failing == ["neighbours"]
    assert probes["stock"].unwitnessed_trials == 0


def test_who_comes_and_goes_is_beside_the_batch_asked_for(open_fake, spec):
    spec = replace(spec, decoding=Decoding(24), arms=("stock",))
    sampler = open_fake(spec)
    (alike,) = sample(
        sampler, spec, Load(4, (0,), (sampler.count_tokens(spec.probes[0].prompt),) * 3)
    )
    assert {rows for _, rows, *_ in alike.witness.passes} == {4}
    (others,) = sample(sampler, spec, Load(4, (0,), (3, 20, 1)))
    assert {rows for _, rows, *_ in others.witness.passes} == {4, 5}
    assert others.witness.achieved_batch_size == 4
    assert others.witness.prefill_calls == 1
    assert others.token_ids == alike.token_ids
    mixed = [tokens for _, rows, tokens, *_ in others.witness.passes[1:] if tokens > rows]
    assert 4 <= len(mixed) <= 8
    assert len(set(mixed)) > 1


def test_a_full_engine_takes_nobody_beside(open_fake, spec):
    full = replace(spec, arms=("stock",), engine=Engine(arguments=("max_num_seqs=4",)))
    sampler = open_fake(full)
    assert sampler.notes[-1] == "no request comes and goes beside a batch of 4: max_num_seqs"
    (taken,) = sample(sampler, full, Load(4, (0,), (3, 20, 1)))
    assert {rows for _, rows, *_ in taken.witness.passes} == {4}


def test_it_says_of_itself_what_runs_are_compared_by(open_fake, spec):
    described = open_fake(replace(spec, arms=("stock",))).describe()
    fields = {path.removeprefix("model.") for path in MUST_MATCH if path.startswith("model.")}
    assert fields <= described.keys()
    assert described["digest"] is not None


def test_a_clean_stock_arm_shows_nothing(open_fake, spec, tmp_path):
    run = measure(open_fake(spec), spec, tmp_path / "run")
    assert judgement(run, tmp_path / "run")[0].verdict.outcome == "INCONCLUSIVE"


@pytest.mark.parametrize("fault", ["no-memory", "small-cache"])
def test_arms_that_do_not_fit_together_run_one_after_the_other(open_fake, spec, fault, tmp_path):
    spec = replace(spec, batch_sizes=(1, 24)) if fault == "small-cache" else spec
    sampler = open_fake(spec, fault)
    assert sampler.notes[0] == "the arms run one after the other: memory does not hold two engines"
    arms = [each.arm for each in plan(spec, sampler)]
    assert arms == sorted(arms, key=spec.arms.index)
    assert {*arms} == {"stock", "invariant"}
    run = measure(sampler, spec, tmp_path / "run")
    assert run.status == "finished"
    assert run.environment.model["arms"].startswith("one after the other")


def test_the_control_moves_one_bit_and_one_token(open_fake, spec):
    sampler = open_fake(replace(spec, arms=("stock",)))
    clean = sample(sampler, spec)[0]
    planted = sample(sampler, spec, fault=Fault(latent_at=2, fork_at=4))[0]
    differ = [a != b for a, b in zip(clean.token_ids, planted.token_ids, strict=True)]
    assert differ == [t == 4 for t in range(8)]
    differ = [a != b for a, b in zip(clean.logprobs, planted.logprobs, strict=True)]
    assert differ == [t == 2 for t in range(8)]


def test_the_switch_must_take_effect(open_fake, spec):
    with pytest.raises(BackendError, match="does not follow VLLM_BATCH_INVARIANT"):
        open_fake(replace(spec, arms=("invariant",)), "ignores-the-switch")
    assert sample(open_fake(replace(spec, arms=("stock",)), "ignores-the-switch"), spec)


def test_an_engine_that_cannot_be_watched_is_told_what_can(open_fake, spec):
    known = f"ndcheck knows vLLM {RELEASES[0]} to {RELEASES[-1]}"
    with pytest.raises(BackendError, match=rf"vLLM 0.26.0\+fake cannot be watched; {known}"):
        open_fake(replace(spec, arms=("stock",)), "hides-its-scheduler")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("enforce_eagr=true", "enforce_eagr: vLLM has no such argument, did you mean enforce_eag"),
        ("max_model_len=-1", "refuses these arguments: 1 validation error .* negative"),
        ("gpu_memory_utilization=most", "1 validation error for CacheConfig gpu_memory_util"),
    ],
)
def test_engine_arguments_are_the_engines_own(open_fake, spec, argument, message):
    with pytest.raises(UsageError, match=message):
        open_fake(replace(spec, engine=Engine(arguments=(argument,))))


@pytest.mark.parametrize("value", ["True", "False", "None", "true", "false", "null", "fp8", "0.5"])
def test_a_value_may_be_a_word_of_python(value):
    """vLLM takes `enable_lora="False"` for true."""
    try:
        expected = ast.literal_eval(value)
    except ValueError:
        expected = {"true": True, "false": False, "null": None}.get(value, value)
    (found,) = parse_arguments([f"key={value}"]).values()
    assert found == expected
    assert type(found) is type(expected)


def test_a_prompt_shorter_than_a_cache_block_is_chunked_and_never_a_prefix(open_fake, spec):
    short = replace(spec, arms=("stock",), probes=(*spec.probes, Probe("p2", "a b")))
    sampler = open_fake(short)
    assert sampler.count_tokens("a b") <= 4 < sampler.count_tokens(spec.probes[0].prompt)
    (note,) = sampler.notes
    assert "blocks of 4 tokens: give longer prompts" in note
    assert {each.load.cache_state for each in plan(short, sampler)} == {"whole", "chunked"}
    chunked = trial(Load(2, (0, 1), cache_state="chunked"))
    assert sampler.sample(chunked, short.probes[1], short.decoding)
    assert open_fake(replace(short, axes=("slot",))).notes == ()


def test_a_prompt_longer_than_a_cache_block_is_both(open_fake, spec):
    sampler = open_fake(replace(spec, arms=("stock",)))
    assert sampler.notes == ()
    states = {each.load.cache_state for each in plan(spec, sampler)}
    assert states == {"whole", "chunked", "prefix"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dies", "stock arm ended with 7; last log lines: .*says why it dies"),
        ("raises", "stock arm failed: RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_an_engine_that_fails_is_a_backend_failure(open_fake, spec, fault, message):
    sampler = open_fake(replace(spec, arms=("stock",)), fault)
    for _ in range(8):
        sample(sampler, spec)
    with pytest.raises(BackendError, match=message) as caught:
        sample(sampler, spec)
    sampler.close()
    log = Path(str(caught.value).rpartition("whole log: ")[2])
    assert "a line that the engine prints" in log.read_text()


def test_closing_ends_the_processes_and_their_logs(open_fake, spec):
    sampler = open_fake(spec)
    workers = list(sampler._workers.values())
    assert len(workers) == 2
    sampler.close()
    for worker in workers:
        assert worker._process.returncode is not None
        assert not worker.log.exists()


def test_a_worker_ends_with_its_parent(open_fake, spec):
    worker = Worker("stock", {"model": "m"})
    worker._process.stdin.close()
    assert worker._process.wait(10) == 0
    worker.close()


def test_a_killed_worker_is_told_at_once(open_fake, spec):
    sampler = open_fake(replace(spec, arms=("stock",), decoding=Decoding(300)), "slow")
    worker = sampler._workers["stock"]
    os.kill(worker._process.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(BackendError, match="was killed by SIGKILL"):
        sample(sampler, spec)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("fault", "asked", "by"),
    [
        ("covered", "auto", "ndcheck 1.2"),
        ("covered", "ndcheck", "ndcheck 1.2"),
        ("covered", "vllm", "vllm 0.26.0+fake"),
        ("uncovered", "auto", "vllm 0.26.0+fake"),
        ("uncovered", "vllm", "vllm 0.26.0+fake"),
        ("clean", "auto", "vllm 0.26.0+fake"),
    ],
)
def test_a_run_says_whose_kernels_compute_its_invariant_arm(open_fake, spec, fault, asked, by):
    sampler = open_fake(replace(spec, engine=Engine(invariant_by=asked)), fault)
    assert sampler.describe()["invariant_by"] == by
    assert f"the invariant arm is computed by {by}" in sampler.notes


@pytest.mark.parametrize("fault", ["uncovered", "clean"])
def test_what_ndcheck_does_not_cover_is_refused_where_it_was_asked_for(open_fake, spec, fault):
    said = {"uncovered": "layers.0.mixer", "clean": "vLLM has not loaded its plug-in"}[fault]
    with pytest.raises(UsageError, match=f"--invariant-by ndcheck: .*{said}"):
        open_fake(replace(spec, engine=Engine(invariant_by="ndcheck")), fault)


def test_stock_alone_is_computed_by_vllm_and_nothing_is_said_of_an_invariant_arm(open_fake, spec):
    sampler = open_fake(replace(spec, arms=("stock",)), "covered")
    assert sampler.describe()["invariant_by"] is None
    assert not any("invariant" in note for note in sampler.notes)


def test_one_arm_after_the_other_it_is_still_known(open_fake, spec):
    sampler = open_fake(
        replace(spec, engine=Engine(arguments=("gpu_memory_utilization=0.9",))), "covered"
    )
    assert not sampler.interleaves_arms
    assert sampler.describe()["invariant_by"] == "ndcheck 1.2"
