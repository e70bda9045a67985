"""Recorded against scored: figures by exact sums, and a planted unit in the last place is found."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.errors import UsageError
from ndcheck.judging.scores import Limits, judge_arm
from ndcheck.scoring.comparing import CLIP, PERCENTILES, compare, summarise
from ndcheck.scoring.completions import Completion, Recording, rounded
from ndcheck.scoring.scorers import Score, Scored

logprobs = st.floats(-30, 0, width=32)
pairs = st.lists(st.tuples(logprobs, logprobs), min_size=1, max_size=40)


def completion(values, name="c", ids=None, ranks=None, arm=None):
    ids = tuple(range(len(values))) if ids is None else ids
    values = np.array(values, dtype=np.float64)
    return Completion(name, arm, (1, 2), ids, values, ranks)


def scored(of, control="caught"):
    """``of`` are completions and the log-probabilities, and ranks, that they are scored with."""
    scores = {}
    for each, values, *ranks in of:
        values = np.array(values, dtype=np.float64)
        scores[each.prompt_ids, each.token_ids] = Score(values, *map(np.array, ranks))
    return Scored("test", scores, control)


@given(st.lists(pairs, min_size=1, max_size=5))
def test_figures_are_those_of_exact_sums(parts):
    found = [
        completion([a for a, _ in part], ids=(i, *range(len(part) - 1)))
        for i, part in enumerate(parts)
    ]
    scores = [[b for _, b in part] for part in parts]
    (comparison,) = compare(found, scored(zip(found, scores, strict=True)))

    flat = [pair for part in parts for pair in part]
    differences = [b - a for a, b in flat]
    ratios = [math.exp(difference) for difference in differences]
    n = len(flat)
    assert comparison.n_tokens == n
    assert comparison.n_differ == sum(a != b for a, b in flat)
    assert comparison.max_difference == max(map(abs, differences))
    assert comparison.mean_difference == pytest.approx(math.fsum(map(abs, differences)) / n)
    assert comparison.k1_kl == pytest.approx(-math.fsum(differences) / n, abs=1e-12)
    k3 = math.fsum(ratio - 1 - math.log(ratio) for ratio in ratios) / n
    assert comparison.k3_kl == pytest.approx(k3, rel=1e-9, abs=1e-9)
    for percentile, ratio in zip(PERCENTILES, comparison.ratio_percentiles, strict=True):
        nearest = sorted(ratios)[math.ceil(Fraction(percentile, 100) * n) - 1]
        assert ratio == pytest.approx(nearest)
    outside = [not CLIP[0] <= ratio <= CLIP[1] for ratio in ratios]
    assert comparison.n_outside_clip == sum(outside)
    at = comparison.by_position
    assert at.n.sum() == n
    assert (at.mean_difference * at.n).sum() == pytest.approx(math.fsum(map(abs, differences)))
    assert at.max_difference.max() == comparison.max_difference


def test_both_estimators_give_the_divergence_of_tokens_as_frequent_as_their_probabilities():
    p, q = np.array([0.5, 0.25, 0.125, 0.125]), np.array([0.25, 0.25, 0.25, 0.25])
    tokens = np.repeat(np.arange(4), (p * 8).astype(int))
    one = completion(np.log(p)[tokens])
    (found,) = compare([one], scored([(one, np.log(q)[tokens])]))
    assert found.k1_kl == pytest.approx(scipy.stats.entropy(p, q))
    assert found.k3_kl == pytest.approx(scipy.stats.entropy(p, q))


def judge(comparison, recording, given, limits):
    summary = summarise(recording, given, [comparison])
    return judge_arm(summary.arms[0], summary, limits)


@pytest.mark.parametrize("at", [0, 97, 199])
def test_one_unit_in_the_last_place_is_found_where_it_was_planted(at):
    rng = np.random.default_rng(0)
    found, scores = [], []
    for i in range(6):
        values = rng.uniform(-9, 0, 200).astype(np.float32)
        planted = values.copy()
        planted[at] = np.nextafter(values[at], np.float32(-np.inf))
        found.append(completion(values, f"c{i}", ids=(i, *range(199))))
        scores.append(planted)
    given = scored(zip(found, scores, strict=True))
    (comparison,) = compare(found, given)
    assert comparison.n_differ == 6
    assert [x.first_difference for x in comparison.completions] == [at] * 6
    assert np.flatnonzero(comparison.by_position.n_differ).tolist() == [at]
    verdict = judge(comparison, Recording("r", tuple(found)), given, Limits())
    assert verdict.outcome == "FAIL"
    assert (
        f"6 of 1200 tokens differ, in 6 of 6 completions, first at token {at + 1}"
        in (verdict.reasons[0])
    )


def test_ranks_say_where_greedy_texts_part_and_of_drawn_ones_nothing():
    greedy = completion([-1, -1, -1], ranks=np.array([1, 1, 1]))
    drawn = completion([-1, -1, -1], ids=(7, 8, 9), ranks=np.array([1, 5, 2]))
    unknown = completion([-1, -1, -1], ids=(4, 5, 6))
    scores = scored([(x, [-1, -1, -1], [1, 1, 2]) for x in (greedy, drawn, unknown)])
    (found,) = compare([greedy, drawn, unknown], scores)
    assert [x.parts_at for x in found.completions] == [2, None, None]
    assert (found.n_ranked, found.n_rank_changes) == (6, 2)
    assert (found.n_parted, found.first_parting) == (1, 2)


def test_arms_are_compared_apart_and_every_sample_counts():
    one, same = (completion([-1], name, arm="stock") for name in "ab")
    other = completion([-2], arm="invariant")
    stock, invariant = compare([one, same, other], scored([(one, [-2])]))
    assert (stock.arm, stock.n_tokens, stock.n_differ, stock.n_distinct) == ("stock", 2, 2, 1)
    assert (invariant.arm, invariant.n_tokens, invariant.n_differ) == ("invariant", 1, 0)


def test_an_infinite_ratio_is_one():
    one = completion([-1e9])
    given = scored([(one, [0])])
    (found,) = compare([one], given)
    assert found.ratio_percentiles[-1] == found.k3_kl == math.inf
    verdict = judge(found, Recording("r", (one,)), given, Limits(max_kl=1e30))
    assert verdict.outcome == "FAIL"


NO_LIMIT = Limits()


def outcome(recorded, scores, control="caught", limits=NO_LIMIT, **recording):
    one = completion(recorded)
    given_scores = scored([(one, scores)] if scores else [], control)
    (found,) = compare([one], given_scores)
    return judge(found, Recording("r", (one,), **recording), given_scores, limits)


@pytest.mark.parametrize(
    ("control", "scores", "limits", "expected"),
    [
        ("caught", [-1, -2], Limits(), "PASS"),
        ("absent", [-1, -2], Limits(), "INCONCLUSIVE"),
        ("missed", [-1, -2], Limits(), "INCONCLUSIVE"),
        ("caught", [], Limits(), "INCONCLUSIVE"),
        ("caught", [], Limits(max_kl=1), "INCONCLUSIVE"),
        ("caught", [-1, -2.5], Limits(), "FAIL"),
        ("missed", [-1, -2.5], Limits(), "FAIL"),
        ("absent", [-1, -2.5], Limits(max_logprob_difference=0.5), "ACCEPTED"),
        ("missed", [-1, -2.5], Limits(max_logprob_difference=0.5), "INCONCLUSIVE"),
        ("caught", [-1, -2.5], Limits(max_logprob_difference=0.4), "FAIL"),
        ("caught", [-1, -2.5], Limits(max_kl=0.1), "ACCEPTED"),
        ("caught", [-1, -2.5], Limits(max_kl=0.01), "FAIL"),
        ("caught", [-1, -2.5], Limits(bitwise=True, max_kl=0.1), "FAIL"),
        ("caught", [-1, -2], Limits(max_kl=0), "PASS"),
    ],
)
def test_verdicts(control, scores, limits, expected):
    assert outcome([-1, -2], scores, control, limits).label == expected


def test_a_doubtful_run_passes_nothing_and_can_fail():
    doubts = ("the run was interrupted",)
    assert outcome([-1], [-1], doubts=doubts).reasons == doubts
    assert outcome([-1], [-2], doubts=doubts).outcome == "FAIL"


def test_bits_of_rounded_numbers_are_not_compared():
    exact = [float(np.float32(x)) for x in (-1.2345678, -0.1)]
    assert outcome([round(x, 4) for x in exact], exact, is_rounded=True).outcome == "INCONCLUSIVE"
    verdict = outcome(exact, [round(x, 4) for x in exact])
    assert verdict.outcome == "INCONCLUSIVE"
    assert "the scored log-probabilities are rounded" in verdict.reasons[0]
    # Rounded alike, numbers of other bits become one.
    few = [round(x, 4) for x in exact]
    assert outcome(few, few, is_rounded=True).outcome == "INCONCLUSIVE"


@given(st.lists(logprobs, min_size=1, max_size=20))
def test_what_gives_fp32_back_is_not_rounded(values):
    exact = np.array(values, dtype=np.float32)
    assert not rounded([exact.astype(np.float64)])
    # Nine significant digits are enough for every fp32 number (IEEE 754).
    written = np.array([float(f"{value:.9g}") for value in exact])
    assert (written.astype(np.float32) == exact).all()


@pytest.mark.parametrize("limit", [-1, math.nan, math.inf])
def test_a_limit_is_a_number_of_nats(limit):
    with pytest.raises(UsageError, match="--max-kl"):
        Limits(max_kl=limit)
