"""Everything a user can type wrong is one clear line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ndcheck import request
from ndcheck.errors import UsageError
from ndcheck.records import AXES, Decoding, Engine
from ndcheck.request import DEFAULTS
from ndcheck.samplers import options
from ndcheck.samplers.vllm.backend import OWN_OPTIONS


@pytest.mark.parametrize("text", ["0", "-1", "a", "", "1,,2", "1.5", "1,2,1", "²"])
def test_bad_batch_sizes(text):
    with pytest.raises(UsageError, match="--loads"):
        options.parse_batch_sizes(text)


def test_batch_sizes():
    assert options.parse_batch_sizes(" 1, 2,16") == (1, 2, 16)


def test_auto_batch_sizes_are_found_later():
    assert options.parse_loads("auto") == ()
    assert options.parse_loads("2,3") == (2, 3)
    assert request.make_spec(loads="auto").batch_sizes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batching": "dynamic"}, "--batching dynamic: choose from exact, continuous"),
        ({"arrivals": "together"}, "--arrivals together needs --batching continuous"),
        (
            {"batching": "continuous", "arrivals": "poisson:0"},
            "--arrivals poisson:0: give together",
        ),
        (
            {"batching": "continuous", "model": "scripted:clean"},
            "--batching: this needs a model that computes, not scripted:NAME",
        ),
        (
            {"batching": "continuous", "model": "served", "endpoint": "http://127.0.0.1:1/v1"},
            "--batching: with --endpoint this is the server's own to choose",
        ),
        (
            {"loads": "auto", "model": "served", "endpoint": "http://127.0.0.1:1/v1"},
            "--loads auto: with --endpoint the memory is the server's",
        ),
    ],
)
def test_bad_batching(options, message):
    with pytest.raises(UsageError, match=message):
        request.make_spec(**options)


def test_batching():
    spec = request.make_spec(batching="continuous", arrivals="poisson:0.5")
    assert (spec.batching, spec.arrivals) == ("continuous", "poisson:0.5")
    assert DEFAULTS.batching == "exact"


def test_axes():
    assert options.parse_axes("all") == AXES
    assert options.parse_axes("cache,slot") == ("slot", "cache")
    with pytest.raises(UsageError, match="'speed' is unknown; choose from run-to-run"):
        options.parse_axes("slot,speed")


def test_arms_and_mode():
    assert options.parse_arms("invariant,stock") == ("stock", "invariant")
    assert request.make_spec().arms == ("stock", "invariant")
    assert request.make_spec(model="scripted:fork").arms == ("stock",)
    assert request.make_spec(model="scripted:fork", kernels=["invariant"]).arms == ("invariant",)
    served = {"model": "served", "endpoint": "http://host/v1"}
    assert request.make_spec(**served).arms == ("stock",)
    assert request.make_spec(**served, kernels="stock").arms == ("stock",)
    with pytest.raises(UsageError, match="--kernels stock,invariant: with --endpoint"):
        request.make_spec(**served, kernels="stock,invariant")
    assert request.make_spec(mode="mixed").mode == "mixed"
    with pytest.raises(UsageError, match="choose from copies, mixed"):
        request.make_spec(mode="both")


@pytest.mark.parametrize(
    ("backend", "recorded", "shown"),
    [
        ({"batching": "continuous"}, "poisson:0.5", "poisson:0.5/step"),
        ({"model": "m", "endpoint": "http://host/v1"}, "bursts:2:3", "bursts:2:3s"),
    ],
)
def test_arrivals_go_by_the_clock_of_the_backend(backend, recorded, shown):
    spec = request.make_spec(**backend, arrivals=shown)
    assert (spec.endpoint.arrival if spec.endpoint else spec.arrivals) == recorded
    assert not spec.sets_batch_size
    assert request.make_spec(**backend, arrivals=recorded) == spec
    assert request.make_spec(**backend, arrival=shown) == spec
    with pytest.raises(UsageError, match="--arrival is the old name of --arrivals"):
        request.make_spec(**backend, arrivals=shown, arrival="closed")


def test_probes_from_options_and_files(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo \u202e\n", encoding="utf-8")
    probes = request.make_probes(["zero"], text)
    assert [(p.probe_id, p.prompt) for p in probes] == [
        ("p1", "zero"),
        ("p2", "one"),
        ("p3", "two \u202e"),
    ]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"a"\n{"id": "x", "prompt": "b\\nc"}\n')
    probes = request.make_probes([], lines)
    assert [(p.probe_id, p.prompt) for p in probes] == [("p1", "a"), ("x", "b\nc")]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([""], "prompt p1 is empty"), (["a", " \n"], "prompt p2 is empty"), (["\udcff"], "UTF-8")],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(UsageError, match=message):
        request.make_probes(prompts, None)


@pytest.mark.parametrize("empty", [[], (), iter(()), {}])
def test_no_other_prompt_takes_the_place_of_none(tmp_path, empty):
    """A list that a filter emptied would pass as the default prompt does."""
    with pytest.raises(UsageError, match="--prompt: the list is empty"):
        request.make_spec(model="scripted:clean", prompt=empty)
    file = tmp_path / "prompts.txt"
    file.write_text("one\n")
    (probe,) = request.make_spec(model="scripted:clean", prompt=[], prompts_file=file).probes
    assert probe.prompt == "one"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\xff\xfe", "line 1: it is no UTF-8"),
        (b"{broken", "line 1"),
        (b'{"text": "a"}', "line 1: give a string"),
        (b'{"id":"a","prompt":"x"}\n{"id":"a","prompt":"y"}', "same id"),
    ],
)
def test_bad_prompt_files(tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        request.make_probes([], file)


def test_conversations_are_chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert request.make_spec(model="m", prompts_file=file).chat
    # Beside a conversation a text may be meant as it is, or as a message.
    with pytest.raises(UsageError, match="add --chat"):
        request.make_spec(model="m", prompt="hi", prompts_file=file)
    assert len(request.make_spec(model="m", prompt="hi", prompts_file=file, chat=True).probes) == 2


def test_missing_prompts_file(tmp_path):
    with pytest.raises(UsageError, match="--prompts-file"):
        request.make_probes([], tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"n_samples": 0}, "--samples 0"),
        ({"decoding": Decoding(0)}, "--max-tokens 0"),
        ({"decoding": Decoding(1, temperature=-1.0)}, "--temperature"),
        ({"decoding": Decoding(1, temperature=float("nan"))}, "--temperature"),
        ({"seed": -1}, "--seed"),
        ({"target_rate": 0.0}, "--target-rate"),
        ({"confidence": 1.0}, "--confidence"),
        ({"answer_pattern": "("}, "--answer-pattern"),
    ],
)
def test_numbers_out_of_range(changed, option):
    with pytest.raises(UsageError, match=option):
        request.check(replace(DEFAULTS, **changed))


def test_engine_options():
    given = ["max-model-len = 4096", "--kv_cache_dtype=fp8"]
    spec = request.make_spec(model="m", engine="vllm", tp=2, engine_arg=given)
    assert spec.engine == Engine("vllm", 2, 1, ("max_model_len=4096", "kv_cache_dtype=fp8"))
    assert request.make_spec(model="m").engine is None
    for key, instead in OWN_OPTIONS.items():
        with pytest.raises(UsageError, match=f"{key}: give {instead} instead"):
            request.make_spec(model="m", engine="vllm", engine_arg=f"{key}=1")
    for secret in ("hf_token=x9Q", "s3_secret_key=x9Q", "model_loader_extra_config=hf_x9Q"):
        with pytest.raises(UsageError, match="give secrets in the environment") as caught:
            request.make_spec(model="m", engine="vllm", engine_arg=secret)
        assert "x9Q" not in str(caught.value)


def test_defaults_are_in_range():
    assert request.check(DEFAULTS) is None
