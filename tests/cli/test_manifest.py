"""`ndcheck kernels manifest` and `compare`, and a gate that asks for a manifest's bits."""

from __future__ import annotations

import json

import pytest

SMALL = ("--device", "cpu", "--op", "linear,softmax", "--rows", "1,17", "--dtype", "fp32")

QUIET_CONTROL = {"form": "control", "backend": "planted", "heads": "", "keys": 1, "rows": 1,
                 "repeats": 2, "differing": 0, "is_uniform": True}  # fmt: skip

QUIET_STEP = {"form": "growing", "backend": "cudnn", "heads": "9/3x64", "keys": 130, "rows": 32,
              "repeats": 24, "differing": 0, "is_uniform": True}  # fmt: skip
ORDER = {"op": "mm", "arm": "stock", "terms": 64, "rows": 2, "order": "x", "doubt": None}


@pytest.fixture
def made(ndcheck_here, tmp_path):
    done = ndcheck_here("kernels", "manifest", "a.json", *SMALL)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "a.json").read_text())


def write(tmp_path, document, name="b.json"):
    (tmp_path / name).write_text(json.dumps(document))
    return name


def linear(document, arm):
    entries = document["entries"]
    return next(e for e in entries if (e["op"], e["arm"]) == ("linear", arm))


def words(done):
    return " ".join(done.stdout.split())


def test_the_same_stack_has_the_same_bits(ndcheck_here, tmp_path, made):
    assert {e["arm"] for e in made["entries"]} == {"stock", "invariant"}
    assert made["packages"]["torch"]
    again = ndcheck_here("kernels", "manifest", "b.json", *SMALL, "--json")
    assert json.loads(again.stdout)["entries"] == made["entries"]
    done = ndcheck_here("kernels", "compare", "a.json", "b.json")
    assert done.returncode == 0, done.stdout
    cells = sum(len(e["points"]) for e in made["entries"])
    assert f"PASS the same bits in {cells} of {cells}; another order would have" in words(done)


def test_a_planted_change_is_named_with_the_package(ndcheck_here, tmp_path, made):
    linear(made, "stock")["points"][1]["bits"] = "0000000000000000"
    made["packages"]["torch"] = "9.9"
    made["packages"]["a-package"] = "1.0"
    write(tmp_path, made)
    done = ndcheck_here("kernels", "compare", "a.json", "b.json")
    assert done.returncode == 1
    assert "float32 stock: other bits at M = 17: " in words(done)
    assert "-> 0000000000000000" in words(done)
    assert "FAIL" in done.stdout
    assert words(done).index("-> 9.9") < words(done).index("a-package absent -> 1.0")


@pytest.mark.parametrize(
    ("plant", "shown"),
    [
        ({"bits": "0"}, "other class boundaries: none -> 17"),
        ({"is_uniform": False}, "copies of a row at M = 17: none -> 17"),
        ({"differing": 1}, "run-to-run at M = 17: none -> 17"),
    ],
)
def test_each_kind_of_change_is_seen(ndcheck_here, tmp_path, made, plant, shown):
    linear(made, "invariant")["points"][1] |= plant
    write(tmp_path, made)
    done = ndcheck_here("kernels", "compare", "a.json", "b.json")
    assert (done.returncode, shown in words(done)) == (1, True), done.stdout


def test_orders_and_decode_steps_are_compared_too(ndcheck_here, tmp_path, made):
    step, order = QUIET_STEP, ORDER
    write(tmp_path, {**made, "steps": [step], "orders": [order]}, "a.json")
    write(tmp_path, {**made, "steps": [step | {"differing": 3}],
                     "orders": [order | {"order": "y"}]})  # fmt: skip
    done = ndcheck_here("kernels", "compare", "a.json", "b.json")
    assert done.returncode == 1
    expected = "growing cache, 9/3x64, 130 keys: run-to-run at M = 32: 0 of 24 (cudnn) -> 3 of 24"
    assert expected in words(done)
    assert "mm of 64 terms float32 stock: another order at M = 2: x -> y" in words(done)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(entries=d["entries"][:1]), "of A are not in B"),
        (lambda d: [e.update(operands="0") for e in d["entries"]], "other operands"),
        (lambda d: [e.update(shows_order=False) for e in d["entries"]], "nothing was compared"),
        (lambda d: d["steps"].append(QUIET_CONTROL), "planted step was not seen"),
        (lambda d: d["steps"].append(QUIET_STEP), "planted step was not seen"),
        (lambda d: linear(d, "stock")["points"].pop(), "float32 stock at M = 17"),
        (lambda d: d.update(steps=[]), "1 part of A are not in B: decode step, growing cache"),
        (lambda d: d.update(orders=[]), "1 part of A are not in B: order of mm stock, 64 terms"),
    ],
)
def test_what_could_show_nothing_does_not_pass(ndcheck_here, tmp_path, made, change, reason):
    more = {"steps": [*made["steps"]], "orders": [*made["orders"]]}
    if "part of A" in reason:
        more = {"steps": [QUIET_STEP], "orders": [ORDER]}
        made |= {"steps": [QUIET_STEP], "orders": [ORDER]}
    write(tmp_path, {**made, **more}, "a.json")
    change(made)
    write(tmp_path, made)
    done = ndcheck_here("kernels", "compare", "a.json", "b.json")
    assert (done.returncode, reason in words(done)) == (3, True), done.stdout


def test_bits_that_repeat_on_neither_stack_are_no_difference(ndcheck_here, tmp_path, made):
    """As atomics give: each manifest holds another draw of them."""
    entry = linear(made, "stock")
    cells = sum(len(e["points"]) for e in made["entries"])
    for name, bits in (("a.json", "0"), ("b.json", "1")):
        entry["points"][1] |= {"bits": bits, "differing": 3, "is_uniform": bits == "0"}
        write(tmp_path, made, name)
    done = ndcheck_here("kernels", "compare", "a.json", "b.json")
    assert done.returncode == 0, done.stdout
    assert f"PASS the same bits in {cells - 1} of {cells - 1}; another order" in words(done)
    assert "1 more repeat themselves in neither, which tells nothing" in words(done)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "no manifest"), ("[]", "no manifest"), ('{"format": "other"}', "no manifest")],
)
def test_what_is_no_manifest_is_refused(ndcheck_here, tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    done = ndcheck_here("kernels", "compare", "a.json", "a.json")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, reason in line) == (2, True)


def test_manifests_of_two_devices_are_not_compared(ndcheck_here, tmp_path, made):
    write(tmp_path, made | {"device": "cuda"})
    done = ndcheck_here("kernels", "compare", "a.json", "b.json")
    assert (done.returncode, "one manifest is of cpu, the other of cuda" in done.stderr) == (
        2,
        True,
    )


def test_an_op_without_a_case_is_named(ndcheck_here, tmp_path):
    done = ndcheck_here("kernels", "manifest", "a.json", "--device", "cpu", "--op", "conv")
    assert (done.returncode, "--op 'conv': give all" in done.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_gate_asks_for_the_bits_of_a_manifest(ndcheck_here, tmp_path, made):
    (tmp_path / "ndcheck.toml").write_text(
        'model = "scripted:clean"\nmanifest = "a.json"\n[checks.a]\n'
    )
    misplaced = ndcheck_here("gate")
    assert (misplaced.returncode, "manifest: unknown key" in misplaced.stderr) == (2, True)
    rules = '[checks.a]\nmodel = "scripted:clean"\n[checks.a.rules]\nmanifest = "{}"\n'
    (tmp_path / "ndcheck.toml").write_text(rules.format("a.json"))
    passed = ndcheck_here("gate", "--json", "--quiet")
    (check,) = json.loads(passed.stdout)["checks"]
    assert [r["verdict"] for r in check["rules"] if r["rule"] == "manifest"] == ["PASS"]
    linear(made, "stock")["points"][0]["bits"] = "0"
    (tmp_path / "ndcheck.toml").write_text(rules.format(write(tmp_path, made)))
    failed = ndcheck_here("gate", "--quiet")
    assert failed.returncode == 1
    assert "1 op changed bits or class boundaries, with the same packages" in words(failed)
    (tmp_path / "ndcheck.toml").write_text(rules.format("missing.json"))
    missing = ndcheck_here("gate", "--quiet")
    assert (missing.returncode, "missing.json" in missing.stderr) == (2, True)


def test_there_is_nothing_to_prove_on_a_cpu(ndcheck_here):
    done = ndcheck_here("kernels", "prove", "--device", "cpu")
    assert (done.returncode, "proven when it is first used" in done.stderr) == (2, True)
    other = ndcheck_here("kernels", "prove", "--dtype", "fp32")
    assert (other.returncode, "bf16, fp16" in other.stderr) == (2, True)
