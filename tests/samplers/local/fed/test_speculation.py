"""Speculative decoding in process: plain decoding's completion, and the lengths it must accept."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers

import ndcheck
from ndcheck.cli.app import run_command_line
from ndcheck.errors import UsageError
from ndcheck.explain.failing import find_failure
from ndcheck.findings import read_findings
from ndcheck.judging.verdict import probe_doubts
from ndcheck.records import ALONE, Decoding, Drafted, Fault, Load, Probe, Trial
from ndcheck.reports.document import make_document
from ndcheck.reports.exports.tables import properties_table, sample_tables
from ndcheck.request import DEFAULTS, make_spec
from ndcheck.runner import fit_spec
from ndcheck.samplers.local.decoding import draft, steps
from ndcheck.samplers.local.decoding.selection import read_pass
from ndcheck.samplers.local.sampler import TransformersSampler

PROBE = Probe("p1", "tell me about the order of a sum")
N_TOKENS = 18
GREEDY = Decoding(N_TOKENS)
SPEC = replace(
    DEFAULTS,
    probes=(PROBE,),
    decoding=GREEDY,
    batch_sizes=(1, 2),
    axes=("width",),
    n_samples=52,
    arms=("invariant",),
    dtype="fp32",
    draft="layers:1",
)
MIXED = Load(3, (1,), (5, 40), 7)


@pytest.fixture(scope="module")
def open_sampler(tiny_models):
    """A sampler of the tiny model for each draft: of all its layers, of one, or another model."""
    samplers = {}

    def open_one(name):
        if name not in samplers:
            spec = replace(SPEC, model=str(tiny_models["qwen3"]), draft=name)
            samplers[name] = TransformersSampler(spec)
        return samplers[name]

    return open_one


def untimed(sample):
    """A sample without its time, and without how many ops had an override."""
    return replace(sample, elapsed_s=0, witness=replace(sample.witness, override_fires=None))


@pytest.fixture(params=["layers:1", "layers:2", "llama"])
def sampler(request, open_sampler, tiny_models):
    name = request.param
    return open_sampler(name if ":" in name else str(tiny_models[name]))


def sample(sampler, load, arm="invariant", fault=None):
    return sampler.sample(Trial(0, arm, "p1", "width", load, 0, fault=fault), PROBE, GREEDY)


@pytest.fixture(scope="module")
def sample_once():
    """`sample`, once for each sampler and load."""
    return functools.cache(sample)


def accepted_lengths(proposes, prompt, completion, width):
    """What greedy speculative decoding accepts, by models that read the whole text for each token.

    Leviathan, Kalman and Matias 2023, where a draft's token is accepted if it is the target's.
    """
    n_done, lengths = 1, []
    while n_done < len(completion):
        n_proposed = min(width, N_TOKENS - n_done) - 1
        ids = [*prompt, *completion[:n_done]]
        for _ in range(n_proposed):
            ids.append(int(proposes(torch.tensor([ids])).logits[0, -1].argmax()))
        proposed = ids[len(prompt) + n_done :]
        pairs = [a == b for a, b in zip(proposed, completion[n_done:], strict=False)]
        n_accepted = pairs.index(False) if False in pairs else len(pairs)
        lengths.append(n_accepted)
        n_done += 1 + n_accepted
    return lengths


def load_draft(name, tiny_models):
    """The same draft by transformers alone: early exit is a model of fewer layers."""
    source = str(tiny_models["qwen3"]) if "layers:" in name else name
    config = transformers.AutoConfig.from_pretrained(source)
    if name == "layers:1":
        config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("width", [2, 4, 16])
@pytest.mark.parametrize("name", ["layers:1", "layers:2", "llama"])
def test_a_draft_has_as_many_tokens_accepted_as_it_must(name, width, open_sampler, tiny_models):
    name = name if ":" in name else str(tiny_models[name])
    sampler, proposes = open_sampler(name), load_draft(name, tiny_models)
    (decoded,) = sample(sampler, ALONE)
    (found,) = sample(sampler, Load(1, width=width, drafts=True))
    with torch.inference_mode():
        lengths = accepted_lengths(proposes, sampler.encode(PROBE.prompt), decoded.token_ids, width)
    assert list(found.drafted.accepted)[: len(lengths)] == lengths
    if name == "layers:2":
        assert found.drafted.accepted == found.drafted.proposed


@pytest.mark.parametrize("base", [ALONE, Load(3, (0, 1, 2)), MIXED])
@pytest.mark.parametrize("width", [2, 5, 16])
def test_the_invariant_arm_gives_the_bits_of_plain_decoding(sampler, base, width, sample_once):
    decoded = sample_once(sampler, base)
    found = sample(sampler, replace(base, width=width, drafts=True))
    for ours, theirs in zip(found, decoded, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.row_digests == theirs.row_digests
        assert ours.logprobs == theirs.logprobs
        assert (ours.fed, theirs.drafted) == (None, None)


def test_a_pass_verified_at_once_gives_what_its_positions_give(sampler, monkeypatch):
    load, n_read = replace(MIXED, width=4, drafts=True), []
    trial = Trial(0, "invariant", "p1", "width", load, 0)

    def speculate(self, *arguments):
        self._reads_passes = True  # As on a GPU.
        return own(self, *arguments)

    def read(logits, *rest):
        n_read.append(logits.shape[1])
        return read_pass(logits, *rest)

    (one,) = sampler.sample(trial, PROBE, GREEDY)
    own = steps.DecodeSteps.speculate
    monkeypatch.setattr(steps.DecodeSteps, "speculate", speculate)
    monkeypatch.setattr(steps, "read_pass", read)
    (other,) = sampler.sample(trial, PROBE, GREEDY)
    assert max(n_read) == 4
    assert untimed(one) == untimed(other)


def test_passes_have_the_columns_asked_for_and_no_more_than_are_left(open_sampler):
    sampler = open_sampler("layers:2")
    seen: list[int] = []

    def note(module, args, kwargs):
        seen.append(kwargs["input_ids"].shape[1])

    hook = sampler.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        (found,) = sample(sampler, Load(1, width=5, drafts=True))
    finally:
        hook.remove()
    # A draft of all layers runs the same hook, a token at a time.
    assert [n for n in seen if n > 1][-4:] == [5, 5, 5, 2]
    assert found.drafted == Drafted((4, 4, 4, 1), (4, 4, 4, 1))


def test_a_planted_fault_shows_where_it_is(open_sampler):
    load = Load(1, width=4, drafts=True)
    (clean,), (planted,) = (
        sample(open_sampler("layers:1"), load, fault=fault) for fault in (None, Fault(4, 9))
    )
    assert clean.token_ids[:9] == planted.token_ids[:9]
    assert clean.token_ids[9] != planted.token_ids[9]
    differs = [a != b for a, b in zip(clean.row_digests, planted.row_digests, strict=False)]
    assert [at for at, is_other in enumerate(differs[:10]) if is_other] == [4, 9]


def width(probe):
    return next(finding for finding in probe.axes if finding.axis == "width")


@pytest.fixture
def turn_last(wide):
    """In passes of ``least`` columns or more, the last column's logits are turned round."""

    def spoil(sampler, least):
        def turn(logits, n_columns):
            if not least <= n_columns <= 16:
                return logits
            return torch.cat((logits[:, :-1], -logits[:, -1:]), dim=1)

        wide(sampler, turn)

    return spoil


@pytest.fixture(scope="module")
def clean_run(open_sampler, measure, tmp_path_factory):
    """Its directory, and what `measure` finds."""
    path = tmp_path_factory.mktemp("clean") / "run"
    return path, measure(open_sampler("layers:2"), path)


def test_a_clean_run_passes_with_its_acceptance_everywhere(clean_run):
    _, (findings, probe, verdict) = clean_run
    assert verdict.verdict.outcome == "PASS", verdict.verdict.reasons
    assert probe.control.controls_draft
    uncontrolled = replace(probe, control=replace(probe.control, controls_draft=False))
    assert probe_doubts(probe, SPEC) == []
    assert probe_doubts(uncontrolled, SPEC) == ["draft: no planted fault was caught there"]
    axis = width(probe)
    drafted = axis.drafted
    assert drafted.n_trials >= len(SPEC.widths) + 1
    assert drafted.n_accepted == drafted.n_proposed > 0
    assert (drafted.widths_diverged, drafted.widths_latent) == ((), ())
    of_samples = [s.drafted for s in findings.samples if s.drafted and s.role == "trial"]
    assert sum(d.proposed != () for d in of_samples) >= drafted.n_trials
    assert "(mean accepted length)" in " ".join(verdict.axes["width"].reasons)
    document = make_document(findings)
    json_axis = next(x for x in document["probes"][0]["axes"] if x["axis"] == "width")
    assert json_axis["drafted"]["n_accepted"] == drafted.n_accepted
    rows = properties_table(findings).to_dict("records")
    row = next(row for row in rows if row["property"] == "width")
    assert (row["draft_accepted"], row["draft_proposed"]) == (
        drafted.n_accepted,
        drafted.n_proposed,
    )
    assert row["mean_accepted_length"] == pytest.approx(drafted.n_accepted / drafted.n_passes)
    (table,) = sample_tables(findings)
    lengths = table[table.draft_tokens == 4].accepted_lengths_json.map(json.loads)
    assert set(map(tuple, lengths)) == {(4, 4, 4, 1)}


def test_a_fault_of_wide_passes_fails_from_its_width_on(open_sampler, tmp_path, measure, turn_last):
    sampler = open_sampler("layers:2")
    turn_last(sampler, 5)
    findings, probe, verdict = measure(sampler, tmp_path / "run")
    assert verdict.verdict.outcome == "FAIL"
    axis = width(probe)
    assert axis.drafted.widths_diverged == (5, 8, 16)
    assert "another completion by passes of 5, 8, 16" in " ".join(verdict.axes["width"].reasons)
    diverged = {
        (load.drafts, load.width)
        for load in probe.loads
        if load.axis == "width" and load.n_diverged_trials
    }
    assert diverged == {(drafts, width) for drafts in (False, True) for width in (5, 8, 16)}
    # Where all that a pass was fed is known, it is explained; a draft's is not.
    assert not find_failure(tmp_path / "run", None).sample.load.drafts
    (drafted, *_) = (
        s for s in findings.samples if s.load.drafts and s.load.width == 5 and s.role == "trial"
    )
    assert find_failure(tmp_path / "run", drafted.sample_id).sample == drafted


def test_a_draft_of_which_nothing_is_accepted_is_no_evidence(
    monkeypatch, open_sampler, tmp_path, measure
):
    monkeypatch.setattr(draft, "lowest_argmax", lambda logits: logits.argmin(-1))
    short = replace(SPEC, decoding=Decoding(9), widths=(2, 5), n_samples=24)
    _, probe, verdict = measure(open_sampler("layers:2"), tmp_path / "run", short)
    axis = width(probe)
    assert (axis.drafted.n_accepted, axis.diverged_trials, axis.latent_trials) == (0, 0, 0)
    assert verdict.verdict.outcome == "INCONCLUSIVE"
    assert any(r.startswith("draft: 0 of ") for r in verdict.verdict.reasons)


def test_a_draft_that_proposes_nothing_is_no_evidence(monkeypatch, open_sampler, tmp_path, measure):
    """Every completion ends with its first token, so that no pass follows."""
    sampler = open_sampler("layers:2")
    (decoded,) = sample(sampler, ALONE)
    monkeypatch.setattr(sampler, "_stop_ids", {decoded.token_ids[0]})
    _, _, verdict = measure(sampler, tmp_path / "run")
    assert verdict.verdict.outcome == "INCONCLUSIVE"
    assert any(r.startswith("draft: no token was proposed") for r in verdict.verdict.reasons)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"draft": "layers:3"}, "--draft layers:3: * has 2 layers"),
        ({"draft": "builtin"}, "--draft builtin: its vocabulary has * tokens, that of * "),
        ({"draft": "nowhere"}, "--draft nowhere"),
        ({"draft": "layers:1", "model": "gemma3"}, "--draft layers:1: Gemma3ForCausalLM keeps "),
    ],
)
def test_what_cannot_draft_is_refused_in_a_line(options, line, tiny_models):
    model = str(tiny_models[options.get("model", "qwen3")])
    with pytest.raises(UsageError) as refused:
        TransformersSampler(replace(SPEC, **{**options, "model": model}))
    said = str(refused.value)
    assert "\n" not in said
    at = 0
    for part in line.split("*"):
        at = said.index(part, at) + len(part)


def test_another_tokenizer_of_the_same_size_is_refused(tiny_models, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_models["qwen3"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    spec = replace(SPEC, model=str(tiny_models["qwen3"]), draft=str(other))
    with pytest.raises(UsageError, match="its tokenizer names other tokens than that of"):
        TransformersSampler(spec, load_weights=False)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"draft": "layers:0"}, "--draft layers:0: give how many of the first layers"),
        ({"draft": "layers:"}, "--draft layers:: give how many"),
        ({"batching": "continuous"}, "--draft layers:1: only --batching exact"),
        ({"axes": "slot"}, "--draft layers:1: what it proposes is verified along width"),
        ({"temperature": 0.5}, "--draft layers:1: its tokens are verified greedily"),
        ({"tp": 2}, "--draft layers:1: it drafts in one process"),
        ({"model": "scripted:clean"}, "--draft: "),
        ({"model": "m", "engine": "vllm"}, "--draft: this is for transformers in this process"),
        ({"model": "m", "endpoint": "http://127.0.0.1:1/v1"}, "--draft: "),
    ],
)
def test_an_option_that_does_not_fit_is_named(options, line):
    with pytest.raises(UsageError) as refused:
        make_spec(**{"draft": "layers:1", **options})
    assert str(refused.value).startswith(line)


def test_a_completion_too_short_to_draft_is_refused(open_sampler):
    with pytest.raises(UsageError, match="--draft: 1 tokens after the first fill no pass"):
        fit_spec(replace(SPEC, axes=DEFAULTS.axes, decoding=Decoding(2)), open_sampler("layers:2"))


def test_what_a_file_says_of_a_draft_is_held_to_its_load(clean_run, tmp_path):
    shutil.copytree(clean_run[0], tmp_path / "run")
    file = tmp_path / "run" / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    index = next(i for i, x in enumerate(lines) if x["drafts"] and x["axis"] == "width")
    for change in (
        {"drafted": None},
        {"drafts": False},
        {"drafted": {"proposed": [1], "accepted": [1]}},
        {"drafted": {"proposed": [99], "accepted": [99]}},
        {"drafted": {"proposed": [1, 1], "accepted": [1]}},
        {"drafted": {"proposed": [0], "accepted": [-1]}},
    ):
        changed = [*lines[:index], {**lines[index], **change}, *lines[index + 1 :]]
        file.write_text("".join(json.dumps(x) + "\n" for x in changed))
        findings = read_findings(tmp_path / "run")
        assert findings.judgement.verdict.outcome != "PASS", change


def test_the_embedded_models_own_layers_draft_and_stock_differs_in_fp32(tmp_path, capsys):
    run = ndcheck.measure(
        "builtin",
        dtype="fp32",
        device="cpu",
        draft="layers:3",
        axes="width",
        loads=[1, 2],
        samples=16,
        max_tokens=10,
        widths=[2, 5],
        out=tmp_path / "run",
    )
    verdicts = run.probes.set_index("arm").verdict.to_dict()
    assert verdicts == {"stock": "FAIL", "invariant": "PASS"}
    of_width = run.properties[run.properties.property == "width"].set_index("arm")
    for arm in verdicts:
        assert 0 < of_width.draft_accepted[arm] < of_width.draft_proposed[arm]
    assert "draft: other bits by passes of 2, 5" in of_width.reasons_json["stock"]
    drafted = next(
        s for s in run.findings.samples if s.arm == "stock" and s.load.drafts and not s.fault
    )
    trace = ("trace", "--run", str(run.path), "--sample", str(drafted.sample_id), "--no-swaps")
    assert run_command_line([*trace, "-q", "--exit-code"]) == 1
    assert "FOUND linear" in capsys.readouterr().out
