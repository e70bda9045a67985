"""What a run advises applies to it: every command on its screen is run."""

from __future__ import annotations

import shlex
from contextlib import contextmanager

import pytest

from ndcheck.plan.coverage import samples_to_try_all, untried_axes
from ndcheck.plan.trials import plan_trials
from ndcheck.request import make_spec

SMALL = ("--loads", "1,2,4", "-n", "60", "--max-tokens", "8", "-q", "--out", "run")


def advised(screen):
    """The commands among the next steps, which a shell reads."""
    steps = screen.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in steps if line.startswith("  ndcheck ")]


@pytest.mark.parametrize(
    ("behaviour", "axis"),
    [
        ("batch-dependent", "batch-size"),
        ("slot-dependent", "slot"),
        ("neighbour-dependent", "neighbours"),
        ("cache-dependent", "cache"),
    ],
)
def test_every_command_that_a_failing_run_advises(ndcheck_here, behaviour, axis):
    done = ndcheck_here("run", "--model", f"scripted:{behaviour}", *SMALL)
    assert done.returncode == 1, done.stderr
    commands = advised(done.stdout)
    (narrower,) = (c for c in commands if c[:1] == ["run"] and "--axes" in c and "stock" in c)
    assert narrower[narrower.index("--axes") + 1] == axis
    narrow = ndcheck_here(*narrower, "-q", "--out", "narrow")
    assert narrow.returncode == 1, narrow.stderr
    assert any(line.split()[:2] == [axis, "FAIL"] for line in narrow.stdout.splitlines())
    assert narrow.stdout.count("Narrow it down") == 0
    others = [c for c in commands if c != narrower]
    assert ["report", "run"] in others
    for command in others:
        assert ndcheck_here(*command).returncode in (0, 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--loads", "1,2", "-n", "4"), "left slot, neighbours, cache, width, scoring untried"),
        (("--loads", "1", "-n", "9"), "as no batch had 2 rows"),
    ],
)
def test_an_inconclusive_run_names_the_command_that_settles_it(ndcheck_here, options, reason):
    options = ("--model", "scripted:clean", *options, "--kernels", "stock", "--max-tokens", "8")
    done = ndcheck_here("run", *options, "--out", "run")
    assert done.returncode == 3
    assert "untried" in done.stderr
    assert "slot: no trial compared it" in done.stdout
    assert reason in done.stdout
    wider, _ = advised(done.stdout)
    settled = ndcheck_here(*wider)
    assert settled.returncode == 0, settled.stdout
    assert "untried" not in settled.stdout + settled.stderr


@pytest.mark.parametrize(("loads", "advised_loads"), [("1,2", []), ("1,2,8", ["1,2"])])
def test_no_run_without_batches_is_advised_where_batches_failed(ndcheck_here, loads, advised_loads):
    options = ("--loads", loads, "-n", "40", "--max-tokens", "8", "-q", "--out", "run")
    name = "out-of-memory" if advised_loads else "never-batches"
    done = ndcheck_here("run", "--model", f"scripted:{name}", *options)
    assert done.returncode == 3
    runs = [command for command in advised(done.stdout) if command[0] == "run"]
    assert [run[run.index("--loads") + 1] for run in runs] == advised_loads


@pytest.mark.parametrize(
    ("axes", "excludes"),
    [("cache", False), ("cache,run-to-run", False), ("run-to-run", True)],
)
def test_no_rate_is_advised_where_every_load_has_run(ndcheck_here, axes, excludes):
    """Alone, a prompt's cache has two states besides the whole one."""
    options = ("--loads", "1", "-n", "20", "--max-tokens", "8", "-q", "--axes", axes)
    done = ndcheck_here("run", "--model", "scripted:clean", *options, "--kernels", "stock")
    assert done.returncode == 0, done.stderr
    rates = [c for c in advised(done.stdout) if "--target-rate" in c]
    assert bool(rates) == excludes
    for command in rates:
        assert ndcheck_here(*command, "-q").returncode == 0


def test_what_can_never_succeed_is_refused(ndcheck_here, tmp_path):
    command = ("run", "--model", "scripted:clean", "--axes", "batch-size,slot", "-q", "--loads")
    done = ndcheck_here(*command, "1")
    assert done.returncode == 2
    assert "compares batches of 2 rows or more" in done.stderr
    assert not (tmp_path / "ndcheck-runs").exists()
    assert ndcheck_here(*command, "1,2", "-n", "20", "--kernels", "stock").returncode == 0


@pytest.mark.parametrize("loads", ["1,2", "1,2,4,8,16", "3", "1,100"])
@pytest.mark.parametrize("mode", ["copies", "mixed"])
def test_the_samples_that_try_all_are_the_fewest(loads, mode):
    spec = make_spec(model="scripted:clean", loads=loads, mode=mode)
    needed = samples_to_try_all(spec)
    for n_samples, is_enough in ((needed, True), (needed - 1, False)):
        few = make_spec(model="scripted:clean", loads=loads, mode=mode, samples=n_samples)
        trials = plan_trials(few, {"p1": 9}, 4096)
        assert (untried_axes(few, trials) == []) is is_enough


@pytest.mark.parametrize("n_first", [0, 2])
def test_what_refused_a_run_is_not_met_again(ndcheck_here, monkeypatch, n_first):
    """An op that the kernels do not cover ends a run for good, whatever was measured before."""
    import ndcheck_kernels

    entered = ndcheck_kernels.invariant_kernels
    n_entered = 0

    @contextmanager
    def refuse_later():
        nonlocal n_entered
        n_entered += 1
        if n_entered > n_first:
            raise ndcheck_kernels.UncoveredOpError("aten.foo", None, "cpu", None, "no kernel")
        with entered() as scope:
            yield scope

    monkeypatch.setattr(ndcheck_kernels, "invariant_kernels", refuse_later)
    run = ("run", "--kernels", "invariant", "--loads", "1", "--axes", "run-to-run", "-n", "4")
    done = ndcheck_here(*run, "--max-tokens", "2", "--out", "r")
    assert done.returncode == 2
    assert "resume" not in done.stdout + done.stderr
    assert "Without this arm: --kernels stock" in done.stderr.splitlines()[-1]
    assert "INCONCLUSIVE" in done.stdout
    again = ndcheck_here("report", "r")
    assert "resume" not in again.stdout
    assert "aten.foo" in " ".join(again.stdout.split())
