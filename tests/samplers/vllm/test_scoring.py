"""Scoring by vLLM's engine: the stand-in gives a token one log-probability, sampled or scored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ndcheck.errors import TrialError
from ndcheck.records import Load, Trial
from ndcheck.samplers.vllm.sampler import EngineSampler
from ndcheck.scoring.engine import EngineScorer


@pytest.fixture
def recorded(spec, open_fake):
    """A completion of the probe: its prompt's ids, the sample, and a spec to score it with."""

    def record(fault="clean"):
        sampler = open_fake(replace(spec, arms=("stock",)), fault)
        trial = Trial(0, "stock", "p1", "reference", Load(1), 0)
        (sample,) = sampler.sample(trial, spec.probes[0], spec.decoding)
        return tuple(sampler.encode(spec.probes[0].content)), sample

    return record


@pytest.fixture
def scorer(spec):
    opened = []

    def open_one(arm="stock"):
        opened.append(EngineScorer(EngineSampler(replace(spec, arms=(arm,)), spec.engine), arm))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_what_was_sampled_is_scored_with_the_same_bits(recorded, scorer):
    prompt_ids, sample = recorded()
    opened = scorer()
    score = opened.score(prompt_ids, sample.token_ids)
    assert score.logprobs.tolist() == list(sample.logprobs)
    assert score.ranks.tolist() == [1] * len(sample.token_ids)
    assert "vllm 0.26.0+fake" in opened.title
    assert "stock mode" in opened.title


def test_each_arm_is_the_mode_that_it_names(recorded, scorer):
    prompt_ids, sample = recorded("scores-differ")
    stock, invariant = (
        scorer(arm).score(prompt_ids, sample.token_ids) for arm in ("stock", "invariant")
    )
    assert invariant.logprobs.tolist() == list(sample.logprobs)
    assert (stock.logprobs - invariant.logprobs == -1 / 1024).all()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("scores-nan", "no number"),
        ("scores-none", "no log-probabilities of its prompt"),
        ("wrong-prompt", "another prompt"),
    ],
)
def test_no_score_is_made_up(recorded, scorer, fault, words):
    prompt_ids, sample = recorded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_VLLM", fault)
        with pytest.raises(TrialError, match=words):
            scorer().score(prompt_ids, sample.token_ids)
