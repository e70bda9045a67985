"""What `prove` finds, what it keeps, and when a table is used. Small shapes, no GPU needed."""

from __future__ import annotations

import json

import pytest
import torch

from ndcheck_kernels.cuda import candidates, configs
from ndcheck_kernels.cuda import device as device_module
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import borrowed, cublaslt, matmul, proofs
from ndcheck_kernels.measure import prove, tune

N, K = 32, 512
ROWS = (1, 3, 17, 33)
GOOD = MatmulConfig("tile", 16, 32, 128, 4, 2, swap=True)
LATE = MatmulConfig("tile", 32, 32, 128, 4, 2)
SHAPE = proofs.Shape(N, K, "float16", 1)
ENVIRONMENT = {"gpu": "fake", "torch": "1", "cublaslt": "1"}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A machine with two candidates beside the configuration that serves every M."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(candidates, "CANDIDATES", ((1, 64, GOOD), (17, 64, LATE)))
    monkeypatch.setattr(configs, "frozen_ranges", lambda *_: {GOOD: (1, 64)})
    monkeypatch.setattr(prove, "PROBES", 8)
    candidates.known.cache_clear()
    monkeypatch.setattr(proofs, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(proofs, "environment", lambda _: ENVIRONMENT)
    proofs.forget()
    yield tmp_path / "ndcheck"
    candidates.known.cache_clear()
    proofs.forget()


@pytest.fixture
def where(device):
    return torch.device(device)


def labels(*chosen):
    return {config.label for config in chosen}


def other_order_from(rows, of):
    """`of` cuts K once more from so many rows on: what no look at single rows finds."""
    own = prove.runner

    def runner(config, groups):
        if config != of:
            return own(config, groups)
        return lambda x, w, c: own(configs.ONE_FOR_ALL, groups + (len(x) >= rows))(x, w, c)

    return runner


def test_every_configuration_of_one_class_is_in_it(where):
    proof = prove.prove(SHAPE, where, {}, ROWS)
    assert proof.control is None
    assert proof.classes == dict.fromkeys(labels(GOOD, LATE, configs.ONE_FOR_ALL))
    assert (proof.shut_out, proof.selectable_shut_out, proof.rows) == ({}, {}, ROWS)


@pytest.mark.parametrize("rows", [3, 33])
def test_one_that_groups_k_by_m_is_named_and_shut_out(where, monkeypatch, rows):
    monkeypatch.setattr(prove, "runner", other_order_from(rows, GOOD))
    proof = prove.prove(SHAPE, where, {}, ROWS)
    assert proof.shut_out == {GOOD.label: f"other bits at {rows} rows"}
    assert proof.selectable_shut_out == proof.shut_out
    assert proof.control is None


def test_a_single_row_with_another_bit_is_enough(where, monkeypatch):
    own = prove.runner

    def runner(config, groups):
        def run(x, w, c):
            y = own(config, groups)(x, w, c)
            if config == LATE and c is not None:
                y[-1, -1] = torch.nextafter(y[-1, -1], y.new_tensor(torch.inf))
            return y

        return run

    monkeypatch.setattr(prove, "runner", runner)
    proof = prove.prove(SHAPE, where, {}, ROWS)
    assert proof.shut_out == {LATE.label: "other bits at 8 rows with an addend"}


def test_operands_that_tell_nothing_prove_nothing(where, monkeypatch):
    blind = lambda m, n, k, dtype, at: (torch.ones(m, k).to(dtype), torch.ones(n, k).to(dtype))  # noqa: E731
    monkeypatch.setattr(borrowed, "cancelling", blind)
    if where.type == "cuda":
        pytest.skip("the blind operands are on the CPU")
    assert "these operands tell nothing" in prove.prove(SHAPE, where, {}, ROWS).control
    assert "nothing could be planted" in prove.prove(SHAPE, where, {}, (1, 16)).control


def test_what_does_not_fit_the_chip_is_not_tried(where):
    proof = prove.prove(SHAPE, where, {(GOOD.label, 1): "it spills"}, ROWS)
    assert proof.untried == {GOOD.label: "it spills"}
    assert GOOD.label not in proof.classes


def kept(where, classes, table):
    known = proofs.proofs(where)
    known.keep(str(SHAPE), classes, table)
    known.write()
    proofs.forget()
    return known.path


def chosen(where, m):
    return proofs.choose(where, torch.float16, m, (N, K, 1), LATE, True)


def test_a_table_is_used_where_everything_matches_and_only_there(where, monkeypatch):
    assert chosen(where, 3) == (LATE, True)
    row = {"max_rows": 16, "config": GOOD.label, "borrows": False}
    kept(where, {GOOD.label: None}, [row])
    assert [chosen(where, m) for m in (1, 16, 17)] == [(GOOD, False), (GOOD, False), (LATE, True)]
    assert "tables of this machine for 1 shapes since 20" in proofs.summary(where)
    for name in ENVIRONMENT:  # One changed version.
        monkeypatch.setattr(proofs, "environment", lambda _, n=name: {**ENVIRONMENT, n: "2"})
        proofs.forget()
        assert chosen(where, 3) == (LATE, True)
        assert proofs.summary(where).startswith("frozen tables;")


def test_what_is_shut_out_is_never_used(where):
    classes = {LATE.label: "other bits at 33 rows", GOOD.label: None}
    table = [{"max_rows": 64, "config": LATE.label, "borrows": False}]
    kept(where, classes, table)  # Even where a table names it.
    assert chosen(where, 3) == (configs.ONE_FOR_ALL, True)
    assert proofs.unless_shut_out(where, torch.float16, (N, K, 1), LATE) == configs.ONE_FOR_ALL
    assert proofs.unless_shut_out(where, torch.float16, (N, K, 1), GOOD) == GOOD


def test_the_product_runs_what_the_table_says(where, monkeypatch):
    x = torch.randn(3, K, device=where).half()
    w = torch.randn(N, K, device=where).half()
    want = matmul.linear(x, w)
    ran = []
    own = matmul._launch
    monkeypatch.setattr(matmul, "_launch", lambda *a: ran.append(a[6]) or own(*a))
    kept(where, {GOOD.label: None}, [{"max_rows": 16, "config": GOOD.label, "borrows": False}])
    assert torch.equal(matmul.linear(x, w), want)
    assert ran == [GOOD]


def test_a_file_that_was_changed_by_hand_is_set_aside(where):
    path = kept(where, {GOOD.label: "other bits"}, None)
    document = json.loads(path.read_text())
    document["classes"][str(SHAPE)][GOOD.label] = None
    path.write_text(json.dumps(document))
    assert chosen(where, 3) == (LATE, True)
    assert "not used: its digest is not that of its content" in proofs.summary(where)


def test_a_table_is_tuned_from_the_class_alone(where, monkeypatch):
    """Times are made up: what counts is who may win, and what is written."""
    us = {GOOD.label: 5.0, LATE.label: 1.0, configs.ONE_FOR_ALL.label: 10.0, "cuBLASLt": 4.0}
    asked = []

    def medians(launches, device_type):
        asked.append(set(launches))
        names = {"choice": 4.0, "frozen": 10.0}
        return {name: us.get(name, names.get(name)) for name in launches}

    monkeypatch.setattr(tune, "medians_us", medians)
    monkeypatch.setattr(tune.configs, "matmul_config", lambda *_: configs.ONE_FOR_ALL)
    classes = {GOOD.label: None, LATE.label: "other bits", configs.ONE_FOR_ALL.label: None}
    proof = prove.ShapeProof(SHAPE, ROWS, classes, {}, None, {16: None, 33: "other bits"})
    cells = list(tune.tune(proof, where, (16, 64)))
    assert [(c.max_rows, c.choice, c.config) for c in cells] == [
        (16, "cuBLASLt", GOOD.label), (33, GOOD.label, GOOD.label),
    ]  # fmt: skip
    assert all(LATE.label not in names for names in asked)
    assert tune.geometric_mean(cells) == pytest.approx(2.5)
    assert cells[0].row == {"max_rows": 16, "config": GOOD.label, "borrows": True}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: d.update(format="other"), "no ndcheck-proofs-1"),
        (lambda d: d["classes"].update(a={}), "digest"),
        (lambda d: d.update(environment={**ENVIRONMENT, "gpu": "other"}), "gpu was other, here"),
        (lambda d: d.update(tables={"a": [{"max_rows": True}]}), "its tables is none"),
        (lambda d: d.update(proven={"a": [0]}), "its proven is none"),
    ],
)
def test_what_another_machine_sends_is_checked(damage, reason):
    known = proofs.Proofs(proofs.cache_folder() / "x.json", ENVIRONMENT)
    document = known.document()
    damage(document)
    if "digest" not in reason:
        body = {key: value for key, value in document.items() if key != "digest"}
        document["digest"] = proofs._digest(body)
    assert reason in known.add(document)


def test_no_two_configurations_share_a_label():
    everything = {c for _, _, c in candidates.CANDIDATES} | configs.every_config()
    assert len({config.label for config in everything}) == len(everything)


def test_without_a_library_the_frozen_tables_serve(where, monkeypatch):
    def unavailable(_):
        raise cublaslt.UnavailableError("none here")

    monkeypatch.setattr(proofs, "environment", unavailable)
    assert chosen(where, 3) == (LATE, True)
    assert proofs.summary(where) == "frozen tables; no products borrowed: none here"


def test_an_amd_gpu_is_not_taken_for_nvidias_chip_of_that_number(monkeypatch):
    """PyTorch numbers an MI210 9.0 too."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    number = device_module.capability.__wrapped__(torch.device("cuda"))
    assert number not in configs.PROVEN
    assert configs.selectable_configs(6144, 4096, 2, number) == {configs.ONE_FOR_ALL}
    assert number < 80  # Nothing of an NVIDIA chip's is launched.
