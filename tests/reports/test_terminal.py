from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from ndcheck.analysis.summary import ControlFinding
from ndcheck.judging.verdict import judge
from ndcheck.probe import Message
from ndcheck.records import Probe
from ndcheck.reports.progress import progress_line
from ndcheck.reports.terminal import print_report
from ndcheck.request import DEFAULTS


def screen(example, width=80, directory="runs/a", **console) -> str:
    file = io.StringIO()
    there = replace(example, directory=Path(directory))
    print_report(Console(file=file, width=width, **console), there, DEFAULTS)
    return file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 81, 120])
@pytest.mark.parametrize(
    "name",
    ["failing", "two_arms", "passing", "inconclusive", "empty", "all_errors", "many", "hostile"],
)
def test_no_line_is_wider_than_the_screen(name, width, request) -> None:
    lines = screen(request.getfixturevalue(name), width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


def test_the_verdict_comes_first(failing, passing, inconclusive) -> None:
    assert screen(failing).startswith(
        "FAIL  8 of 1000 loads diverged (0.8 %, 95 % CI 0.345-1.57 %)\n"
    )
    assert screen(passing).startswith("PASS  0 of 368 loads diverged; rate < 0.998 % at 95 %\n")
    lines = screen(inconclusive).splitlines()
    assert lines[0] == "INCONCLUSIVE  0 of 28 loads diverged; rate < 12.4 % at 95 %"
    reason = " ".join(line.strip() for line in lines[1:3])
    assert reason == r"samples that ended in an error: 100; the first: HTTP 500: no memory\x1b[2J"


def test_the_tree_counts_tokens_from_one(failing) -> None:
    shown = screen(failing)
    assert "102 tokens in common: " in shown
    assert "  at token 103 (top-2 margin 0.0078):\n" in shown
    assert "    992  ' Queens, New York, on May 11, 1918.\\n' (reference)\n" in shown
    assert "      8  ' New York City, on May 11, 1918.\\n'\n" in shown


def test_every_prompt_that_fails_has_a_command_of_its_own(failing, passing) -> None:
    def screen_of(*examples, messages=(), width=80) -> str:
        prompts = [(f"p{i}", f"prompt{i}") for i in range(1, len(examples) + 1)]
        spec = replace(failing.run.spec, probes=tuple(Probe(*p, messages) for p in prompts))
        run = replace(failing.run, spec=spec)
        probes = [
            replace(each.summary.probes[0], probe_id=name, arm="stock")
            for each, (name, _) in zip(examples, prompts, strict=True)
        ]
        summary = replace(failing.summary, probes=tuple(probes))
        judgement = judge(run, summary)
        return screen(replace(failing, run=run, summary=summary, judgement=judgement), width)

    shown = screen_of(failing, passing, failing)
    for i in (1, 3):
        after = shown.partition(f"p{i} fails; measure it alone:\n")[2]
        assert after.startswith(f"  ndcheck run --prompt prompt{i} ")
    assert "p2 fails" not in shown
    # Where it would be broken, the report beside it has it.
    assert "To measure p1, p3\n" in screen_of(failing, passing, failing, width=20)
    assert "alone:" not in screen_of(failing)
    # An option would hold the last message alone, which is another prompt.
    turns = (Message("user", "hi"), Message("assistant", "yes"), Message("user", "prompt"))
    talk = screen_of(failing, passing, failing, messages=turns)
    assert "p1 fails\n" in talk
    assert "p3 fails\n" in talk
    assert "alone:" not in talk


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", ["failing", "two_arms", "passing", "inconclusive"])
def test_no_word_is_broken(name, width, request) -> None:
    assert "…\n" not in screen(request.getfixturevalue(name), width).replace("'…\n", "\n")
    words = screen(request.getfixturevalue(name), width).split()
    for whole in ("run-to-run", "neighbours", "diverged"):
        assert whole in words


def test_a_load_whose_bits_alone_differ_is_a_row_of_its_own(two_arms) -> None:
    probe = two_arms.summary.probes[0]
    loads = list(probe.loads)
    index = next(i for i, x in enumerate(loads) if (x.axis, x.batch_size) == ("cache", 16))
    for latent in (0, 1):
        loads[index] = replace(loads[index], latent=latent)
        summary = replace(two_arms.summary, probes=(replace(probe, loads=tuple(loads)),))
        shown = screen(replace(two_arms, summary=summary))
        rows = [line.split() for line in shown.splitlines() if line.startswith("chunked ")]
        assert (["chunked", "16", "0", "1", "1"] in [row[:5] for row in rows]) == bool(latent)


def test_many_completions_are_cut_to_the_top_ones(many) -> None:
    shown = screen(many)
    assert "3739 completions, 80 unique\n" in shown
    assert "and 75 more, 2925 of 3739 samples\n" in shown


def test_hostile_text_stays_text(hostile) -> None:
    for colour in (None, "truecolor"):
        shown = screen(hostile, force_terminal=colour is not None, color_system=colour)
        assert "[red]markup[/red]" in shown
        assert r"\x1b[31mred\x1b[0m" in shown
        assert "\x1b[31mred" not in shown
        assert not set(shown) & {"\0", "\u202e", "\r", "\ud800"}


def test_plain_without_a_terminal_and_with_no_color(failing, monkeypatch) -> None:
    assert "\x1b" not in screen(failing)
    assert "\x1b[1;31m" in screen(failing, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in screen(failing, force_terminal=True, color_system="standard")


def test_many_probes_show_the_worst_first(failing) -> None:
    (probe,) = failing.summary.probes
    (verdict,) = failing.judgement.probes
    ids = [f"p{i}" for i in range(1, 13)]
    spec = replace(failing.run.spec, probes=tuple(Probe(i, f"prompt {i}") for i in ids))
    passed = replace(verdict.verdict, outcome="PASS", reasons=())
    example = replace(
        failing,
        run=replace(failing.run, spec=spec),
        summary=replace(failing.summary, probes=tuple(replace(probe, probe_id=i) for i in ids)),
        judgement=replace(
            failing.judgement,
            probes=tuple(
                replace(verdict, probe_id=i, verdict=verdict.verdict if i == "p7" else passed)
                for i in ids
            ),
        ),
    )
    lines = screen(example).splitlines()
    assert lines[0].startswith("FAIL  p7  ")
    assert lines[8] == "          and 4 more in summary.csv"
    assert "prompt    p7: 'prompt p7'" in lines
    assert any(
        line.startswith("repeat    ndcheck run --prompts-file runs/a/prom") for line in lines
    )


def test_next_steps_follow_from_the_findings(failing, passing, inconclusive) -> None:
    shown = screen(failing)
    assert "  ndcheck run --loads 4 --axes batch-size -n 1000 --kernels stock\n" in shown
    assert "Try batch-invariant kernels:\n  ndcheck run --loads 1,2,4,8,16,32 -n 1000\n" in shown
    assert "  ndcheck report runs/a\n" in shown
    assert "  ndcheck run --kernels invariant --target-rate 0.001\n" in screen(passing)
    assert "  ndcheck doctor\n" in screen(inconclusive)


def test_an_interrupted_run_says_how_to_go_on(passing) -> None:
    (probe,) = passing.summary.probes
    run = replace(passing.run, status="interrupted")
    shown = screen(replace(passing, run=run), directory="my runs/a")
    assert "Go on:\n  ndcheck run --resume 'my runs/a'\n" in shown
    control = replace(probe, control=ControlFinding(0, 0))
    assert "doctor" not in screen(
        replace(passing, summary=replace(passing.summary, probes=(control,)))
    )


def test_a_command_that_would_break_is_not_shown(passing) -> None:
    spec = replace(passing.run.spec, probes=(Probe("p1", "word " * 50),))
    shown = screen(replace(passing, run=replace(passing.run, spec=spec)))
    assert "repeat    the command is too long for the screen: see report.md\n" in shown


def test_every_percentage_has_its_denominator(failing, two_arms, passing) -> None:
    for example in (failing, two_arms, passing):
        for line in screen(example).splitlines():
            if " %" in line and not line.startswith(("property", "Exclude", "Each interval")):
                assert " of " in line or "/" in line


def test_progress_line() -> None:
    assert progress_line(412, 1000, {"stock": 2, "invariant": 1}, 102, 42.4, 79) == (
        "412/1000 trials  unique: stock 2, invariant 1  diverged at token 103  0:42 left"
    )
    assert progress_line(0, 75, {}, None, None) == "0/75 trials"
    assert progress_line(5, 75, {"stock": 1}, None, 3700).endswith("  unique: stock 1  61:40 left")
    long = progress_line(10**9, 10**9, {"stock": 10**9, "invariant": 10**9}, 10**6, 10**6, 40)
    assert cell_len(long) == 40
