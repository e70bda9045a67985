"""A bounded part of bench.reliability.fuzz: mutated files and command lines end well."""

from __future__ import annotations

import time

import pytest

from bench.reliability import fuzz, newcomer

N_READERS = 600
N_OPTIONS = 40


@pytest.mark.parametrize(("part", "count"), [("readers", N_READERS), ("options", N_OPTIONS)])
def test_nothing_is_uncaught_hangs_or_ends_with_a_wrong_code(part, count):
    findings = fuzz.Findings()
    getattr(fuzz, f"fuzz_{part}")(count, 7, findings)
    assert findings.failures == {}, findings.examples
    assert sum(findings.outcomes.values()) == count
    assert len(findings.outcomes) >= 2  # The control: not all are refused, nor all taken.


def test_what_goes_wrong_is_counted(monkeypatch):
    """The controls: a reader that crashes, one that believes everything, and one that hangs."""

    def crash(path, *, fully):
        raise KeyError("place")

    def hang(path, *, fully):
        time.sleep(10)

    for fault, kind in (
        (crash, "uncaught: KeyError"),
        (lambda path, *, fully: "PASS", "wrong exit code: a run that fails passed"),
        (lambda path, *, fully: "FAIL", "wrong exit code: a run that passes was accused"),
        (hang, "hang"),
    ):
        findings = fuzz.Findings()
        monkeypatch.setattr(fuzz, "read_run_and_judge", fault)
        monkeypatch.setattr(fuzz, "HANG_S", 1)
        fuzz.fuzz_readers(12 if fault != hang else 2, 7, findings)
        assert any(found.startswith(kind) for found in findings.failures), findings.failures


def test_a_newcomers_script_holds_what_the_readme_and_a_screen_show(tmp_path):
    readme = (newcomer.ROOT / "README.md").read_text(encoding="utf-8")
    lines = {command.line: command for command in newcomer.shown(readme, "http://host/v1")}
    for shown in ("ndcheck run --axes slot", "ndcheck order linear --rows 1-4,8,64"):
        assert lines[shown].typed == shown
    assert lines["ndcheck shrink --run DIR"].typed == "ndcheck shrink --run first"
    served = "ndcheck run --endpoint http://127.0.0.1:8000/v1 --model NAME --loads 1,2,4,8,16,32"
    assert "--endpoint http://host/v1 --model mock --loads" in lines[served].typed
    steps = "Narrow it down:\n  ndcheck run --loads 2 \\\n    -n 20\nnot ndcheck run\n"
    assert [c.typed.split() for c in newcomer.advised(steps)] == [
        ["ndcheck", "run", "--loads", "2", "-n", "20"]
    ]
    code, said, _ = newcomer.run("echo x | ndcheck rnu", tmp_path, {})
    assert (code, said) == (2, "ndcheck: No such command 'rnu', did you mean run?")
