from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import fields, replace

import pytest

from ndcheck.probe import Message
from ndcheck.records import Decoding, Endpoint, Engine, Probe, RunSpec
from ndcheck.reports.wording.reproduction import (
    argument,
    prompts_file,
    reproduce_command,
    wrapped_command,
)
from ndcheck.request import DEFAULTS, make_probes
from ndcheck.samplers.options import SCHEDULED_AXES

HOSTILE = "it's \\n \n\t\x1b[31m \u202e\xa0 `|` $HOME 🧪 日本語\x7f1"


def test_the_defaults_need_no_option() -> None:
    assert reproduce_command(DEFAULTS, DEFAULTS) == "ndcheck run"


def test_only_what_differs_is_given() -> None:
    spec = replace(
        DEFAULTS,
        model="org/my model",
        probes=(Probe("p1", "What's up?"), Probe("p2", "Hi")),
        decoding=Decoding(max_tokens=7, temperature=0.5, seed=3),
        seed=3,
        batch_sizes=(1, 64),
        axes=("slot", "cache"),
        mode="mixed",
        n_samples=1000,
        dtype="float32",
        device="cuda:0",
        attention="sdpa",
        arms=("invariant",),
        chat=True,
    )
    assert shlex.split(reproduce_command(spec, DEFAULTS)) == [
        *("ndcheck", "run", "--prompt", "What's up?", "--prompt", "Hi"),
        *("--model", "org/my model", "--loads", "1,64", "--axes", "slot,cache"),
        *("--mode", "mixed", "-n", "1000", "--max-tokens", "7", "--temperature", "0.5"),
        *("--seed", "3", "--dtype", "float32", "--device", "cuda:0", "--attn", "sdpa"),
        *("--kernels", "invariant", "--chat"),
    ]


def test_a_target_rate_chooses_the_number_of_samples() -> None:
    spec = replace(DEFAULTS, target_rate=0.01, n_samples=5)
    assert reproduce_command(spec, DEFAULTS) == "ndcheck run --target-rate 0.01"


@pytest.mark.parametrize("field", [field.name for field in fields(RunSpec)])
def test_no_field_of_the_spec_is_forgotten(field) -> None:
    other = {
        "model": "org/model",
        "probes": (Probe("p1", "x"),),
        "decoding": replace(DEFAULTS.decoding, temperature=1.0),
        "batch_sizes": (3,),
        "axes": ("slot",),
        "mode": "mixed",
        "arms": ("invariant",),
        "target_rate": 0.5,
        "widths": (2, 6),
        "arrivals": "poisson:2",
        "engine": Engine(),
        "endpoint": Endpoint("http://127.0.0.1:8000/v1"),
    }
    old = getattr(DEFAULTS, field)
    value = other.get(field, not old if isinstance(old, bool) else 77)
    assert reproduce_command(replace(DEFAULTS, **{field: value}), DEFAULTS) != "ndcheck run"


@pytest.mark.parametrize("field", [field.name for field in fields(Endpoint)])
def test_no_field_of_the_endpoint_is_forgotten(field) -> None:
    other = {
        "api_key_file": "key.txt",
        "query": ("code",),
        "stop": ("END",),
        "header_names": ("X-Team",),
        "arrival": "poisson:2",
    }
    plain = replace(DEFAULTS, endpoint=Endpoint("http://127.0.0.1:8000/v1"))
    changed = replace(plain.endpoint, **{field: other.get(field, 77)})
    command = reproduce_command(replace(plain, endpoint=changed), DEFAULTS)
    assert command != reproduce_command(plain, DEFAULTS)


@pytest.mark.parametrize(
    "probes",
    [
        (Probe("p1", "a\0b"),),
        (Probe("named", "a"),),
        tuple(Probe(f"p{i}", "a") for i in range(1, 7)),
    ],
)
def test_prompts_that_options_cannot_hold_go_to_a_file(probes) -> None:
    spec = replace(DEFAULTS, probes=probes)
    assert reproduce_command(spec, DEFAULTS) == "ndcheck run --prompts-file prompts.jsonl"
    assert (
        reproduce_command(spec, DEFAULTS, "my run")
        == "ndcheck run --prompts-file 'my run/prompts.jsonl'"
    )
    assert prompts_file(spec, DEFAULTS).count("\n") == len(probes)
    assert prompts_file(DEFAULTS, DEFAULTS) is None


def test_conversations_come_back_from_their_file(tmp_path) -> None:
    messages = (Message("system", "Be terse."), Message("user", "a\nb"))
    probes = (Probe("p1", "a\nb", messages), Probe("x", "-"))
    spec = replace(DEFAULTS, probes=probes, chat=True)
    assert "--prompts-file" in reproduce_command(spec, DEFAULTS)
    (tmp_path / "prompts.jsonl").write_text(prompts_file(spec, DEFAULTS))
    assert make_probes([], tmp_path / "prompts.jsonl") == probes
    # As an option it would be read from standard input.
    assert prompts_file(replace(spec, probes=(Probe("p1", "-"),)), DEFAULTS) is not None


def test_a_wrapped_command_is_the_same_command() -> None:
    spec = replace(DEFAULTS, probes=(Probe("p1", "a b"),), n_samples=3, dtype="float32", seed=12)
    lines = wrapped_command(spec, DEFAULTS, 40)
    assert len(lines) == 2
    assert max(map(len, lines)) <= 40
    joined = "\n".join(lines).replace("\\\n", "")
    assert shlex.split(joined) == shlex.split(reproduce_command(spec, DEFAULTS))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("text", [HOSTILE, "plain", "it's", "a\nb", "\x80\xff", "-n", ""])
def test_bash_reads_an_argument_back(text) -> None:
    shown = argument(text)
    assert shown.isprintable()
    result = subprocess.run(
        ["bash", "-c", f"printf %s {shown}"],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8", "HOME": "/"},
    )
    assert result.stdout.decode() == text


def test_engine_options_are_repeated():
    engine = Engine("vllm", 2, 4, ("max_model_len=4096", "kv_cache_dtype=a b"))
    spec = replace(DEFAULTS, engine=engine, axes=SCHEDULED_AXES)
    command = reproduce_command(spec, DEFAULTS)
    assert command == (
        "ndcheck run --engine vllm --tp 2 --pp 4 --engine-arg max_model_len=4096 "
        "--engine-arg 'kv_cache_dtype=a b'"
    )
