"""Tiny models made from configs: no download, no network."""

from __future__ import annotations

import atexit
import fcntl
import functools
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import typer

# Two workers of two threads each wait for one another on two cores, and tests take 3 to 50 times as
# long. What is about threads sets their number itself. OpenMP reads these with the import of torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The hub's client reads it when it is first imported, and else asks for half a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, and transformers imports it: so before any test.
    os.environ["TRITON_INTERPRET"] = "1"

# A job in a shell's background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

WARM = Path(__file__).parent / "warm"
FAMILIES = ("qwen3", "llama", "gemma3")

LONGEST = (
    *("triton/test_compile.py", "odd/test_evidence.py", "models/test_families.py"),
    *("servers/test_planted_faults.py", "local/test_tensor_parallel.py", "odd/test_answers.py"),
    *("cli/test_explain.py", "odd/test_beside.py", "fed/test_speculation.py"),
    *("odd/test_tokens.py", "cli/test_explain_faults.py", "tests/test_action.py"),
    *("odd/test_requests.py", "local/test_faithful.py", "run/test_side_by_side.py"),
)
"""Files that take half a minute or more, those that wait in turns with those that compute."""


def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: one more than there are cores, since tests of servers mostly wait."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_configure(config: pytest.Config) -> None:
    # xdist would begin with the files of most tests, and end alone in a long file of few.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; then those that wait for servers, evenly among those that compute."""
    paths = dict.fromkeys(item.path for item in items)
    waiting = [path for path in paths if "servers" in path.parts]
    computing = [path for path in paths if path not in waiting]
    shares = {path: n / len(kind) for kind in (waiting, computing) for n, path in enumerate(kind)}
    places = {
        path: next(
            (n for n, end in enumerate(LONGEST) if path.as_posix().endswith(end)), len(LONGEST)
        )
        for path in paths
    }
    items.sort(key=lambda item: (places[item.path], shares[item.path]))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Next to nothing of what is imported is ever garbage: neither look there now nor in tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# At the very end, where Triton would take what is left for a leak; pytest looks for garbage before.
atexit.register(gc.unfreeze)


@pytest.fixture(scope="session", autouse=True)
def commands_built_once():
    """Typer reads every signature for each command line: most of what a small one costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory):
    """``warm_python(interpret=False)``: an interpreter for processes that would import torch.

    Its processes are forked from one that has, see `warm/client.py`: imports, of 3 to 8 s each, are
    all that they are spared. No GPU can be used after a fork: where there is one, it is the real
    interpreter. ``interpret`` says whether Triton interprets kernels there.
    """
    root, main = tmp_path_factory.getbasetemp(), os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root, main = root.parent, os.getppid()  # One for all processes of the suite.
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton reads its other variables when it uses them.
    names = ("OMP_", "MKL_", "HF_", "TRANSFORMERS_", "TRITON_INTERPRET")
    names += ("PYTHONHASH", "PYTHONWARN")

    def start(folder, environment):
        folder.mkdir()
        known = {
            "python": sys.executable,
            "socket": str(folder / "socket"),
            "names": names,
            "variables": {k: v for k, v in environment.items() if k.startswith(names)},
        }
        (folder / "known.json").write_text(json.dumps(known))
        python = folder / "python"
        python.write_text(f"#!{sys.executable} -IS\n{(WARM / 'client.py').read_text()}")
        python.chmod(0o755)
        command = [sys.executable, WARM / "server.py", known["socket"], str(main)]
        nowhere = subprocess.DEVNULL
        subprocess.run(command, env=environment, stdin=nowhere, stdout=nowhere, check=True)

    def get(interpret=False):
        if torch.cuda.is_available():
            return sys.executable
        folder = root / ("warm-interpreting" if interpret else "warm")
        with (root / "warm.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                start(folder, variables | ({"TRITON_INTERPRET": "1"} if interpret else {}))
        return str(folder / "python")

    return get


def _tiny_config(family: str, vocabulary: int):
    import transformers

    common = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if family == "qwen3":
        return transformers.Qwen3Config(**common)
    if family == "llama":
        return transformers.LlamaConfig(**common)
    return transformers.Gemma3TextConfig(
        **common,
        sliding_window=16,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    )


def write_tiny_model(directory: Path, family: str, dtype: str = "bfloat16") -> Path:
    import tokenizers
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["tell me about the order of a sum"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=alphabet,
            special_tokens=["<|end|>"],
            show_progress=False,
        ),
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|end|>",
                "pad_token": "<|end|>",
            }
        )
    )
    torch.manual_seed(0)
    config = _tiny_config(family, tokenizer.get_vocab_size())
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each of FAMILIES, bf16, random weights."""
    root = tmp_path_factory.mktemp("models")
    return {family: write_tiny_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def measured():
    """``measured(behaviour)``: a scripted run as it would be read back, without a disk."""
    from dataclasses import replace

    from ndcheck.findings import find
    from ndcheck.plan.faults import plant_fault
    from ndcheck.plan.trials import plan_trials
    from ndcheck.records import Decoding, Environment, Run
    from ndcheck.request import DEFAULTS
    from ndcheck.samplers.scripted.sampler import ScriptedSampler

    small = replace(
        DEFAULTS,
        decoding=Decoding(8),
        batch_sizes=(1, 3),
        axes=("run-to-run", "batch-size", "slot", "neighbours", "cache"),
        n_samples=40,
        arms=("stock",),
    )

    def measure(behaviour="clean", spec=small, arms=None, change=lambda sample: sample, **run):
        """``arms`` gives arms other behaviours; ``change`` is applied to every sample."""
        samples = []
        samplers = {arm: ScriptedSampler((arms or {}).get(arm, behaviour)) for arm in spec.arms}
        for trial in plan_trials(spec, {"p1": 4}, 1000):
            sampler = samplers[trial.arm]
            if trial.role == "control":
                trial = replace(trial, fault=plant_fault(8))
            samples += map(change, sampler.sample(trial, spec.probes[0], spec.decoding))
        record = {"environment": Environment(), "status": "finished", **run}
        return find(Run("r", "0", spec, started_at="", **record), samples).measured

    return measure


@pytest.fixture
def processes_of(monkeypatch):
    """``processes_of(module)``: those that are started from now on with it as their main program.

    They are ended with the test.
    """
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def watch(module: str) -> list[subprocess.Popen[bytes]]:
        def start(command, **options):
            process = popen(command, **options)
            if module in command:
                started.append(process)
            return process

        monkeypatch.setattr(subprocess, "Popen", start)
        return started

    yield watch
    for process in started:
        process.kill()
        process.wait()
