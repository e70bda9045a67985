"""Each planted fault of the mock server gets the verdict that it deserves, for its own reason."""

from __future__ import annotations

import pytest

from ndcheck.errors import BackendError, UsageError
from ndcheck.mock_server.faults import FAULTS, FLAVOURS
from ndcheck.records import Decoding
from ndcheck.samplers.scripted.sampler import FORK_AT, LATENT_AT

STRIKES_LATER = {"after": 27, "every": 3}
"""The probing and the trials alone are spared, the first batch is not."""
SHORT = {"axes": ("run-to-run", "batch-size"), "n_samples": 11}
ERRORS = {
    "rate-limit": "outside the batch asked for: HTTP 429: too many",
    "error": "outside the batch asked for: HTTP 500: engine is dead",
    "html": "HTTP 502: <html><body><h1>Bad Gateway</h1></body></html>",
    "redirect": "HTTP 307: redirects to 'http://other.example/v1/completions', which is not",
    "stall": "no whole answer within 0.5 s (--timeout)",
    "slow-loris": "no whole answer within 0.5 s (--timeout)",
    "truncate": "the stream ended before the completion did",
    "token-count": "wrong token count: usage says 13, ",
    "short": "wrong token count: 11 of 12 tokens, finish_reason 'length'",
    "huge": "the answer is larger than 1.0 MiB",
    "utf8": "the answer is not valid UTF-8",
    "repeat-key": "HTTP 400: bad key: ",
    "reset": "outside the batch asked for: the connection broke",
}


def failing_axes(judgement):
    (probe,) = judgement.probes
    return {axis for axis, verdict in probe.axes.items() if verdict.outcome == "FAIL"}


def test_every_fault_is_tested():
    tested = {*ERRORS, "fingerprint", "concurrency", "latent", "cache", "replica"}
    assert {*tested, "never-batches", "none"} == set(FAULTS)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_clean_server_passes(mock, measure, flavour):
    judgement, summary, samples = measure(mock(flavour=flavour), chat=flavour == "hosted")
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons
    (probe,) = summary.probes
    assert probe.control.n_caught == probe.control.n_trials == 1
    assert {s.witness.achieved_batch_size for s in samples} == {1, 3}
    has_logprobs = flavour != "text"
    assert all(bool(s.logprobs) == has_logprobs for s in samples)
    assert samples[0].role == "reference"
    assert (samples[-1].purpose, samples[-1].load.batch_size) == ("run-to-run", 1)


@pytest.mark.parametrize("flavour", ["vllm", "text"])
def test_a_fork_under_concurrency_is_laid_to_the_batch(mock, measure, flavour):
    judgement, summary, _ = measure(mock(fault="concurrency", flavour=flavour), **SHORT)
    assert judgement.verdict.outcome == "FAIL"
    assert "batch-size" in failing_axes(judgement)
    (probe,) = summary.probes
    if flavour == "vllm":
        assert {c.first_divergence for c in probe.completions} == {None, FORK_AT}
    alone = [load for load in probe.loads if load.batch_size == 1]
    assert all(load.n_diverged_trials == 0 for load in alone)


def test_a_change_in_the_bits_alone_is_latent(mock, measure):
    judgement, summary, _ = measure(mock(fault="latent"), **SHORT)
    assert judgement.verdict.outcome == "FAIL"
    (probe,) = summary.probes
    assert (probe.n_unique, probe.diverged_trials) == (1, 0)
    latent = summary.samples.latent_divergence
    assert set(latent[latent >= 0].tolist()) == {LATENT_AT}


@pytest.mark.parametrize("flavour", ["vllm", "llama.cpp"])
def test_a_fork_on_a_warm_prefix_is_laid_to_the_cache(mock, measure, flavour):
    judgement, _, _ = measure(mock(fault="cache", flavour=flavour))
    assert judgement.verdict.outcome == "FAIL"
    assert failing_axes(judgement) == {"cache"}


def test_a_replica_that_differs_fails_run_to_run(mock, measure):
    alone = {"axes": ("run-to-run",), "batch_sizes": (1,), "n_samples": 8}
    judgement, _, _ = measure(mock(fault="replica"), **alone)
    assert judgement.verdict.outcome == "FAIL"
    assert "run-to-run" in failing_axes(judgement)


@pytest.mark.parametrize("flavour", ["vllm", "text"])
def test_requests_that_never_batch_do_not_pass(mock, measure, flavour):
    judgement, summary, _ = measure(mock(fault="never-batches", flavour=flavour), **SHORT)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("largest batch seen: 1, asked for: 3" in r for r in judgement.verdict.reasons)
    assert summary.probes[0].n_unique == 1


def test_another_fingerprint_is_flagged(mock, measure):
    judgement, _, _ = measure(mock(fault="fingerprint", **STRIKES_LATER), **SHORT)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert judgement.verdict.reasons == (
        "the server's system_fingerprint changed in mid-run: 'fp_mock', then 'fp_other'",
    )


def test_draws_without_a_seed_are_refused(mock, sampler):
    with pytest.raises(UsageError, match=r"--temperature 0\.5: this server takes no seed"):
        sampler(mock(flavour="sglang"), decoding=Decoding(8, temperature=0.5))


def test_another_version_behind_the_address_is_flagged(mock, sampler, monkeypatch):
    opened, _ = sampler(mock())
    assert opened.changes() == ()
    monkeypatch.setattr("ndcheck.mock_server.shapes.VERSION", "2.0-mock")
    assert opened.changes() == (
        "the server changed in mid-run: 'vLLM' '1.0-mock' 'mock', then 'vLLM' '2.0-mock' 'mock'",
    )


def test_what_an_earlier_run_left_in_the_cache_is_not_met(mock, sampler):
    url = mock()
    for _ in range(2):
        opened, _ = sampler(url)
        assert opened.cache_states == ("prefix",)


@pytest.mark.parametrize("fault", ERRORS)
def test_a_failed_request_is_a_sample_with_its_error(mock, measure, fault, monkeypatch):
    monkeypatch.setattr("ndcheck.samplers.endpoint.client.FIRST_PAUSE_S", 0.01)
    # Read from streams: the faults in the middle of one are for that.
    flavour = "text" if fault in ("stall", "slow-loris", "truncate", "utf8") else "vllm"
    timeout_s = 0.5 if fault in ("stall", "slow-loris") else 10.0
    url = mock(fault=fault, flavour=flavour, **STRIKES_LATER)
    judgement, summary, samples = measure(url, timeout_s=timeout_s, **SHORT)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    errors = [s.error for s in samples if s.error is not None]
    assert any(ERRORS[fault] in error for error in errors), errors
    assert len(errors) == summary.probes[0].n_errors > 0
    assert len([s for s in samples if s.role != "control"]) == 11


@pytest.mark.parametrize("fault", ["error", "html", "reset", "truncate"])
def test_a_server_that_fails_from_the_start_is_a_backend_failure(mock, sampler, fault, monkeypatch):
    monkeypatch.setattr("ndcheck.samplers.endpoint.client.FIRST_PAUSE_S", 0.01)
    with pytest.raises(BackendError, match="--endpoint http://127"):
        sampler(mock(fault=fault, flavour="text"))


def test_an_address_that_redirects_is_refused(mock, sampler):
    with pytest.raises(UsageError, match=r"redirects to .http://other\.example/v1/completions"):
        sampler(mock(fault="redirect", flavour="text"))


def test_a_key_is_cut_out_of_what_the_server_repeats(mock, sampler, monkeypatch):
    monkeypatch.setenv("NDCHECK_API_KEY", "sk-do-not-print-me")
    with pytest.raises(UsageError) as refused:
        sampler(mock(fault="repeat-key"))
    assert "bad key: [secret]" in str(refused.value)
    assert "sk-do-not" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "other"}, "no such model (it offers 'mock')"),
        ({"flavour": "hosted"}, "a server with chat alone needs --chat"),
    ],
)
def test_what_the_server_refuses_is_a_usage_error(mock, sampler, changed, message):
    flavour = changed.pop("flavour", "vllm")
    with pytest.raises(UsageError) as refused:
        sampler(mock(flavour=flavour), **changed)
    assert message in str(refused.value)


def test_an_address_without_the_api_is_explained(mock, sampler):
    url = mock()
    with pytest.raises(UsageError, match=f"its API is at {url}"):
        sampler(url.removesuffix("/v1"))
    with pytest.raises(UsageError, match="most servers have their API under /v1"):
        sampler(url.replace("/v1", "/other"))
    with pytest.raises(UsageError, match="leave out /chat/completions: ndcheck adds it"):
        sampler(f"{url}/chat/completions")


@pytest.mark.parametrize(
    ("arrival", "fillers"),
    [("closed", "words"), ("poisson:300", "shared-prefix"), ("bursts:2:0.01", "words")],
)
def test_other_arrivals_form_batches_too(mock, measure, arrival, fillers):
    url = mock(step_s=0.02)
    load = {"mode": "mixed", "axes": ("batch-size", "neighbours"), "n_samples": 9}
    judgement, _, samples = measure(url, arrival=arrival, fillers=fillers, **load)
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons
    achieved = {s.witness.achieved_batch_size for s in samples if s.load.batch_size == 3}
    assert min(achieved) > 1
    assert arrival != "closed" or achieved == {3}
