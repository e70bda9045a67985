"""A model's files are input: what is wrong with one is one line that names it, never a crash.

What is measured is what is stored: a tensor that would be filled at random is refused.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ndcheck.errors import NdcheckError, TrialError, UsageError
from ndcheck.records import Decoding, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.base import open_sampler

PROBE = Probe("p1", "tell me about the order of a sum")
SPEC = replace(DEFAULTS, probes=(PROBE,), decoding=Decoding(3), arms=("stock",), device="cpu")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def model(tiny_models, tmp_path):
    """A directory of its own to break."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in tiny_models["qwen3"].iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    edit(directory, "tokenizer_config.json", chat_template=TEMPLATE)
    return directory


def edit(directory, name, **changed):
    document = json.loads((directory / name).read_text())
    for key, value in changed.items():
        document[key] = value
        if value is ...:
            del document[key]
    (directory / name).write_text(json.dumps(document))


def use(directory, **changed):
    """Load, and take three tokens: what a run does at first."""
    sampler = open_sampler(replace(SPEC, model=str(directory), **changed))
    if sampler.count_tokens(PROBE.prompt):
        sampler.sample(Trial(0, "stock", "p1", "slot", Load(1), 0), PROBE, SPEC.decoding)
    sampler.describe()


def refusal(directory, **changed):
    with pytest.raises(UsageError) as caught:
        use(directory, **changed)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    return str(caught.value)


def test_the_unbroken_model_is_used(model):
    use(model)
    use(model, chat=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 layers: at most 1024"),
        ({"layer_types": ["full_attention"] * 2000}, "layer_types is 2000 layers: at most 1024"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000: at most"),
        ({"vocab_size": 10**9}, "weights, and the safetensors files hold"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: it must be at least 1"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1: it must be at least 1"),
        ({"hidden_size": "64"}, "hidden_size is '64': it must be a whole number"),
        ({"vocab_size": True}, "vocab_size is True: it must be a whole number"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings is 1.5"),
        ({"rope_parameters": "fast"}, "config.json"),
        ({"hidden_act": "no such thing"}, "config.json"),
        ({"model_type": "nothing known"}, "config.json"),
        ({"architectures": 5}, "config.json"),
        (
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            "Qwen3ForCausalLM has no place for 11 tensors of the checkpoint (model.layers.1.",
        ),
        (
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
            "11 of Qwen3ForCausalLM's tensors are missing from the checkpoint",
        ),
        ({"intermediate_size": 127}, "tensors have another shape in the checkpoint"),
        ({"head_dim": 32}, "tensors have another shape in the checkpoint"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "LlamaForCausalLM has no place for 4 tensors of the checkpoint",
        ),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "names Qwen3ForSequenceClass"),
        ({"architectures": ["BertForMaskedLM"]}, "config.json names BertForMaskedLM, which is no"),
        ({"architectures": ["X"], "is_encoder_decoder": True}, "X is an encoder and a decoder"),
    ],
)
def test_a_config_that_is_not_the_stored_model_s(model, changed, said):
    edit(model, "config.json", **changed)
    assert said in refusal(model)


@pytest.mark.parametrize("quantised", [{"quant_method": "torchao"}, {}, 5])
def test_quantised_weights_that_cannot_be_read(model, quantised):
    edit(model, "config.json", quantization_config=quantised)
    refusal(model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_what_may_not_be_read(model, name):
    (model / name).chmod(0)
    try:
        assert "Permission denied" in refusal(model)
    finally:
        (model / name).chmod(0o755)


def test_what_a_config_claims_is_not_allocated(model):
    """For random weights too: what was reserved at most stays below what is free here."""
    edit(model, "config.json", vocab_size=10**9, hidden_size=4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "describes a model of 15," in refusal(model, random_weights=0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


WEIGHTS = "model.safetensors"


def spoil(directory, name, change):
    file = directory / name
    file.write_bytes(change(file.read_bytes()))


def with_head(change):
    """The file with another head, whose length fits it."""

    def rewrite(content):
        n = struct.unpack("<Q", content[:8])[0]
        head = json.loads(content[8 : 8 + n])
        change(head)
        encoded = json.dumps(head).encode()
        return struct.pack("<Q", len(encoded)) + encoded + content[8 + n :]

    return rewrite


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: os.urandom(1000),
        lambda content: struct.pack("<Q", 2**63) + content[8:],
        with_head(lambda head: head[NORM].update(shape=[10**9, 10**9])),
        with_head(lambda head: head[NORM].update(shape=[-1])),
        with_head(lambda head: head[NORM].update(dtype="F1")),
        with_head(lambda head: head[NORM].update(data_offsets=[0, 10**15])),
        with_head(lambda head: head.update({NORM: "x"})),
    ],
)
def test_broken_safetensors(model, change):
    spoil(model, WEIGHTS, change)
    assert f"{WEIGHTS}: " in refusal(model)


def test_a_tensor_that_is_missing_is_not_drawn(model):
    """Filled at random it gives another model every time."""
    tensors = load_file(model / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    said = refusal(model)
    assert "1 of Qwen3ForCausalLM's tensors are missing from the checkpoint" in said
    assert "model.layers.1.mlp.up_proj.weight" in said
    use(model, random_weights=0)


def test_tied_weights_and_old_buffers_are_no_fault(model):
    tensors = load_file(model / WEIGHTS)
    tensors.pop("lm_head.weight")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    edit(model, "config.json", tie_word_embeddings=True)
    use(model)


def shard(directory):
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    places = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        part = {name: tensors[name] for name in names if places[name] == place}
        save_file(part, directory / place, metadata={"format": "pt"})
    return places


def write_index(directory, places):
    document = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))


def test_shards(model, tmp_path):
    places = shard(model)
    write_index(model, places)
    use(model)
    outside = tmp_path / "outside.safetensors"
    (model / "model-1-of-2.safetensors").rename(outside)
    assert "model-1-of-2.safetensors: No such file or directory" in refusal(model)
    (model / "model-1-of-2.safetensors").write_bytes(outside.read_bytes())
    for where in ("../outside.safetensors", str(outside), "", 5, None):
        write_index(model, {**places, NORM: where})
        assert "which is no file of this directory" in refusal(model)
    for broken in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 1}', "[" * 99_999):
        (model / "model.safetensors.index.json").write_text(broken)
        assert "model.safetensors.index.json: " in refusal(model)
    (model / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(model)


def test_an_index_that_names_what_no_shard_holds(model):
    places = shard(model)
    write_index(model, {**places, NORM: next(p for p in places.values() if p != places[NORM])})
    assert f"puts {NORM} into" in refusal(model)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS]
)
@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling", "empty"])
def test_what_is_no_file(model, name, kind):
    file = model / name
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "dangling":
        file.symlink_to(model / "nowhere")
    else:
        file.touch()
    said = refusal(model)
    assert name in said or kind == "dangling"


def test_an_adapter_is_another_model(model):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    assert "holds no adapter_model.safetensors" in refusal(model)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system prompt') }}", "raises TemplateError: no system prompt"),
        ("{{ 1 / 0 }}", "raises ZeroDivisionError"),
        ("{% if %}", "raises TemplateSyntaxError"),
        ("{{ messages.x.y }}", "raises UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "raises RecursionError"),
        ("{{ 'a' * 100000000000 }}", "it took more than 8 GiB"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "it took more than 2 s and was stopped",
        ),
    ],
)
def test_a_chat_template_that_fails_or_never_ends(model, template, said):
    edit(model, "tokenizer_config.json", chat_template=template)
    message = refusal(model, chat=True)
    assert message.startswith("--chat: the chat template of")
    assert said in message
    use(model)


def test_a_tokenizer_of_another_model(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: i + 500 * (i > 5) for token, i in vocabulary.items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "they are not of one model" in refusal(model)


def test_stop_tokens_that_are_none(model):
    edit(model, "generation_config.json", eos_token_id=["x"])
    assert "generation_config.json" in refusal(model)


def test_bert_is_not_measured_as_a_decoder(tmp_path):
    """Its own class for it decodes, but every token sees those after it."""
    config = transformers.BertConfig(
        vocab_size=8000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    config.save_pretrained(tmp_path)
    said = refusal_of(tmp_path)
    assert "BertLMHeadModel lets a token see those after it" in said
    transformers.T5Config(vocab_size=8000).save_pretrained(tmp_path)
    assert "T5Config is an encoder and a decoder" in refusal_of(tmp_path)


def refusal_of(directory):
    with pytest.raises(UsageError) as caught:
        use(directory, random_weights=0)
    return str(caught.value)


ODD = [0, -1, 1, 3, 10**9, 10**12, 2**63, 1.5, float("nan"), True, None, "", "x", "64", [], {}, [1]]


def mutate_json(content, rng):
    document = json.loads(content)
    node = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(ODD)
        return json.dumps(document).encode()


def mutate_bytes(content, rng):
    start, length = rng.randrange(len(content)), rng.choice([1, 3, 50])
    return rng.choice(
        [
            content[:start],
            content[:start] + content[start + length :],
            content[:start] + rng.randbytes(length) + content[start + length :],
            content + rng.randbytes(length),
            rng.randbytes(200),
        ]
    )


def mutate_head(content, rng):
    def change(head):
        name = rng.choice([name for name in head if name != "__metadata__"])
        field = rng.choice(["shape", "dtype", "data_offsets"])
        head[name][field] = rng.choice([*ODD, "F32", [64, 64], [0, 10]])

    return with_head(change)(content)


MUTATIONS = {
    "config.json": (mutate_json, mutate_json, mutate_bytes),
    "generation_config.json": (mutate_json, mutate_bytes),
    "tokenizer.json": (mutate_json, mutate_bytes),
    "tokenizer_config.json": (mutate_json, mutate_bytes),
    WEIGHTS: (mutate_head, mutate_bytes),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_files_are_used_or_refused_in_one_line(model, name):
    """Seeded; NDCHECK_MUTATIONS makes it longer."""
    original = (model / name).read_bytes()
    for seed in range(int(os.environ.get("NDCHECK_MUTATIONS", "12"))):
        rng = random.Random(f"{name}/{seed}")
        (model / name).write_bytes(rng.choice(MUTATIONS[name])(original, rng))
        try:
            use(model)
        except TrialError as error:  # Kept as samples with their error.
            assert "NaN" in str(error), seed  # noqa: PT017
        except NdcheckError as error:
            assert error.exit_code == 2, (seed, error)  # noqa: PT017
            assert "\n" not in str(error), seed  # noqa: PT017
