"""`ndcheck kernels prove` as a user has it, on a machine whose GPU is Triton's interpreter."""

from __future__ import annotations

import json

import pytest
import torch

from ndcheck.cli.app import run_command_line
from ndcheck.cli.stack import proofs_session
from ndcheck_kernels.cuda import candidates, configs
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import proofs
from ndcheck_kernels.measure import prove, tune

GOOD = MatmulConfig("tile", 16, 32, 128, 4, 2, swap=True)
LATE = MatmulConfig("tile", 32, 32, 128, 4, 2)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path, device):
    if device == "cuda":
        pytest.skip("kernels/bench/stack/gpu.py is this on a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(proofs_session, "_gpu", lambda _: torch.device("cpu"))
    monkeypatch.setattr(candidates, "CANDIDATES", ((1, 64, GOOD), (17, 64, LATE)))
    monkeypatch.setattr(configs, "frozen_ranges", lambda *_: {GOOD: (1, 64)})
    monkeypatch.setattr(prove, "DEFAULT_SHAPES", ((32, 512),))
    monkeypatch.setattr(prove, "PROBES", 4)
    monkeypatch.setattr(prove, "ROWS", (1, 17))
    monkeypatch.setattr(prove.prove, "__defaults__", ((1, 17),))
    monkeypatch.setattr(prove, "compile_ahead", lambda *_: {})
    monkeypatch.setattr(tune, "medians_us", lambda runs, _: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(proofs, "environment", lambda _: {"gpu": "fake", "torch": "1"})
    candidates.known.cache_clear()
    use_cache(monkeypatch, tmp_path / "first")
    yield
    candidates.known.cache_clear()
    proofs.forget()


def use_cache(monkeypatch, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    proofs.forget()


def run(capsys, *options):
    code = run_command_line(["kernels", "prove", "--dtype", "fp16", "--quiet", *options])
    return code, *capsys.readouterr()


def plant(monkeypatch, config):
    own = prove.runner

    def runner(chosen, groups):
        if chosen != config:
            return own(chosen, groups)
        return lambda x, w, c: own(configs.ONE_FOR_ALL, groups + (len(x) > 4))(x, w, c)

    monkeypatch.setattr(prove, "runner", runner)


def test_what_is_proven_is_kept_shown_and_exported(capsys, tmp_path):
    code, out, _ = run(capsys, "--tune", "--export", "sent.json")
    assert code == 0
    assert "PASS  3 of 3 configurations of 1 shape are in their shape's bit class" in out
    assert "caught" in out
    assert "1.000 times the frozen tables' speed (geometric mean of 3 cells)" in out
    (kept,) = (tmp_path / "first" / "ndcheck").iterdir()
    assert json.loads(kept.read_text()) == json.loads((tmp_path / "sent.json").read_text())


@pytest.mark.parametrize(
    ("config", "code"), [(GOOD, 1), (LATE, 0)], ids=["selectable", "candidate"]
)
def test_a_planted_configuration_is_named(capsys, monkeypatch, config, code):
    plant(monkeypatch, config)
    found, out, _ = run(capsys, "--tune")
    assert found == code
    assert f"shut out of float16 32x512 in 1: {config.label}: other bits at 17 rows" in out
    table = proofs.proofs(torch.device("cpu")).table("float16 32x512 in 1")
    assert all(choice.config != config for choice in table)


def test_a_proof_travels_to_a_machine_of_its_kind(capsys, monkeypatch, tmp_path):
    run(capsys, "--export", "sent.json")
    use_cache(monkeypatch, tmp_path / "second")
    code, out, _ = run(capsys, "--import", "sent.json")
    assert (code, out) == (
        0, "1 shapes taken over from sent.json, 1 of them proven again here\n"
    )  # fmt: skip
    (kept,) = (tmp_path / "second" / "ndcheck").iterdir()
    assert json.loads(kept.read_text()) == json.loads((tmp_path / "sent.json").read_text())


def test_one_that_does_not_hold_here_is_not_taken_over(capsys, monkeypatch, tmp_path):
    run(capsys, "--export", "sent.json")
    use_cache(monkeypatch, tmp_path / "second")
    plant(monkeypatch, GOOD)
    code, _, err = run(capsys, "--import", "sent.json")
    assert code == 1
    assert (
        f"nothing is taken over: float16 32x512 in 1, {GOOD.label}: there None, here other" in err
    )
    assert not (tmp_path / "second").exists()


def test_one_of_other_versions_is_refused(capsys, monkeypatch, tmp_path):
    run(capsys, "--export", "sent.json")
    use_cache(monkeypatch, tmp_path / "second")
    monkeypatch.setattr(proofs, "environment", lambda _: {"gpu": "fake", "torch": "2"})
    code, _, err = run(capsys, "--import", "sent.json")
    assert (code, "another environment: torch was 1, here 2" in err) == (2, True)
    assert run(capsys, "--import", "missing.json")[0] == 2
