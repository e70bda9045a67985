"""What the benchmark of several GPUs plans: memory by arithmetic, runs, and what is carried on."""

import argparse
from types import SimpleNamespace

import pytest

from bench.models import tensor_parallel
from bench.models.rank_memory import RESERVE, rank_memory
from bench.models.tensor_parallel import LARGE, SHAPES, Session, check_memory, compare_bits, runs_of


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        out=tmp_path / "out", tp=2, groups=8, seconds=60, tiny=False, bf16=False
    )


def test_the_memory_of_two_gpus():
    """By hand: 94 layers of 128 experts of 3 x 4096 x 1536, attention, and what stays in bf16."""
    found = rank_memory(SHAPES / LARGE, 2, 128, 1032)
    experts = 94 * 128 * 3 * 4096 * 1536
    attention = 94 * (2 * 64 + 2 * 4) * 128 * 4096
    scales = 4 * (experts + attention) // 128**2
    vocabulary = 2 * 2 * 151936 * 4096
    routers, norms = 94 * 128 * 4096 * 2, 2 * (94 * (2 * 4096 + 2 * 128) + 4096)
    assert found.weights == (experts + attention + scales + vocabulary) // 2 + routers + norms
    assert found.cache == 128 * 1032 * 94 * 2 * 2 * 128 * 2
    assert 134e9 < found.most < 137e9 < 143771 * 2**20  # Of an H200.
    assert found.most > RESERVE + found.weights + found.cache
    whole = rank_memory(SHAPES / LARGE, 4, 128, 1032, is_bf16=True)
    assert whole.weights == (experts + attention + vocabulary // 2) * 2 // 4 + routers + norms


def test_a_gpu_with_too_little_memory_is_refused(options, monkeypatch):
    (run,) = runs_of("long", options)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    sizes = [80 * 10**9, 150 * 10**9]
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda i: SimpleNamespace(total_memory=sizes[i])
    )
    with pytest.raises(RuntimeError, match=r"needs 135 GB on each of 2 GPUs, and one has 80 GB"):
        check_memory(run, SHAPES / LARGE)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="needs 2 GPUs, and here are 1"):
        check_memory(run, SHAPES / LARGE)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    sizes[0] = sizes[1]
    check_memory(run, SHAPES / LARGE)


def test_an_8b_runs_on_one_gpu_and_on_all(options):
    options.tp = 4
    runs = [(run.n_ranks, run.groups) for run in runs_of("8b", options)]
    assert runs == [(4, None), (4, 8), (2, 8), (1, 8)]


def test_bits_must_be_equal_and_the_control_must_not(options, monkeypatch, capsys):
    plain, two, one = runs_of("8b", options)
    found = {plain: {1}, two: {2}, one: {2}}
    monkeypatch.setattr(tensor_parallel, "bits", lambda path: found[path])
    assert compare_bits({run: run for run in found})
    assert "bits at 1, 2 ranks equal; without, the control, others" in capsys.readouterr().out
    assert not compare_bits({plain: two, two: two, one: one})
    found[one] = {3}
    assert not compare_bits({run: run for run in found})
    assert "DIFFER" in capsys.readouterr().out


def test_what_was_measured_is_there_for_the_next_call(options, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "first"))
    session = Session(options)
    (session.work / "run").mkdir()
    (session.work / "run" / "samples.jsonl").write_text("line\n" * 1000)
    session.pack()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "second"))
    again = Session(options)
    assert again.work != session.work
    assert (again.work / "run" / "samples.jsonl").read_text() == "line\n" * 1000
