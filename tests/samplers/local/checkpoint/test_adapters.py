"""An adapter is what peft makes of it: the right values are its own, and those of generate()."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ndcheck.errors import UsageError
from ndcheck.records import Decoding, Engine, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.base import open_sampler

peft = pytest.importorskip("peft")
# Between peft and transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROBE = Probe("p1", "tell me about the order of a sum")
SPEC = replace(
    DEFAULTS, probes=(PROBE,), decoding=Decoding(8), arms=("stock",), device="cpu", dtype="fp32"
)
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make(base, directory, config):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".base_layer." not in name and any(kind in name for kind in ("lora_", "hada_", "lokr_")):
            torch.nn.init.normal_(parameter, std=0.3)
        elif ".ia3_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    adapted.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tiny_models):
    return tiny_models["llama"]


@pytest.fixture
def lora(base, tmp_path):
    return make(base, tmp_path / "lora", peft.LoraConfig(r=4, target_modules=TARGETS))


def edit(directory, **changed):
    document = json.loads((directory / CONFIG).read_text()) | changed
    (directory / CONFIG).write_text(json.dumps(document))


def sample(model, adapter=None):
    spec = replace(SPEC, model=str(model), adapter=None if adapter is None else str(adapter))
    sampler = open_sampler(spec)
    trial = Trial(0, "stock", "p1", "slot", Load(1), 0)
    (found,) = sampler.sample(trial, PROBE, SPEC.decoding)
    return found.token_ids, sampler


KINDS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=8, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "ranks": lambda: peft.LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, target_modules=TARGETS
    ),
    "a module of its own": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, modules_to_save=["lm_head"]
    ),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sampled_is_what_peft_generates(base, tmp_path, kind):
    adapter = make(base, tmp_path / "adapter", KINDS[kind]())
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(plain, adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    prompt = torch.tensor([tokenizer(PROBE.prompt)["input_ids"]])
    expected = unmerged.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
    )
    token_ids, sampler = sample(base, adapter)
    assert list(token_ids) == expected[0, prompt.shape[1] :].tolist()
    merged = unmerged.merge_and_unload().state_dict()
    assert all(torch.equal(merged[n], p) for n, p in sampler.model.state_dict().items())
    # The control: without it the model is another.
    alone, without = sample(base)
    assert alone != token_ids
    assert without.describe()["digest"] != sampler.describe()["digest"]


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_that_shares_its_weights_keeps_what_is_not_its_own(base, tmp_path, target):
    tied = tmp_path / "tied"
    config = transformers.AutoConfig.from_pretrained(base, tie_word_embeddings=True)
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tied)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tied / name)
    adapter = make(tied, tmp_path / "a", peft.LoraConfig(r=4, target_modules=[*TARGETS, target]))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(plain, adapter).eval()
    _, sampler = sample(tied, adapter)
    ids = torch.tensor([[5, 17, 33]])
    with torch.no_grad():
        expected, found = unmerged(ids).logits, sampler.model(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # The control: peft's own merge changes both.
        assert not torch.allclose(unmerged.merge_and_unload()(ids).logits, expected, atol=1e-2)


def test_a_directory_names_its_base(base, lora):
    given, sampler = sample(base, lora)
    alone, itself = sample(lora)
    assert given == alone
    assert sampler.describe()["digest"] == itself.describe()["digest"]
    assert itself.describe()["base"] == str(base)
    assert itself.describe()["adapter"] == str(lora)


def test_its_own_tokenizer_is_used(base, lora):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, lora / name)
    document = json.loads((lora / "tokenizer_config.json").read_text())
    document["chat_template"] = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (lora / "tokenizer_config.json").write_text(json.dumps(document))
    spec = replace(SPEC, model=str(lora), chat=True)
    rendered = open_sampler(spec, load_weights=False).render("sum")
    assert rendered is not None
    assert rendered.text == "[sum]"


def test_a_pickled_adapter_is_never_read(base, lora):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was read",))

    (lora / WEIGHTS).unlink()
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    for model, adapter in ((lora, None), (base, lora)):
        with pytest.raises(UsageError, match=r"adapter_model\.safetensors.*could run code"):
            sample(model, adapter)


FAULTS = {
    "a prompt": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    "no kind": ({"peft_type": ["LORA"]}, "cannot be merged"),
    "another package": ({"megatron_config": {"a": 1}}, "megatron_config is not accepted"),
    "other layers": ({"layer_replication": [[0, 9], [0, 9]]}, "layer_replication"),
    "some tokens": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "another base": ({"init_lora_weights": "pissa"}, "pissa"),
    "a list": ({"init_lora_weights": []}, "init_lora_weights"),
    "no rank": ({"r": 0}, "r is 0"),
    "a huge rank": ({"r": 10**12}, "r is 1000000000000"),
    "a huge rank of one": ({"rank_pattern": {"q_proj": 10**12}}, "q_proj is 1000000000000"),
    "ranks": ({"rank_pattern": [1]}, "rank_pattern"),
    "a rank of others": ({"r": 8}, "size mismatch"),
    "targets": ({"target_modules": ["q_proj"]}, "no place for"),
    "more targets": ({"target_modules": [*TARGETS, "o_proj"]}, "lacks 4 of its tensors"),
    "none": ({"target_modules": ["nothing"]}, "not found in the base model"),
    "a later way": ({"use_something_new": True}, "does not know use_something_new"),
    "a later setting": ({"scales_by": "layer"}, "does not know scales_by"),
    "an expression": ({"target_modules": "(" * 50}, "error"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_adapter_is_one_line(base, lora, name):
    changed, reason = FAULTS[name]
    edit(lora, **changed)
    with pytest.raises(UsageError, match=reason) as caught:
        sample(base, lora)
    assert str(caught.value).startswith(f"--adapter {lora}: ")
    assert "\n" not in str(caught.value)


def test_settings_of_later_versions_that_are_off_do_no_harm(base, lora):
    edit(lora, use_something_new=False, something_size=16, something_config=None, peft_version="9")
    assert sample(base, lora)


def test_its_tensors_are_all_there_and_numbers(base, lora):
    tensors = load_file(lora / WEIGHTS)
    first = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != first}, lora / WEIGHTS)
    with pytest.raises(UsageError, match=f"lacks 1 of its tensors .{first}"):
        sample(base, lora)
    save_file({**tensors, first: tensors[first] * float("nan")}, lora / WEIGHTS)
    with pytest.raises(UsageError, match="NaN"):
        sample(base, lora)
    (lora / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes()[:100])
    with pytest.raises(UsageError, match=WEIGHTS):
        sample(base, lora)


def test_a_base_that_is_not_here_is_named(lora, tmp_path):
    for named in ("/gone/away", "../../gone", None, "", "a/b/c", 7):
        edit(lora, base_model_name_or_path=named)
        with pytest.raises(UsageError, match="give that as --model, and --adapter"):
            sample(lora)
    edit(lora, base_model_name_or_path=str(lora))
    with pytest.raises(UsageError, match="no model of its own"):
        sample(lora)


def test_what_an_adapter_cannot_be_used_with(base, lora, monkeypatch):
    for changed, reason in (
        ({"trust_remote_code": True}, "chose its base"),
        ({"random_weights": 0}, "needs the weights of its base"),
        ({"tensor_parallel": 2}, "processes share safetensors only"),
        ({"engine": Engine()}, "serve the GGUF file or the adapter"),
    ):
        with pytest.raises(UsageError, match=reason):
            open_sampler(replace(SPEC, model=str(lora), **changed))
    with pytest.raises(UsageError, match="it is no directory"):
        sample(base, lora / CONFIG)
    with pytest.raises(UsageError, match=f"holds no {CONFIG}"):
        sample(base, base)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ndcheck\[peft\]'"):
        sample(base, lora)
