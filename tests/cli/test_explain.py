"""`order`, `trace`, `shrink` and `demo` as a user has them."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from types import SimpleNamespace

import pytest
import torch

from ndcheck.cli.app import run_command_line

SUMS = """
import torch

def add(x, columns):
    total = x[:, columns[0]].clone()
    for column in columns[1:]:
        total = total + x[:, column]
    return total

def steady(x):
    return add(x, range(x.shape[1]))

def switching(x):
    return add(x, range(x.shape[1]) if len(x) < 3 else range(x.shape[1] - 1, -1, -1))

def no_sum(x):
    return x.square().sum(-1)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs ``ndcheck ARGUMENTS`` in this process, where torch is imported already, on one thread.

    Threads that wait for each other spin here, as torch was imported before ndcheck could tell.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = run_command_line([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=captured.out, stderr=captured.err)

    yield run
    torch.set_num_threads(n_threads)


@pytest.fixture
def sums(tmp_path):
    (tmp_path / "sums.py").write_text(SUMS)


def test_order_finds_where_a_function_switches(here, sums, tmp_path):
    options = ("--terms", "8", "--rows", "1-4", "-q")
    done = here("order", "--fn", "sums.py:switching", *options, "--svg", "o.svg", "--dot", "o.dot")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("VARIES  the order of addition changes at rows = 3\n")
    assert "8 terms in order backwards" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert xml.etree.ElementTree.parse(tmp_path / "o.svg").getroot().tag.endswith("svg")
    assert "cluster_1" in (tmp_path / "o.dot").read_text()
    done = here("order", "--fn", "sums.py:steady", *options, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["switch_points"] == []
    assert [order["form"] for order in document["orders"]] == ["8 in order"]


def test_order_of_the_invariant_arm_is_fixed(here):
    options = ("--terms", "64", "--columns", "32", "--rows", "1,2,4", "-q")
    done = here("order", "linear", "--kernels", "invariant", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("FIXED")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("order",), "give one OP"),
        (("order", "conv"), "'conv' is unknown"),
        (("order", "mm", "--rows", "0-3"), "--rows: '0-3'"),
        (("order", "mm", "--rows", "4-1"), "empty range"),
        (("order", "mm", "--terms", "1"), "2 terms or more"),
        (("order", "mm", "--dtype", "int8"), "choose from bf16"),
        (("order", "mm", "--kernels", "stock,invariant"), "give one of stock, invariant"),
        (("order", "mm", "--terms", "2000", "--svg", "x.svg"), "up to 1024 terms"),
        (("order", "--fn", "sums.py:absent"), "--fn sums.py:absent"),
        (("trace", "--step", "-1"), "--step"),
        (("trace", "--loads", "auto"), "'auto' is not a batch size"),
        (("trace", "--sample", "3"), "give --run DIR too"),
        (("trace", "--run", "nowhere"), "holds no run"),
        (("trace", "--run", "nowhere", "--loads", "2"), "--loads cannot be changed"),
        (("trace", "--model", "scripted:clean"), "does not run in this process"),
        (("shrink", "--run", "nowhere"), "holds no run"),
    ],
)
def test_bad_input_is_one_line(here, sums, arguments, message):
    done = here(*arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in done.stderr


def test_what_is_no_sum_is_inconclusive_and_not_an_order(here, sums, tmp_path):
    done = here("order", "--fn", "sums.py:no_sum", "--terms", "8", "-q", "--svg", "o.svg")
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("INCONCLUSIVE")
    assert "not a plain sum" in done.stdout
    assert "<path" not in (tmp_path / "o.svg").read_text()


def test_a_function_that_raises_is_one_line(here, sums):
    done = here("order", "--fn", "sums.py:add", "--terms", "8", "-q")
    assert done.returncode == 2
    assert "TypeError" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_trace_of_the_embedded_model_agrees_with_order(here):
    """On this machine: where linear's order changes with the rows, the trace blames it there."""
    loads = "2,4"
    options = ("--dtype", "fp32", "--step", "1", "--loads", loads)
    traced = here("trace", *options, "--json", "-q", "--exit-code")
    options = ("--terms", "256", "--columns", "256", "--rows", f"1,{loads}", "--json", "-q")
    read = here("order", "linear", *options)
    (step,) = json.loads(traced.stdout)["steps"]
    points = json.loads(read.stdout)["points"]
    orders = [json.dumps(point["row_classes"]) for point in points]
    classes = {}
    for rows, order in zip((1, 2, 4), orders, strict=True):
        classes.setdefault(order, []).append(rows)
    guilty = {(group["op"], group["module"]): group for group in step["groups"]}
    key = ("linear", "model.layers.*.self_attn.q_proj")
    assert (key in guilty) == (len(classes) > 1)
    if key in guilty:
        assert guilty[key]["bit_classes"] == list(classes.values())
        assert step["swaps"]["smallest"]
        assert any("ndcheck order linear" in line for line in step["advice"])
    assert traced.returncode == read.returncode == (1 if len(classes) > 1 else 0)
    assert step["doubt"] is None
    assert not any(load["tracing_changed_bits"] for load in step["loads"])


def test_trace_of_the_invariant_arm_is_clean(here):
    options = ("--dtype", "fp32", "--kernels", "invariant", "--loads", "2,4", "-q")
    done = here("trace", *options, "--exit-code")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("CLEAN") == 2
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_recorded_divergence_is_traced_shrunk_and_shown(here, warm_python, monkeypatch, tmp_path):
    """From a run of 16 rows to a script of its own; skipped where this machine does not diverge."""
    monkeypatch.setattr(sys, "executable", warm_python())  # The script's.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = ("--loads", "16", "--mode", "mixed", "--axes", "neighbours", "--kernels", "stock")
    length = ("--max-tokens", "24", "-n", "24", "--stop-on-divergence")
    probe = ("--prompt", "class Stack:")
    run = here("run", *probe, *options, *length, "--out", "run", "-q", "--json")
    document = json.loads(run.stdout)
    if not document["probes"][0]["diverged_trials"]:
        pytest.skip("no trial diverged on this machine")
    traced = here("trace", "--run", "run", "--no-swaps", "-q", "--exit-code")
    assert traced.returncode == 1, traced.stderr
    assert "DOUBT" not in traced.stdout
    steps = json.loads((tmp_path / "run" / "explanation.json").read_text())["steps"]
    ops = {sentence.split()[0] for step in steps for sentence in step["advice"]}
    assert ops - {"No"}  # the step where bits begin to differ has an op to blame
    assert all(op in traced.stdout for op in ops)
    shown = here("report", "run").stdout
    assert all(f": {op} " in shown.partition("trace: ")[2] for op in ops)
    assert "## Explanation" in (tmp_path / "run" / "report.md").read_text()
    shrunk = here("shrink", "--run", "run", "--json", "-q")
    assert shrunk.returncode == 1, shrunk.stderr
    found = json.loads(shrunk.stdout)
    assert len(found["before"]["rows"]) == 16
    assert len(found["batch"]["rows"]) < 16
    assert found["script_shows_it"]
    script = tmp_path / "run" / "repro.py"
    assert len(script.read_text().splitlines()) < 42


def test_demo(here):
    done = here("demo")
    assert done.returncode == 0, done.stderr
    assert "258 different sums" in done.stdout
    assert "102" in done.stdout
