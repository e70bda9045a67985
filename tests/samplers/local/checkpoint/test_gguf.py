"""A GGUF file is the tensors that were written into it, as the gguf package dequantises them."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndcheck.errors import UsageError
from ndcheck.records import Decoding, Engine, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.base import open_sampler
from ndcheck.samplers.local.checkpoint import smollm2
from ndcheck.samplers.local.checkpoint.gguf_file import read_gguf_head

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

PROBE = Probe("p1", "tell me about the order of a sum")
SPEC = replace(DEFAULTS, probes=(PROBE,), decoding=Decoding(8), arms=("stock",), device="cpu")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(directory, model, tokenizer, kind="F32"):
    """The model in a GGUF file, and its tensors as the file holds them."""
    config, file = model.config, directory / f"tiny.{kind}.gguf"
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    stored = {}
    for name, tensor in model.state_dict().items():
        place = OUTSIDE.get(name)
        if place is None:
            _, _, layer, rest = name.split(".", 3)
            place = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        values = tensor.float().numpy()
        of = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = gguf.quantize(values, of)
        writer.add_tensor(place, data, raw_dtype=of)
        stored[name] = torch.from_numpy(np.array(gguf.dequantize(data, of), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, stored


@pytest.fixture(scope="module")
def qwen(tiny_models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models["qwen3"])
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny_models["qwen3"])
    config.head_dim = 128  # transformers reads no other from such a file.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def whole(qwen, tmp_path_factory):
    """One file, to be cut and changed."""
    file, _ = write(tmp_path_factory.mktemp("gguf"), *qwen)
    return file.read_bytes()


def sample(model, **changed):
    spec = replace(SPEC, model=str(model), **changed)
    sampler = open_sampler(spec)
    (found,) = sampler.sample(Trial(0, "stock", "p1", "slot", Load(1), 0), PROBE, SPEC.decoding)
    return found.token_ids, sampler


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("Q8_0", torch.bfloat16)]
)
def test_what_is_sampled_is_what_is_stored(qwen, tmp_path, kind, dtype):
    model, tokenizer = qwen
    file, stored = write(tmp_path, model, tokenizer, kind)
    token_ids, sampler = sample(file, dtype="fp32")
    loaded = sampler.model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())

    reference = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    reference.load_state_dict(stored)
    prompt = torch.tensor([tokenizer(PROBE.prompt)["input_ids"]])
    expected = reference.eval().generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
    )
    assert list(token_ids) == expected[0, prompt.shape[1] :].tolist()
    # As stored; and a directory with nothing else in it is its file.
    again, as_stored = sample(tmp_path)
    assert as_stored.model.dtype == dtype
    assert len(again) == 8


def test_its_chat_template_is_used(whole, tmp_path):
    (tmp_path / "a.gguf").write_bytes(whole)
    spec = replace(SPEC, model=str(tmp_path / "a.gguf"), chat=True)
    rendered = open_sampler(spec, load_weights=False).render("sum")
    assert rendered is not None
    assert rendered.text == "[sum]"


def test_the_head_counts_what_is_stored(qwen, whole, tmp_path):
    (tmp_path / "a.gguf").write_bytes(whole)
    head = read_gguf_head(tmp_path / "a.gguf")
    tensors = qwen[0].state_dict().values()
    assert head.n_tensors == len(tensors)
    assert head.n_elements == sum(tensor.numel() for tensor in tensors)
    assert head.dtype == "fp32"


def refusal(file):
    with pytest.raises(UsageError) as caught:
        open_sampler(replace(SPEC, model=str(file)), load_weights=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def head(*values, n_tensors=0, version=3, n_values=None):
    texts = (struct.pack("<Q", len(k)) + k.encode() + value for k, value in values)
    n_values = len(values) if n_values is None else n_values
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + b"".join(texts)


def u32(value):
    return struct.pack("<II", 4, value)


def tensor(n_elements, kind, offset=0):
    return struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, n_elements, kind, offset)


BROKEN = {
    "empty": (b"", "it is empty"),
    "not one": (b"PK\x03\x04" * 9, "does not begin with GGUF"),
    "version": (head(version=1), "version 1"),
    "big end": (head(version=3 << 24), "version"),
    "many values": (head(n_values=2**63), "cut short"),
    "many tensors": (head(n_tensors=2**63), "cut short"),
    "a long text": (head(("a", struct.pack("<IQ", 8, 2**63))), "cut short"),
    "a long list": (head(("a", struct.pack("<IIQ", 9, 4, 2**63))), "cut short"),
    "a list of texts": (head(("a", struct.pack("<IIQ", 9, 8, 2**63))), "cut short"),
    "a list of empty lists": (head(("a", struct.pack("<IIQ", 9, 9, 2**63))), "cut short"),
    "lists in lists": (head(("a", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9)), "kind 9"),
    "a kind": (head(("a", struct.pack("<I", 99))), "kind 99"),
    "layers": (head(("llama.block_count", u32(10**6))), "at most 1024"),
    "parts": (head(("split.count", u32(3))), "llama-gguf-split --merge"),
    "alignment": (head(("general.alignment", u32(0))), "general.alignment"),
    "no tensors": (head(), "holds no tensors"),
    "a name": (head(n_tensors=1) + struct.pack("<Q", 1) + b"\xff", "utf-8"),
    "a type": (head(n_tensors=1) + tensor(1, 999), "type 999"),
    "beyond": (head(n_tensors=1) + tensor(2**40, 0), "end beyond its end"),
    "far away": (head(n_tensors=1) + tensor(1, 0, 2**60), "end beyond its end"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, name):
    content, reason = BROKEN[name]
    (tmp_path / "a.gguf").write_bytes(content)
    for model in (tmp_path / "a.gguf", tmp_path):
        said = refusal(model)
        assert reason in said
        assert "a.gguf" in said


@given(st.data())
@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_changed_head_is_read_or_refused(whole, tmp_path, data):
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        at = data.draw(st.integers(0, min(len(content), 8000) - 1))
        content[at] = data.draw(st.integers(0, 255))
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    try:
        found = read_gguf_head(file)
    except UsageError:
        return
    # Nothing is there that the file does not hold.
    assert found.n_elements <= 8 * len(content)


def test_a_file_that_is_cut_short_is_refused(whole, tmp_path):
    for n in (len(whole) - 1, len(whole) // 2, 100):
        (tmp_path / "a.gguf").write_bytes(whole[:n])
        assert "cut short" in refusal(tmp_path / "a.gguf")


def test_what_a_file_cannot_be_used_with(whole, tmp_path, monkeypatch):
    file = tmp_path / "a.gguf"
    assert "none.gguf: No such file" in refusal(tmp_path / "none.gguf")
    file.write_bytes(whole)
    for changed, reason in (
        ({"tensor_parallel": 2}, "processes share safetensors only"),
        ({"engine": Engine()}, "serve the GGUF file or the adapter"),
    ):
        with pytest.raises(UsageError, match=reason):
            open_sampler(replace(SPEC, model=str(file), **changed))
    # As Ollama names them.
    blob = tmp_path / "sha256-0a1b"
    blob.symlink_to(file)
    assert "it is a file: " in refusal(blob)
    assert "ends in .gguf" in refusal(blob)
    (tmp_path / "b.gguf").write_bytes(whole)
    assert "several GGUF files (a.gguf, b.gguf): give one" in refusal(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs gguf: pip install 'ndcheck[gguf]'" in refusal(file)


def test_smollm2_is_converted_from_such_a_file(whole, tmp_path, monkeypatch):
    (tmp_path / smollm2.FILE).write_bytes(whole)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(smollm2, "_find_file", lambda: tmp_path / smollm2.FILE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    smollm2.find_model.cache_clear()
    try:
        tokens, sampler = sample(smollm2.NAME)
    finally:
        smollm2.find_model.cache_clear()
    assert sampler.describe()["name"] == "smollm2"
    same, direct = sample(tmp_path / smollm2.FILE, dtype="bf16")
    assert tokens == same
    assert sampler.describe()["digest"] == direct.describe()["digest"]
