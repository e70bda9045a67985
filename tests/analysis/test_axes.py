"""What is laid to an axis, and to a load."""

from ndcheck.analysis.statistics import clopper_pearson
from ndcheck.analysis.summary import Counts
from ndcheck.records import AXES, Load

# Axes


def test_only_the_slot_differs(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab"),
        build.sample(2, "ax", slot=1, purpose="slot", baseline=1),
        build.sample(3, "ab", purpose="neighbours", baseline=1),
    ]
    finding = build.finding(build.probe(samples), "slot")
    # Once alone it may be chance.
    assert (finding.n_trials, finding.diverged_trials, finding.rate) == (1, 1, None)
    samples.append(build.sample(4, "ax", slot=1, purpose="run-to-run", baseline=2))
    probe = build.probe(samples)
    finding = build.finding(probe, "slot")
    assert (finding.n_trials, finding.diverged_trials, finding.rate) == (1, 1, 1.0)
    assert (finding.rate_ci_low, finding.rate_ci_high) == clopper_pearson(1, 1, 0.95)
    assert (finding.first_divergence_min, finding.batch_sizes_diverged) == (1, (2,))
    assert {f.axis for f in probe.axes if f.diverged_trials} == {"slot"}


def test_rows_of_one_batch_are_evidence_on_the_slot(build):
    samples = [
        build.reference("ab"),
        *build.copies(1, ["ab", "ab", "ax"]),
        *build.copies(2, ["ab", "ab", "ab"], purpose="run-to-run", baseline=1),
    ]
    probe = build.probe(samples)
    slot = build.finding(probe, "slot")
    assert (slot.n_trials, slot.diverged_trials, slot.batch_sizes_diverged) == (2, 1, (3,))
    # Row 0 alone has a counterpart in the reference, and it is equal.
    assert build.finding(probe, "batch-size").diverged_trials == 0
    # The same load twice is compared row by row.
    assert build.finding(probe, "run-to-run").diverged_trials == 1


def test_rows_that_all_differ_from_the_reference_alike_are_not_laid_to_the_slot(build):
    samples = [build.reference("ab"), *build.copies(1, ["ax", "ax"])]
    probe = build.probe(samples)
    assert build.finding(probe, "slot").diverged_trials == 0
    assert build.finding(probe, "batch-size").diverged_trials == 1


def test_latent_difference_between_rows(build):
    load = Load(2, (0, 1))
    samples = [
        build.reference("ab"),
        build.sample(1, "ab", load=load),
        build.sample(1, "ab", load=load, slot=1, moved=(1,)),
    ]
    finding = build.finding(build.probe(samples), "slot")
    assert (finding.n_trials, finding.diverged_trials, finding.latent_trials) == (1, 0, 1)


def test_where_bits_first_differ_from_the_baseline_is_told_as_far_as_it_is_known(build):
    # The batch has other bits than the reference too: the earlier position parts the two.
    load = Load(2, (0,), (3,))
    samples = [
        build.reference("abcd"),
        build.sample(1, "abcd", moved=(2,)),
        build.sample(2, "abcd", purpose="neighbours", baseline=1, load=load, moved=(1, 2)),
    ]
    finding = build.finding(build.probe(samples), "neighbours")
    assert (finding.latent_trials, finding.first_latent_min) == (1, 1)
    samples[2] = build.sample(2, "abcd", purpose="neighbours", baseline=1, load=load, moved=(2, 3))
    finding = build.finding(build.probe(samples), "neighbours")
    assert (finding.latent_trials, finding.first_latent_min) == (1, None)


def test_a_load_names_its_trials_and_those_that_failed(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab"),
        build.error(2),
    ]
    load = build.load(build.probe(samples), "batch-size", 2)
    assert (load.trial_ids, load.n_trials, load.n_errors) == ((1, 2), 1, 1)


def test_a_fork_in_one_row_and_moved_bits_in_another_are_one_diverged_trial(build):
    load = Load(3, (0, 1, 2))
    samples = [
        build.reference("ab"),
        build.sample(1, "ab", load=load),
        build.sample(1, "ab", load=load, slot=1, moved=(1,)),
        build.sample(1, "ax", load=load, slot=2),
    ]
    finding = build.finding(build.probe(samples), "slot")
    assert (finding.n_trials, finding.diverged_trials, finding.latent_trials) == (1, 1, 0)


def test_bits_that_only_one_of_two_trials_recorded_are_no_evidence(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab", bits=False),
        build.sample(2, "ab", purpose="run-to-run", baseline=1),
    ]
    probe = build.probe(samples)
    assert (probe.latent_trials, sum(f.latent_trials for f in probe.axes)) == (0, 0)


def test_only_the_neighbours_differ(build):
    # The batch differs from the reference as well, but not along this axis.
    samples = [
        build.reference("abc"),
        build.sample(1, "axc", batch_size=8),
        build.sample(2, "axy", purpose="neighbours", baseline=1, load=Load(8, (0,), (4,) * 7)),
        build.sample(3, "axc", purpose="neighbours", baseline=1, load=Load(8, (0,), (5,) * 7)),
        build.sample(4, "axc", batch_size=8, purpose="run-to-run", baseline=1),
    ]
    probe = build.probe(samples)
    finding = build.finding(probe, "neighbours")
    assert (finding.n_trials, finding.diverged_trials) == (2, 1)
    assert (finding.first_divergence_min, finding.batch_sizes_diverged) == (2, (8,))
    assert build.finding(probe, "run-to-run").diverged_trials == 0
    assert build.finding(probe, "batch-size").diverged_trials == 1
    assert probe.diverged_trials == 4


def chance_in_batches(build, repeats="ab"):
    """A batch that differs from itself, and the probe alone, three times more."""
    return [
        build.reference("ab"),
        *build.copies(1, ["ab", "ab"]),
        *build.copies(2, ["ab", "ax"], purpose="run-to-run", baseline=1),
        *(
            build.reference(text, trial_id=3 + i, purpose="run-to-run", baseline=0)
            for i, text in enumerate(("ab", "ab", repeats))
        ),
    ]


def in_chunks(build, trial_id, text, **fields):
    load = Load(1, cache_state="chunked", cut=trial_id)
    return build.sample(trial_id, text, purpose="cache", load=load, **fields)


def test_what_differs_of_the_probe_alone_is_not_laid_to_chance_in_batches(build):
    samples = chance_in_batches(build)
    samples += [in_chunks(build, i, "ay") for i in (6, 7, 8, 9)]
    finding = build.finding(build.probe(samples), "cache")
    # Four of four, and none of four repeats: one of 70 draws of four from eight (by hand).
    assert (finding.alone, finding.told_apart, finding.rate) == (Counts(4, 4, 0), True, None)
    assert build.finding(build.probe(samples), "slot").told_apart is False


def test_bits_alone_are_told_apart_too(build):
    samples = chance_in_batches(build)
    samples += [in_chunks(build, i, "ab", moved=(1,)) for i in (6, 7, 8, 9)]
    finding = build.finding(build.probe(samples), "cache")
    assert (finding.alone, finding.told_apart) == (Counts(4, 0, 4), True)


def test_chance_alone_is_laid_to_nothing_else(build):
    few = [in_chunks(build, i, "ay") for i in (6, 7)]  # One of 15 draws of two from six.
    assert not build.finding(build.probe(chance_in_batches(build) + few), "cache").told_apart
    many = [in_chunks(build, i, "ay") for i in range(6, 14)]
    assert not build.finding(build.probe(chance_in_batches(build, "ax") + many), "cache").told_apart


def test_axes_without_evidence_are_listed_only_if_asked_for(build):
    samples = [build.reference("ab"), build.sample(1, "ab")]
    probe = build.probe(samples, axes=("cache",))
    assert [f.axis for f in probe.axes] == ["batch-size", "cache"]
    assert [f.axis for f in build.probe(samples).axes] == list(AXES)


# Loads


def test_loads_by_kind(build):
    samples = [
        build.reference("abc", elapsed_s=0.5),
        build.sample(1, "abc", batch_size=4, elapsed_s=2.0),
        build.sample(2, "abx", batch_size=4, elapsed_s=1.0, achieved=3),
        build.sample(3, "xbc", batch_size=4, elapsed_s=1.0, achieved=None),
        *build.copies(4, ["abc", "abx"], elapsed_s=2.0),
        build.sample(5, "abc", load=Load(1, cache_state="chunked"), purpose="cache", elapsed_s=0.0),
    ]
    probe = build.probe(samples)
    assert [(x.axis, x.batch_size, x.slot, x.cache_state) for x in probe.loads] == [
        ("reference", 1, 0, "whole"),
        ("batch-size", 2, None, "whole"),
        ("batch-size", 4, 0, "whole"),
        ("cache", 1, 0, "chunked"),
    ]
    four = build.load(probe, "batch-size", 4)
    assert (four.n_trials, four.n_samples, four.n_errors, four.n_unique) == (3, 3, 0, 3)
    assert (four.n_diverged_trials, four.first_divergence_min) == (2, 0)
    assert (four.first_divergence_median, four.latent) == (1.0, 0)
    assert (four.achieved_batch_size_min, four.elapsed_s) == (3, 4.0)
    assert four.tokens_per_s == 9 / 4
    copies = build.load(probe, "batch-size", 2, slot=None)
    assert (copies.n_trials, copies.n_samples, copies.n_unique) == (1, 2, 2)
    assert (copies.elapsed_s, copies.tokens_per_s) == (2.0, 3.0)  # two rows of three tokens
    assert build.load(probe, "cache", 1).tokens_per_s is None
    assert (probe.elapsed_s, probe.tokens_per_s) == (6.5, 21 / 6.5)


def test_unwitnessed_trials(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab"),
        build.sample(2, "ab", achieved=1),
        build.sample(3, "ab", achieved=None),
        *build.copies(4, ["ab", "ab"], achieved=None),
    ]
    assert build.probe(samples).unwitnessed_trials == 3
