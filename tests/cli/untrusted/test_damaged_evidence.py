"""Samples that are missing, doubled, damaged or another run's never pass, whatever is asked."""

from __future__ import annotations

import csv
import json
import shutil
from xml.etree import ElementTree as ET

import pytest

OPTIONS = ("--loads", "1,4", "-n", "60", "--max-tokens", "8", "--quiet")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that passes and one that fails, by what the scripted sampler plants."""
    from ndcheck.cli.app import run_command_line

    root = tmp_path_factory.mktemp("runs")
    for name, code in (("clean", 0), ("batch-dependent", 1), ("latent", 1)):
        options = ("--model", f"scripted:{name}", *OPTIONS, "--out", str(root / name))
        assert run_command_line(["run", *options]) == code
    return root


@pytest.fixture
def damaged(runs, tmp_path):
    """``damaged(name, change)``: a copy whose samples, as dictionaries, went through ``change``."""

    def damage(name, change):
        path = tmp_path / name
        shutil.copytree(runs / name, path)
        file = path / "samples.jsonl"
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [s if isinstance(s, str) else json.dumps(s) for s in change(samples)]
        file.write_text("".join(f"{line}\n" for line in lines))
        return path

    damage.root = tmp_path
    return damage


def one(**changed):
    """Changes the sample of a trial with one, neither the reference nor the control."""

    def change(samples):
        at = max(i for i, s in enumerate(samples) if s["axis"] == "slot")
        samples[at] = {**samples[at], **changed}
        return samples

    return change


def rename_key(samples, chosen=lambda sample: True):
    return [
        {("tokenIds" if chosen(s) and k == "token_ids" else k): v for k, v in s.items()}
        for s in samples
    ]


def without_trials(n):
    def change(samples):
        last = samples[-1]["trial_id"]
        return [s for s in samples if s["trial_id"] <= last - n]

    return change


def without_nonce(sample):
    return {key: value for key, value in sample.items() if key != "nonce"}


def fed_otherwise(samples, **changed):
    at = next(i for i, s in enumerate(samples) if s["fed"] and s["axis"] == "width")
    samples[at]["fed"] |= changed
    return samples


DAMAGES = {
    "one key renamed": (lambda s: [*s[:-1], *rename_key(s[-1:])], "lines of samples left out: 1"),
    "a line of garbage": (lambda s: [*s, "garbage"], "lines of samples left out: 1"),
    "a blank line": (lambda s: [*s, ""], "lines of samples left out: 1"),
    "half a line": (lambda s: [*s[:-1], json.dumps(s[-1])[:50]], "lines of samples left out"),
    "the last trials gone": (without_trials(5), "trials that are missing: 5 of"),
    "one trial gone": (lambda s: [x for x in s if x["trial_id"] != 9], "missing: 1 of"),
    "all gone": (lambda s: [], "trials that are missing"),
    "the reference gone": (lambda s: [x for x in s if x["trial_id"] != 0], "missing: 1 of"),
    "the controls gone": (lambda s: [x for x in s if x["axis"] != "control"], "missing: 3 of"),
    "every line twice": (lambda s: [x for x in s for _ in range(2)], "there twice"),
    "one line twice": (lambda s: [*s, s[3]], "there twice"),
    "one copy of a batch gone": (
        lambda s: [x for x in s if not (len(x["slots"]) == 4 and x["slot"] == 1)],
        "trials without all of their samples",
    ),
    "another arm": (one(arm="invariant"), "no arm invariant"),
    "another probe": (one(probe_id="p9"), "no probe 'p9'"),
    "another axis": (one(axis="run-to-run"), "planned otherwise"),
    "a control": (one(axis="control"), "planned otherwise"),
    "another load": (one(filler_seed=12345), "planned otherwise"),
    "another batch size": (one(batch_size=1, slots=[0], slot=0, filler_lengths=[]), "otherwise"),
    "another baseline": (one(baseline=None), "planned otherwise"),
    "a slot outside the load": (one(slot=7), "slot 7 is none of its load's"),
    "a trial beyond the plan": (one(trial_id=10**6), "trial 1000000 was not planned"),
    "another sample's id": (one(sample_id=0), "otherwise"),
    "more texts than tokens": (one(token_texts=["a"]), "8 tokens and the texts of 1"),
    "fewer digests than tokens": (one(row_digests="0" * 16), "row_digests of 1"),
    "digests that are no hex": (one(row_digests="x" * 128), "hexadecimal"),
    "the bits of one gone": (one(row_digests="", logprob_bits=""), "without the bits that this"),
    "the digests of one gone": (one(row_digests=""), "without the bits that this"),
    "all bits gone": (
        lambda s: [{**x, "row_digests": "", "logprob_bits": ""} for x in s],
        "without the bits that this",
    ),
    "a key that there is not": (one(rowDigests="0" * 128), "no field 'rowDigests'"),
    "an error that is not there": (one(finish_reason="error"), "does not fit its error"),
    "other tokens of no other bits": (
        lambda s: fed_otherwise(s, n_other_tokens=2),
        "tokens that were fed contradicts itself",
    ),
    "more other bits than tokens": (
        lambda s: fed_otherwise(s, n_other_bits=10**6),
        "tokens that were fed contradicts itself",
    ),
    "another digest of no other bits": (
        lambda s: fed_otherwise(s, digest="f" * 16),
        "tokens that were fed contradicts itself",
    ),
    "a line of no run": (lambda s: [*s[:-1], without_nonce(s[-1])], "it is of another run"),
    "lines of no run": (lambda s: list(map(without_nonce, s)), "it is of another run"),
    "a token id beyond 31 bits": (one(token_ids=[2**31] * 8), "2147483648"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_evidence_never_passes(ndcheck_here, damaged, name):
    change, reason = DAMAGES[name]
    run = damaged("clean", change)
    screen = ndcheck_here("report", run, "--html", "--exit-code")
    assert screen.returncode == 3, screen.stdout
    assert screen.stdout.startswith("INCONCLUSIVE")
    assert "Traceback" not in screen.stderr
    document = json.loads(ndcheck_here("report", run, "--json").stdout)
    assert document["verdict"] == "INCONCLUSIVE"
    assert any(reason in sentence for sentence in document["reasons"]), document["reasons"]
    assert all(probe["verdict"] == "INCONCLUSIVE" for probe in document["probes"])
    assert "INCONCLUSIVE" in (run / "report.md").read_text()
    assert "INCONCLUSIVE" in (run / "report.html").read_text()
    with (run / "summary.csv").open(newline="") as rows:
        assert [row["verdict"] for row in csv.DictReader(rows)] == ["INCONCLUSIVE"]
    gate = ndcheck_here("gate", run, "--junit", "junit.xml")
    assert gate.returncode == 3
    lenient = ndcheck_here("gate", run, "--max-divergence-rate", "0.9", "--allow-latent")
    assert lenient.returncode == 3
    junit = ET.parse(run.parent / "junit.xml").getroot()
    assert int(junit.get("errors")) >= 1
    assert reason in ET.tostring(junit, "unicode")


def test_the_same_runs_undamaged_are_judged(ndcheck_here, damaged):
    assert ndcheck_here("gate", damaged("clean", list)).returncode == 0
    assert ndcheck_here("gate", damaged("batch-dependent", list)).returncode == 1


@pytest.mark.parametrize("n_others", [1, 10, None])
def test_samples_of_another_run_of_the_same_plan_are_no_evidence(
    ndcheck_here, damaged, tmp_path, n_others
):
    """Such as the lines of two directories put together, or a run.json copied beside them."""
    assert ndcheck_here("run", "--model", "scripted:clean", *OPTIONS, "--out", "o").returncode == 0
    others = list(map(json.loads, (tmp_path / "o" / "samples.jsonl").read_text().splitlines()))
    run = damaged("clean", lambda samples: [*others[:n_others], *samples[len(others[:n_others]) :]])
    document = json.loads(ndcheck_here("report", run, "--json").stdout)
    assert document["verdict"] == "INCONCLUSIVE"
    assert "it is of another run" in " ".join(document["reasons"])
    assert ndcheck_here("gate", run).returncode == 3
    assert ndcheck_here("run", "--resume", run).returncode == 2


@pytest.mark.parametrize(("changed", "lenient"), [({}, 0), ({"n_other_tokens": 1}, 1)])
def test_a_count_of_other_tokens_stands_beside_no_pass(ndcheck_here, damaged, changed, lenient):
    run = damaged("clean", lambda s: fed_otherwise(s, n_other_bits=2, **changed))
    assert ndcheck_here("gate", run).returncode == 1
    assert ndcheck_here("gate", run, "--allow-latent").returncode == lenient
    screen = ndcheck_here("report", run, "--exit-code")
    assert screen.returncode == 1
    assert "PASS" not in screen.stdout.splitlines()[0]


def test_fed_tokens_that_diverge_within_a_limit_are_accepted(ndcheck_here):
    model = ("--model", "scripted:width-dependent", *OPTIONS)
    assert ndcheck_here("run", *model, "--axes", "width", "--out", "w").returncode == 1
    done = ndcheck_here("gate", "w", "--max-unique", "2")
    assert (done.returncode, done.stdout.split()[0]) == (0, "ACCEPTED"), done.stdout
    assert ndcheck_here("gate", "w", "--max-unique", "1").returncode == 1


def test_a_failure_hidden_by_a_renamed_key_does_not_pass(ndcheck_here, damaged):
    run = damaged(
        "batch-dependent", lambda samples: rename_key(samples, lambda s: s["batch_size"] > 1)
    )
    assert ndcheck_here("gate", run).returncode == 3
    assert ndcheck_here("report", run, "--exit-code").returncode == 3


def rename_bits(sample):
    names = {"row_digests": "digests", "logprob_bits": "bits"}
    return {names.get(key, key): value for key, value in sample.items()}


@pytest.mark.parametrize(
    "hide", [rename_bits, lambda sample: {**sample, "row_digests": "", "logprob_bits": ""}]
)
def test_bits_that_are_hidden_do_not_pass(ndcheck_here, damaged, hide):
    assert ndcheck_here("gate", damaged("latent", list)).returncode == 1

    def change(samples):
        return [hide(s) if s["batch_size"] > 1 else s for s in samples]

    shutil.rmtree(damaged.root / "latent")
    assert ndcheck_here("gate", damaged("latent", change)).returncode == 3


def test_a_failure_that_is_left_stays_one_and_says_what_is_missing(ndcheck_here, damaged):
    run = damaged("batch-dependent", without_trials(5))
    assert ndcheck_here("gate", run).returncode == 1
    document = json.loads(ndcheck_here("report", run, "--json").stdout)
    assert document["verdict"] == "FAIL"
    assert any("trials that are missing: 5 of" in reason for reason in document["reasons"])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"status": "running"}, "still going on"),
        ({"status": "interrupted"}, "interrupted"),
        ({"n_trials_planned": 500}, "missing"),
        ({"n_trials_planned": 3}, "was not planned"),
        ({"n_trials_planned": 0}, "does not say how many"),
        ({"trial_digests": "00000000"}, "planned otherwise"),
    ],
)
def test_a_record_that_does_not_fit(ndcheck_here, damaged, changed, reason):
    run = damaged("clean", list)
    file = run / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    document = json.loads(ndcheck_here("report", run, "--json").stdout)
    assert document["verdict"] == "INCONCLUSIVE"
    assert any(reason in sentence for sentence in document["reasons"]), document["reasons"]
    assert ndcheck_here("gate", run).returncode == 3


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("latent", {"allow_latent": True}),
        ("clean", {"confidence": 0.5}),
        ("clean", {"decoding": {"max_tokens": 4, "temperature": 0.0, "seed": 0}}),
        ("clean", {"decoding": {"max_tokens": 8, "temperature": 1.0, "seed": 0}}),
        ("clean", {"model": "scripted:latent"}),
        ("clean", {"probes": [{"probe_id": "p1", "prompt": "another"}]}),
        ("clean", {"axes": ["slot"]}),
        ("clean", {"mode": "mixed"}),
    ],
)
def test_a_spec_that_was_changed_afterwards_passes_nothing(ndcheck_here, damaged, name, changed):
    """What was measured is said by it, and by how much a verdict asks for."""
    run = damaged(name, list)
    file = run / "run.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "spec": {**document["spec"], **changed}}))
    assert ndcheck_here("gate", run).returncode == 3
    found = json.loads(ndcheck_here("report", run, "--json").stdout)
    assert "its spec is not what the run began with" in " ".join(found["reasons"])
    done = ndcheck_here("run", "--resume", run)
    assert done.returncode == 2
    assert "its spec is not what it began with" in done.stderr


def test_a_spec_written_otherwise_is_the_same(ndcheck_here, damaged):
    run = damaged("clean", list)
    file = run / "run.json"
    document = json.loads(file.read_text())
    document["spec"]["answer_pattern"] = r"# (\w+)"
    document["spec"]["decoding"]["temperature"] = 0
    del document["spec"]["dtype"]
    file.write_text(json.dumps(document, sort_keys=True))
    assert ndcheck_here("gate", run).returncode == 0


def test_a_record_with_a_renamed_key_is_refused(ndcheck_here, damaged):
    """Or a default would take the place of what the run was asked for."""
    run = damaged("clean", list)
    file = run / "run.json"
    file.write_text(file.read_text().replace('"confidence":', '"confidense":'))
    done = ndcheck_here("gate", run)
    assert done.returncode == 2
    assert "there is no field 'confidense'" in " ".join(done.stderr.split())


def test_a_run_stopped_at_a_divergence_that_is_gone(ndcheck_here, damaged, tmp_path):
    options = ("--model", "scripted:flaky", "--stop-on-divergence", *OPTIONS)
    assert ndcheck_here("run", *options, "--out", "stopped").returncode == 1
    file = tmp_path / "stopped" / "samples.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    done = ndcheck_here("gate", "stopped")
    assert done.returncode == 3
    assert "stopped at the first divergence" in " ".join(done.stdout.split())


def test_a_comparison_with_damaged_samples_is_inconclusive(ndcheck_here, damaged, runs):
    run = damaged("clean", without_trials(5))
    options = ("--fail-on", "tokens,unique,rate")
    again = ("--model", "scripted:clean", *OPTIONS, "--out", "again")
    assert ndcheck_here("run", *again).returncode == 0
    assert ndcheck_here("compare", runs / "clean", "again", *options).returncode == 0
    assert ndcheck_here("compare", run, "again", *options).returncode == 3


def test_a_comparison_with_batches_that_never_formed_is_inconclusive(ndcheck_here, runs):
    run = ("--model", "scripted:never-batches", *OPTIONS, "--out", "thin")
    assert ndcheck_here("run", *run).returncode == 3
    for kind, code in (("unique", 3), ("rate", 3), ("tokens", 0)):
        done = ndcheck_here("compare", runs / "clean", "thin", "--fail-on", kind)
        assert done.returncode == code, done.stdout


def test_a_run_without_digests_is_held_to_itself(ndcheck_here, damaged):
    """As runs from before they were kept have none."""
    run = damaged("clean", lambda samples: [*samples, samples[-1]])
    file = run / "run.json"
    document = json.loads(file.read_text())
    del document["trial_digests"]
    file.write_text(json.dumps(document))
    done = ndcheck_here("gate", run)
    assert done.returncode == 3
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    (run / "samples.jsonl").write_text("".join(lines[:-1]))
    assert ndcheck_here("gate", run).returncode == 0


def test_half_a_character_is_text_like_any_other(ndcheck_here, damaged):
    """A server that streams bytes may end a piece in the middle of a character."""
    change = one(token_texts=["\ud800<b>"] * 8)
    run = damaged("batch-dependent", change)
    for command in (
        ("report", run, "--html", "--exit-code"),
        ("gate", run, "--junit", run / "j.xml"),
    ):
        done = ndcheck_here(*command)
        assert done.returncode == 1
        assert "ignored" not in done.stderr


@pytest.mark.parametrize(
    "change", [lambda s: [], lambda s: ['{"doc_id": 0, "target": "a"}'], lambda s: ["\0" * 99]]
)
def test_nothing_passes_where_nothing_could_be_read(ndcheck_here, damaged, runs, change):
    run = damaged("clean", change)
    gate = json.loads(ndcheck_here("gate", run, "--json").stdout)
    assert gate["exit_code"] == 3
    assert {rule["verdict"] for rule in gate["checks"][0]["rules"]} == {"INCONCLUSIVE"}
    done = ndcheck_here("compare", runs / "latent", run, "--fail-on", "tokens")
    assert done.returncode == 3
    assert "trials that are missing" in " ".join(done.stdout.split())
    assert ("line 1 is ignored" in done.stderr) == bool(change([]))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (None, "samples.jsonl cannot be read: No such file"),
        ({"accuracy": 0.5, "args": {}}, "it has no schema_version, which a run of ndcheck's has"),
        ([1, 2], "it has no schema_version"),
        ({"schema_version": "2.1.0", "runs": []}, "'2.1.0' is no schema_version"),
        ({"schema_version": 1, "runs": []}, "no field 'run_id'"),
        ({"schema_version": 2}, "upgrade ndcheck"),
    ],
)
@pytest.mark.parametrize("command", [("report",), ("gate",), ("compare", "."), ("trace", "--run")])
def test_what_is_no_run_is_bad_input(ndcheck_here, damaged, command, document, words):
    """Without samples, or another tool's, or of a version to come."""
    run = damaged("clean", list)
    if document is None:
        (run / "samples.jsonl").unlink()
    else:
        (run / "run.json").write_text(json.dumps(document))
    command = [run if part == "." else part for part in command]
    done = ndcheck_here(*command, run)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line
    assert not done.stdout


def test_a_file_of_a_run_is_no_run(ndcheck_here, runs):
    done = ndcheck_here("report", runs / "clean" / "run.json")
    assert done.returncode == 2
    assert "run.json is a file: give the run's directory" in done.stderr
