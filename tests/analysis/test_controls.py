"""A planted control is caught where it was planted, and counts nowhere else."""

import pytest

from ndcheck.analysis.summarising import summarise
from ndcheck.records import Fault


def judge_control(build, **fields):
    control = {"purpose": "control", "batch_size": 1, "fault": Fault(latent_at=1, fork_at=3)}
    samples = [build.reference("abcdef"), build.sample(1, **(control | fields))]
    return summarise(samples, build.spec)


def test_a_control_is_caught_where_it_was_planted_and_counts_nowhere_else(build):
    summary = judge_control(build, text="abcXef", moved=(1, 2))
    (probe,) = summary.probes
    assert (probe.control.n_trials, probe.control.n_caught) == (1, 1)
    assert (probe.n_samples, probe.n_trials, probe.n_unique, probe.elapsed_s) == (1, 0, 1, 1.0)
    assert [load.axis for load in probe.loads] == ["reference"]
    assert summary.samples.completion_id.tolist() == [1, -1]
    assert summary.samples.first_divergence.tolist() == [-1, -1]


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "abcdef", "moved": (1,)},  # no fork
        {"text": "abcdXf", "moved": (1,)},  # a late one
        {"text": "aXcdef"},  # an early one
        {"text": "abcXef"},  # no latent divergence
        {"text": "abcXef", "moved": (2,)},  # a late one
        {"text": "abcXef", "moved": (0, 1)},  # something differs before the fault
        {"text": "abcXef", "moved": (1,), "baseline": 9},
        {"text": "abcXef", "moved": (1,), "fault": None},
    ],
)
def test_a_control_is_missed(build, fields):
    control = judge_control(build, **fields).probes[0].control
    assert (control.n_trials, control.n_caught) == (1, 0)


def test_without_bits_the_fork_decides(build):
    (probe,) = judge_control(build, text="abcXef", bits=False).probes
    assert (probe.control.n_trials, probe.control.n_caught) == (1, 1)


def test_failed_controls_are_not_counted(build):
    samples = [build.reference("abcd"), build.error(1, purpose="control")]
    probe = build.probe(samples)
    assert (probe.control.n_trials, probe.n_errors, len(probe.loads)) == (0, 0, 1)
