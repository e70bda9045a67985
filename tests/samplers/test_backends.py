"""Every option is one row and every backend one folder: what is derived from them holds for all."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck import request
from ndcheck.cli import run_session
from ndcheck.cli.app import run_command_line
from ndcheck.cli.commands.run import run
from ndcheck.errors import UsageError
from ndcheck.records import AXES, Engine
from ndcheck.reports.wording.reproduction import PROMPTS_FILE, prompts_file, reproduce_command
from ndcheck.request import DEFAULTS
from ndcheck.samplers import backends
from ndcheck.samplers.backend import Backend
from ndcheck.samplers.backends import BACKENDS, OPTIONS, backend_of
from ndcheck.samplers.options import ENGINE
from ndcheck.storage.run_directory import read_run

RUNS = Path(__file__).parents[1] / "runs"
URL = "http://host:8000/v1"
CHOSEN = {
    "LocalBackend": (),
    "EndpointBackend": ("--endpoint", URL, "--model", "served"),
    "ScriptedBackend": ("--model", "scripted:clean"),
    "EngineBackend": ("--engine", "vllm"),
}
"""What chooses each backend on the command line."""
TYPED = {
    "prompt": "hello", "prompts_file": "prompts.txt", "prompt_column": "b", "model": "m",
    "system": "Be brief.", "query": "api-version=2024-10-21", "extra_body": '{"top_k":1}',
    "no_temperature": None, "stop": "END", "chat_template_kwargs": '{"enable_thinking":false}',
    "adapter": "lora", "engine": "vllm", "tp": "2",
    "tp_groups": "8", "pp": "3", "engine_arg": "max_model_len=4096", "invariant_by": "vllm",
    "endpoint": URL,
    "api_key_file": "key.txt", "header": "X-Team: a", "fillers": "shared-prefix", "timeout": "7.5",
    "retries": "9", "loads": "1,3", "axes": "slot,cache", "mode": "mixed", "batching": "continuous",
    "arrivals": "poisson:2", "samples": "12", "max_tokens": "7", "temperature": "0.5", "seed": "4",
    "dtype": "fp32", "device": "cpu", "attn": "eager", "kernels": "invariant",
    "widths": "2,6", "confidence": "0.9", "target_rate": "0.1", "random_weights": "5",
    "draft": "layers:1",
    "answer_pattern": "a+", "answer": "number",
    "chat": None, "trust_remote_code": None, "stop_on_divergence": None, "allow_latent": None,
    "dequantise": None, "kv_cache_dtype": "fp8",
}  # fmt: skip
"""A value other than the default for each option; None: it is a switch."""
ALSO = {"arrivals": ("--batching", "continuous"), "tp_groups": ("--kernels", "invariant")}
"""What an option needs beside it, where the backend is this process."""
ALWAYS = {
    "prompt_column": ("--prompts-file", "prompts.jsonl"),
    "chat_template_kwargs": ("--chat",),
}
"""What it needs everywhere."""


def arguments(name):
    value = TYPED[name]
    return (OPTIONS[name].flag,) if value is None else (OPTIONS[name].flag, value)


def parse(*typed):
    """The exit code of `ndcheck run`, and the spec that it would have measured."""
    with mock.patch.object(run_session, "start", return_value=0) as start:
        code = run_command_line(["run", *typed])
    return code, start.call_args.args[0] if start.called else None


def takes(backend, name):
    return name in {option.name for option in backend.options}


def test_every_option_and_backend_is_tried():
    assert set(TYPED) == set(OPTIONS)
    assert set(CHOSEN) == {type(backend).__name__ for backend in BACKENDS}
    not_of_a_spec = {
        *("context", "arrival", "out", "resume", "dry_run", "verbose", "html", "plots", "json"),
        *("quiet", "against"),
    }
    assert set(inspect.signature(run).parameters) - not_of_a_spec == set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda each: type(each).__name__)
def test_an_option_is_taken_by_its_owners_and_refused_by_the_others(
    backend, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("one\ntwo\n")
    chosen = CHOSEN[type(backend).__name__]
    Path("prompts.jsonl").write_text('{"prompt": "one", "b": "two"}\n')
    also = ALSO.get(name, ()) if type(backend).__name__ == "LocalBackend" else ()
    also += ALWAYS.get(name, ())
    plain_code, plain = parse(*chosen, *also)
    assert (plain_code, type(backend_of(plain))) == (0, type(backend))
    code, spec = parse(*chosen, *also, *arguments(name))
    lines = capsys.readouterr().err.splitlines()
    if OPTIONS[name].flag in chosen or name in ("endpoint", "engine", "model"):
        return  # These choose another backend: see below.
    served_kernels = name == "kernels" and backend.is_remote
    if takes(backend, name) and not served_kernels:
        assert (code, lines) == (0, [])
        assert spec != plain
    else:
        assert (code, spec) == (2, None)
        (line,) = lines
        assert line.startswith(f"ndcheck: {OPTIONS[name].flag}")


def test_what_chooses_a_backend_excludes_another(capsys):
    for typed in (("--endpoint", URL, "--model", "m"), ("--model", "scripted:clean")):
        assert parse(*typed, "--engine", "vllm") == (2, None)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ndcheck: --engine: ")
    assert parse("--engine", "vlm") == (2, None)
    assert "choose from transformers, vllm, did you mean vllm?" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, row in OPTIONS.items() if row.has_variable])
def test_a_variable_stands_for_its_option(name, monkeypatch):
    also = (*ALSO.get(name, ()), *(("--model", "m") if name == "endpoint" else ()))
    _, by_flag = parse(*also, *arguments(name))
    monkeypatch.setenv(f"NDCHECK_{name.upper()}", TYPED[name])
    _, by_variable = parse(*also)
    assert by_variable == by_flag


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_takes_no_other_option(name, capsys):
    assert run_command_line(["run", "--resume", "missing", *arguments(name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    is_trusted = name in {
        *("endpoint", "api_key_file", "header", "engine_arg", "attn", "trust_remote_code"),
        *("query", "extra_body"),
    }
    assert (f"{OPTIONS[name].flag} cannot be changed" in line) != is_trusted


def test_defaults_are_the_same_everywhere():
    for name, row in OPTIONS.items():
        typed = inspect.signature(run).parameters[name].default
        assert typed is None or row.parse(typed) == row.parse(row.default), name


def texts(**kinds):
    return st.text(
        st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), **kinds
    ).filter(str.isprintable)


def some(**options):
    return st.fixed_dictionaries({}, optional=options)


NUMBERS = st.floats(1e-3, 1e3)
RATES = st.floats(1e-3, 0.999)
COMMON = {
    "prompt": st.lists(texts(min_size=1).filter(str.strip), min_size=1, max_size=6),
    # Some properties cannot be seen in batches of one row, and then a run is refused.
    "loads": st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True).filter(
        lambda sizes: max(sizes) > 1
    ),
    "axes": st.lists(st.sampled_from(AXES), min_size=1),
    "mode": st.sampled_from(["copies", "mixed"]),
    "max_tokens": st.integers(1, 500),
    "temperature": st.floats(0, 1e6),
    "seed": st.integers(0, 2**63 - 1),
    "confidence": RATES,
    "stop_on_divergence": st.booleans(),
    "allow_latent": st.booleans(),
    "chat": st.booleans(),
    "system": texts(min_size=1).filter(str.strip),
    "answer_pattern": st.sampled_from(["a+", r"\d", "it's (.*) $HOME"]),
}
COMPUTED = {
    "dtype": st.sampled_from(["bf16", "fp32"]),
    "random_weights": st.integers(0, 2**63 - 1),
    "trust_remote_code": st.booleans(),
    "kernels": st.sampled_from(["stock", "stock,invariant"]),
}
NAMES = st.sampled_from(["org/model", "a model", "-x", "it's"])


def arrivals(clock):
    return st.one_of(
        st.sampled_from(["together", "closed"]),
        st.builds(f"poisson:{{}}/{clock}".format, NUMBERS),
        st.builds(f"bursts:{{}}:{{}}{clock}".format, st.integers(1, 99), NUMBERS),
    )


WIDTHS = st.lists(st.integers(2, 1024), min_size=1, max_size=4, unique=True)
HERE = some(
    **COMMON,
    **COMPUTED,
    widths=WIDTHS,
    model=NAMES,
    device=st.just("cpu"),
    attn=st.just("org/kernel"),
    dequantise=st.booleans(),
    kv_cache_dtype=st.sampled_from(["auto", "fp8"]),
)
SPECS = {
    "exact": HERE,
    "drafted": st.builds(
        lambda options, draft: {**options, "draft": draft, "axes": "all", "temperature": 0.0},
        HERE,
        st.sampled_from(["layers:2", "org/draft", "it's"]),
    ),
    "continuous": st.builds(
        lambda options, when: {
            **options,
            "kv_cache_dtype": "auto",
            "batching": "continuous",
            **when,
        },
        HERE,
        some(arrivals=arrivals("step")),
    ),
    "ranks": st.builds(
        lambda options, n: {**options, "tp": n, "kernels": "invariant", "tp_groups": 8 * n},
        HERE,
        st.sampled_from([1, 2, 4]),
    ),
    "scripted": st.builds(
        lambda options: {**options, "model": "scripted:clean"},
        some(**COMMON, kernels=st.sampled_from(["invariant", "stock,invariant"])),
    ),
    "vllm": st.builds(
        lambda options: {**options, "engine": "vllm"},
        some(
            **COMMON,
            **COMPUTED,
            model=NAMES,
            tp=st.integers(1, 8),
            pp=st.integers(1, 8),
            engine_arg=st.lists(
                st.builds("{}={}".format, st.sampled_from("abcd"), texts().map(str.strip)),
                max_size=3,
                unique_by=lambda text: text[0],
            ),
        ),
    ),
    "endpoint": st.builds(
        lambda options: {"model": "served", **options, "endpoint": URL},
        some(
            **COMMON,
            model=NAMES,
            arrivals=arrivals("s"),
            fillers=st.sampled_from(["words", "shared-prefix"]),
            timeout=st.integers(1, 99999),
            retries=st.integers(0, 9),
            api_key_file=st.just(Path("my key.txt")),
            query=st.sampled_from(["api-version=2024-10-21", ["code=sesame", "api-version=1"]]),
            extra_body=st.sampled_from(['{"top_k": 1}', {"a": {"api_key": "sesame"}, "b": "it's"}]),
            stop=st.lists(texts(min_size=1), max_size=2),
            no_temperature=st.just(value=False),
        ),
    ),
}


@pytest.mark.parametrize("kind", SPECS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_command_that_repeats_a_run_asks_for_the_same(kind, data):
    options = data.draw(SPECS[kind])
    options |= data.draw(some(samples=st.integers(1, 999)) | some(target_rate=st.floats(0.01, 0.9)))
    spec = request.make_spec(**options)
    headers = data.draw(st.lists(st.sampled_from(["X-A", "X-B"]), unique=True))
    if spec.endpoint is not None:
        spec = request.add_headers(spec, dict.fromkeys(headers, "secret"))
    with tempfile.TemporaryDirectory() as folder:
        if (text := prompts_file(spec, DEFAULTS)) is not None:
            Path(folder, PROMPTS_FILE).write_text(text)
        command = shlex.split(reproduce_command(spec, DEFAULTS, folder))
        code, again = parse(*command[command.index("run") + 1 :])
    assert (code, again) == (0, spec)


def test_a_new_backend_is_its_class_and_a_row_of_the_table(monkeypatch, capsys):
    class Toy(Backend):
        title = "a toy"
        chosen_by = "--engine toy"
        engine = "toy"
        own = (replace(ENGINE, fields=("engine.name",)),)

        def blank(self, defaults):
            return replace(defaults, engine=Engine(""))

        def unseen(self, spec):
            return "toys are not looked into"

    monkeypatch.setattr(backends, "BACKENDS", (*BACKENDS, Toy()))
    code, spec = parse("--engine", "toy", "-n", "3")
    assert (code, spec.engine) == (0, Engine("toy"))
    assert reproduce_command(spec, DEFAULTS) == "ndcheck run --engine toy -n 3"
    assert backend_of(spec).unseen(spec) == "toys are not looked into"
    assert parse("--engine", "toy", "--device", "cpu") == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "ndcheck: --device: this is for transformers in this process: give --engine transformers"
    )


def test_the_table_imports_nothing_that_computes():
    code = (
        "import sys, ndcheck.samplers.backends as b; "
        "assert len(b.BACKENDS) == 4; "
        "print(sorted({'torch', 'transformers', 'httpx2', 'numpy', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_old_name_of_arrivals_is_heard_with_a_note(capsys):
    served = CHOSEN["EndpointBackend"]
    code, spec = parse(*served, "--arrival", "poisson:2")
    assert (code, capsys.readouterr().err) == (
        0,
        "ndcheck: --arrival is now called --arrivals\n",
    )
    assert spec == parse(*served, "--arrivals", "poisson:2/s")[1]
    assert "--arrivals poisson:2/s" in reproduce_command(spec, DEFAULTS)
    assert parse(*served, "--arrival", "closed", "--arrivals", "together")[0] == 2


def test_help_puts_options_under_their_owners(capsys):
    assert run_command_line(["run", "--help"]) == 0
    sections = re.split(r"(?m)^(Options.*):$", capsys.readouterr().out)[1:]
    headings = {
        flag: heading
        for heading, text in zip(sections[::2], sections[1::2], strict=True)
        for flag in re.findall(r"(?m)^  (?:-\w, )?(--[\w-]+)", text)
    }
    assert set(headings) >= {option.flag for option in OPTIONS.values()}
    assert "--arrival" not in headings
    for flag, heading in {
        "--model": "Options",
        "--samples": "Options",
        "--json": "Options",
        "--timeout": "Options of a server",
        "--attn": "Options of transformers in this process",
        "--arrivals": "Options of a server and transformers in this process",
        "--dtype": "Options of transformers in this process and vLLM",
        "--pp": "Options of vLLM",
    }.items():
        assert headings[flag] == heading


def test_a_run_of_an_unknown_engine_is_not_read(tmp_path):
    document = json.loads((RUNS / "fork" / "run.json").read_text())
    for name, outcome in (
        ("vllm", nullcontext()),
        ("v", pytest.raises(UsageError, match="'v' is")),
    ):
        document["spec"] |= {"model": "m", "engine": {"name": name}}
        (tmp_path / "run.json").write_text(json.dumps(document))
        with outcome:
            assert read_run(tmp_path).spec.engine == Engine("vllm")
