"""Scoring by a model in this process, against what `generate()` and torch itself give."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.scoring.local import LocalScorer, read_tokens

PROMPT = (5, 9, 14, 20)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_scores_are_the_log_softmax_of_what_generate_computed(tiny_models, family):
    """Sliding windows shorter than the completion among them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_models[family], dtype=torch.float32
    )
    done = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    token_ids = tuple(done.sequences[0, len(PROMPT) :].tolist())
    logits = torch.stack(done.logits, 1)[0].double()
    expected = torch.log_softmax(logits, -1)[range(24), token_ids]
    for arm in ("stock", "invariant"):
        spec = replace(DEFAULTS, model=str(tiny_models[family]), dtype="fp32", arms=(arm,))
        score = LocalScorer(TransformersSampler(spec), arm).score(PROMPT, token_ids)
        np.testing.assert_allclose(score.logprobs, expected.numpy(), atol=2e-4)
        best = torch.argsort(logits, -1, descending=True)
        ranks = [best[i].tolist().index(token) + 1 for i, token in enumerate(token_ids)]
        assert score.ranks.tolist() == ranks


def test_of_equal_logits_the_lower_id_has_the_lower_rank():
    logits = torch.tensor([[2.0, 3.0, 3.0, 1.0]]).repeat(4, 1)
    logprobs, ranks = read_tokens(logits, (0, 1, 2, 3))
    assert ranks == [3, 1, 2, 4]
    assert logprobs == torch.log_softmax(logits[0], -1).tolist()


@pytest.fixture(scope="module")
def run(tiny_models, tmp_path_factory):
    """Both arms of a tiny model, recorded one token at a time."""
    from ndcheck.api import measure

    out = tmp_path_factory.mktemp("runs") / "r"
    measure(
        str(tiny_models["qwen3"]),
        loads=[1, 2],
        samples=6,
        max_tokens=40,
        axes="batch-size",
        prompt="tell me about the order of a sum",
        out=out,
    )
    return out


def test_what_the_invariant_arm_decoded_it_scores_with_the_same_bits(ndcheck_here, run):
    done = ndcheck_here("score", run, "--kernels", "invariant", "--json", "-q")
    document = json.loads(done.stdout)
    assert document["control"] == "caught"
    arms = {arm["arm"]: arm for arm in document["arms"]}
    assert arms["invariant"]["verdict"] == "PASS"
    assert arms["invariant"]["n_differ"] == arms["invariant"]["n_rank_changes"] == 0
    assert arms["invariant"]["n_tokens"] > 100
    # Other kernels are the control of it: they have other bits.
    assert arms["stock"]["verdict"] == "FAIL"
    assert done.returncode == 1
    done = ndcheck_here("score", run, "--kernels", "invariant", "--arms", "invariant", "-q")
    assert done.returncode == 0
    other = ndcheck_here("score", run, "--dtype", "fp32", "--arms", "invariant", "-q")
    assert other.returncode == 1
    assert "float32, stock kernels" in " ".join(other.stdout.split())


def test_a_recorded_bit_that_was_changed_is_found(ndcheck_here, run, tmp_path):
    at = 17
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_bytes((run / "run.json").read_bytes())
    lines = []
    for line in (run / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        bits = sample["logprob_bits"]
        place = slice(8 * at, 8 * at + 8)
        changed = f"{int(bits[place], 16) ^ 1:08x}"
        sample["logprob_bits"] = bits[: place.start] + changed + bits[place.stop :]
        lines.append(json.dumps(sample))
    (tmp_path / "r" / "samples.jsonl").write_text("\n".join(lines) + "\n")
    options = ("--kernels", "invariant", "--arms", "invariant", "--json", "-q")
    done = ndcheck_here("score", "r", *options)
    assert done.returncode == 1
    (arm,) = json.loads(done.stdout)["arms"]
    assert {c["first_difference"] for c in arm["completions"]} == {at}
    assert arm["n_differ"] == arm["n_completions"]


def test_an_id_outside_the_vocabulary_is_one_line(ndcheck_here, tiny_models, tmp_path):
    line = {"prompt_ids": [1], "completion_ids": [2**30], "logprobs": [-1.0]}
    (tmp_path / "f.jsonl").write_text(json.dumps(line))
    done = ndcheck_here("score", "f.jsonl", "--model", tiny_models["qwen3"], "-q")
    assert done.returncode == 4
    assert "outside its vocabulary" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 x", "'x' is not accepted; give a whole number"),
        ("-4", "-4"),
        ("", "holds no token ids"),
    ],
)
def test_prompt_ids_of_a_run_are_untrusted(ndcheck_here, run, tmp_path, text, words):
    (tmp_path / "r").mkdir()
    document = json.loads((run / "run.json").read_text())
    document["prompt_token_ids"] = [text]
    (tmp_path / "r" / "run.json").write_text(json.dumps(document))
    (tmp_path / "r" / "samples.jsonl").write_bytes((run / "samples.jsonl").read_bytes())
    done = ndcheck_here("score", "r", "-q")
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("attention", "someone/kernel", "if you trust this run, add --attn someone/kernel"),
        ("trust_remote_code", True, None),
    ],
)
def test_code_is_never_taken_from_a_run(
    ndcheck_here, run, tmp_path, monkeypatch, field, value, words
):
    seen = []
    monkeypatch.setattr(
        "ndcheck.samplers.local.sampler.TransformersSampler",
        lambda spec: seen.append(spec) or TransformersSampler(spec),
    )
    (tmp_path / "r").mkdir()
    document = json.loads((run / "run.json").read_text())
    document["spec"][field] = value
    (tmp_path / "r" / "run.json").write_text(json.dumps(document))
    (tmp_path / "r" / "samples.jsonl").write_bytes((run / "samples.jsonl").read_bytes())
    done = ndcheck_here("score", "r", "--arms", "invariant", "--kernels", "invariant", "-q")
    if words is None:
        assert [spec.trust_remote_code for spec in seen] == [False]
    else:
        assert (done.returncode, seen) == (2, [])
        assert words in done.stderr
