"""What is compiled beside a run is what it launches, and nothing of a run depends on it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.errors import UsageError
from ndcheck.request import make_spec
from ndcheck.samplers.local.backend import LocalBackend
from ndcheck.samplers.local.beside import compiling
from ndcheck.samplers.local.beside.compiling import compile_ahead

LAUNCHED = Path(__file__).with_name("launched.py")
CHEAP = """
import sys, triton
from ndcheck_kernels.measure import ahead, resources
sizes = ahead.Decoder(64, 96, 4, 2, 16, 4096, "bfloat16", False, True)
cheap = [*ahead.launches(sizes, [1], [1], [16])][-8:]
"""
COMPILE = f"{CHEAP}print(*ahead.compile_share(cheap, 0, 2, 90, 132))"
LAUNCH = f"""{CHEAP}
def note(*, src, cache_hit, **_):
    print(src.name, cache_hit)

triton.knobs.compilation.listener = note
with resources.compiling(90):
    for launch in cheap:
        launch()
"""
SHORT = {"max_tokens": 12, "samples": 24, "loads": [1, 2, 4]}
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}

WORK = """
import pickle, sys, torch
from types import SimpleNamespace
from ndcheck.samplers.local.beside import compiling

class Parent:
    def receive(self):
        return pickle.load(open(sys.argv[1], "rb"))

H200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
torch.cuda.get_device_properties = lambda where: H200
compiling.Parent = Parent
compiling.main()
"""


@pytest.fixture
def alone(warm_python):
    """Runs Python in a process that compiles: this one may have set up the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def run(*arguments, **variables):
        done = subprocess.run(
            [warm_python(), *arguments], env={**environment, **variables},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def made(folder, kind, **changed):
    folder.mkdir()
    name = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    config = SMALL | {"model_type": kind, "architectures": [f"{name}ForCausalLM"]} | changed
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def check(lines, n_norms):
    """No kernel is met unforeseen but the weightings of norms: here no bits ever fit the first."""
    for line, of_this in zip(lines.splitlines(), n_norms, strict=True):
        found = json.loads(line)
        assert found["missed"] == ["_composed_norm_kernel"] * 2 * of_this
        assert len(found["met"]) >= 14
        assert {"_qkv_kernel", "_decode_kernel", "_read_block_kernel"} <= set(found["met"])


def test_all_that_a_run_launches_is_foreseen(alone, tmp_path):
    random = json.dumps(SHORT | {"random_weights": 0})
    runs = [
        *(str(MODEL_DIRECTORY), json.dumps(SHORT)),
        *(made(tmp_path / "llama", "llama", head_dim=32), random),
        *(made(tmp_path / "qwen2", "qwen2"), random),
    ]
    check(alone(str(LAUNCHED), *runs), [2, 1, 1])


@pytest.mark.slow
def test_the_default_run_launches_all_that_is_foreseen_and_nothing_else(alone):
    """But for what shorter runs launch, or older versions of transformers (for rotary angles)."""
    lines = alone(str(LAUNCHED), str(MODEL_DIRECTORY), "{}")
    check(lines, [2])
    assert set(json.loads(lines)["unneeded"]) <= {"_silu_mul_kernel", "_matmul_pointer_kernel"}


def test_a_launch_finds_what_another_process_compiled(alone, tmp_path):
    """Half of it, which shows that the other half was not there before."""
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    compiled = alone("-c", COMPILE, **cache).split()
    looked_up = [line.split() for line in alone("-c", LAUNCH, **cache).splitlines()]
    assert [name for name, was_there in looked_up if was_there == "True"] == compiled
    assert len(looked_up) == 2 * len(compiled) == 8


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that seems to have one, and a cache that is empty."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(compiling, "DRIVER", (tmp_path,))
    monkeypatch.setattr(compiling, "metadata", SimpleNamespace(version=lambda package: "1.0"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    return tmp_path


def shares(model=MODEL_DIRECTORY, **options):
    spec = make_spec(**{"model": str(model), "kernels": ["stock", "invariant"]} | options)
    return compiling._shares(spec)


def test_a_process_compiles_its_share_and_says_so(gpu, alone):
    asked, device, *_ = shares()[0]
    mark = gpu / "triton" / "mark"
    message = gpu / "message"
    # A share of one kernel, which takes no time to compile.
    message.write_bytes(pickle.dumps((asked, device, 27, 40, str(mark))))
    alone("-c", WORK, str(message), TRITON_CACHE_DIR=str(gpu / "triton"))
    assert mark.exists()
    compiled = [file.stem for file in (gpu / "triton").glob("*/*.cubin")]
    assert compiled == ["_sum_kernel"]


def test_each_process_has_a_share_until_it_is_compiled(gpu, monkeypatch):
    first = shares()
    assert [share for _, _, share, _, _ in first] == [0, 1, 2, 3]
    mark = Path(first[1][-1])
    mark.parent.mkdir()
    mark.touch()
    assert shares() == [first[0], *first[2:]]
    # Another run may launch other kernels.
    assert len(shares(max_tokens=500)) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert len(shares()) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert shares() == []


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"kernels": ["stock"]},
        {"batching": "continuous"},
        {"kv_cache_dtype": "fp8"},
    ],
    ids=str,
)
def test_nothing_is_compiled_for_a_run_that_launches_other_kernels(gpu, options):
    assert shares(**options) == []


def test_nothing_is_compiled_without_a_gpu_or_under_the_interpreter(gpu, monkeypatch):
    of_cpus = SimpleNamespace(version=lambda package: "2.13.0+cpu")
    for name, value in (("DRIVER", (gpu / "missing",)), ("metadata", of_cpus)):
        with monkeypatch.context() as patch:
            patch.setattr(compiling, name, value)
            assert shares() == []
    for name, value in (("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", "")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert shares() == []
    assert len(shares()) == 4


@pytest.mark.parametrize(
    "changed",
    [{"model_type": "gemma"}, {"quantization_config": {"quant_method": "fp8"}}],
    ids=str,
)
def test_nothing_is_compiled_for_other_layers(gpu, changed):
    assert len(shares(made(gpu / "plain", "llama"))) == 4
    assert shares(made(gpu / "other", "llama", **changed)) == []


@pytest.fixture
def processes(processes_of):
    """Those that compile."""
    return processes_of(compiling.__name__)


@pytest.mark.parametrize("content", ["[1]", "{", '{"model_type": "llama"}'])
def test_a_config_that_is_none_starts_nothing_and_stops_nothing(gpu, processes, content):
    (gpu / "config.json").write_text(content)
    spec = make_spec(model=str(gpu), kernels=["stock", "invariant"])
    done = False
    with compile_ahead(spec):
        done = True
    assert done
    assert processes == []


def program(folder, text):
    """Stands in for the interpreter."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_processes_and_their_compilers_end_with_the_run(gpu, processes, monkeypatch):
    children = gpu / "children"
    monkeypatch.setattr(sys, "executable", program(gpu, f"sleep 600 & echo $! >> {children}; wait"))
    spec = make_spec(kernels=["stock", "invariant"], samples=1, max_tokens=1)
    sampler = LocalBackend().open_for_run(spec, private=None, say=lambda line: None)
    assert [process.poll() for process in processes] == [None] * 4
    pids = children.read_text().split()
    assert len(pids) == 4
    sampler.close()
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 4
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_end_where_the_model_cannot_be_opened(gpu, processes, monkeypatch):
    monkeypatch.setattr(sys, "executable", program(gpu, "exec sleep 600"))
    spec = make_spec(model=made(gpu / "llama", "llama"), kernels=["stock", "invariant"])
    with pytest.raises(UsageError, match="tokenizer"):
        LocalBackend().open_for_run(spec, private=None, say=lambda line: None)
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 4


def test_processes_that_die_stop_nothing(gpu, processes, monkeypatch):
    monkeypatch.setattr(sys, "executable", program(gpu, "exit 1"))
    with compile_ahead(make_spec(kernels=["stock", "invariant"])):
        assert len(processes) > 0


def test_an_interpreter_that_is_not_there_stops_nothing(gpu, processes, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(gpu / "missing"))
    with compile_ahead(make_spec(kernels=["stock", "invariant"])):
        assert processes == []


def test_a_machine_without_a_gpu_compiles_nothing(gpu, processes, monkeypatch, warm_python):
    """Whatever its files say: then the run computes on its CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")  # torch sees none, on a machine with a GPU too
    monkeypatch.setattr(sys, "executable", warm_python())
    with compile_ahead(make_spec(kernels=["stock", "invariant"])):
        assert [process.wait(60) for process in processes] == [0] * 4
    assert not (gpu / "triton").exists()
