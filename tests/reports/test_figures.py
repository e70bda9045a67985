from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from ndcheck.findings import find
from ndcheck.records import Load
from ndcheck.reports import figures
from ndcheck.reports.figures import bins, gather, histogram


def test_counts_are_those_of_the_samples(two_arms) -> None:
    found = gather(two_arms)
    stock = found["stock", "p1"]
    assert stock.divergences == {102: 8, 110: 2}
    assert stock.unique_by_load == {("neighbours", False, 3): {1, 2, 3}}
    assert stock.unique_by_batch_size(copies=False) == {3: 3}
    assert stock.unique_by_batch_size(copies=True) == {}
    assert len(stock.rows) == 200
    assert {row.completion_id for row in stock.rows} == {1, 2, 3}
    assert [position for position, _ in stock.forks] == [102, 110]
    invariant = found["invariant", "p1"]
    assert not invariant.divergences
    assert invariant.forks == []


def test_the_histogram_holds_every_diverged_sample(two_arms) -> None:
    arms = list(gather(two_arms).values())
    edges = bins(arms)
    assert len({b - a for a, b in pairwise(edges)}) == 1
    assert len(edges) <= figures.MAX_BINS + 2
    counts = histogram(arms[0], edges)
    assert sum(counts) == 10
    assert counts[102 // edges[1]] == 8
    assert sum(histogram(arms[1], edges)) == 0


def test_speed_is_tokens_over_time(failing) -> None:
    speeds = gather(failing)["stock", "p1"].tokens_per_s(copies=False)
    assert speeds[4] == pytest.approx(413.2 * 4)
    assert list(speeds) == [1, 2, 4, 8, 16]


def test_copies_are_not_pooled_with_one_probe_row_among_fillers(failing) -> None:
    """Four copies give four completions in the time in which one row gives one."""
    copies = Load(4, (0, 1, 2, 3))
    samples = [
        replace(sample, purpose="batch-size", load=copies, slot=slot, trial_id=0)
        for slot, sample in enumerate(failing.samples[:4])
    ]
    one_row = replace(failing.samples[-1], purpose="batch-size", load=Load(4), trial_id=1)
    alone = replace(failing.samples[4], purpose="reference", baseline=None, load=Load(1))
    run = replace(failing.run, spec=replace(failing.run.spec, arms=("stock",)))
    arm = gather(find(run, [alone, *samples, one_row]))["stock", "p1"]
    assert arm.fillings == (False, True)
    assert arm.unique_by_batch_size(copies=True) == {1: 1, 4: 1}
    assert arm.unique_by_batch_size(copies=False) == {1: 1, 4: 1}
    n_tokens = len(failing.samples[0].token_ids)
    assert arm.tokens_per_s(copies=True)[4] == pytest.approx(4 * n_tokens / 0.25)
    n_tokens = len(one_row.token_ids)
    assert arm.tokens_per_s(copies=False)[4] == pytest.approx(n_tokens / 0.25)
    assert figures.series_name(arm, copies=True) == "stock, all rows"


def test_the_strip_knows_where_bits_differ_and_tokens_do_not(failing) -> None:
    columns = failing.summary.samples
    latent = columns.latent_divergence.copy()
    latent[[3, 995]] = 7, 40
    summary = replace(failing.summary, samples=replace(columns, latent_divergence=latent))
    rows = gather(replace(failing, summary=summary))["stock", "p1"].rows
    n_tokens = len(failing.samples[3].token_ids)
    assert {row.sample_id: row.latent for row in rows if row.latent} == {
        3: (7, n_tokens),
        995: (40, 102),  # where its tokens part
    }


def test_many_samples_are_thinned_evenly(failing, monkeypatch) -> None:
    monkeypatch.setattr(figures, "MAX_ROWS", 100)
    rows = gather(failing)["stock", "p1"].rows
    assert [row.sample_id for row in rows] == list(range(0, 1000, 10))


def test_reference_margins_are_the_probes_alone(failing) -> None:
    first = replace(
        failing.samples[0],
        purpose="reference",
        baseline=None,
        load=Load(1),
        margins=(1.5, float("inf"), 0.25),
    )
    samples = [first, *failing.samples[1:]]
    margins = gather(replace(failing, samples=samples))["stock", "p1"].reference_margins
    assert margins[0] == 1.5
    assert margins[1] != margins[1]  # no runner-up: unknown


def test_samples_that_do_not_fit_the_summary_are_refused(failing) -> None:
    with pytest.raises(ValueError, match="zip"):
        gather(replace(failing, samples=failing.samples[1:]))
