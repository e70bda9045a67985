"""The first minute: what is done and for how long, on terminals of two widths and in a log."""

from __future__ import annotations

import os
import pty
import re
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from ndcheck.cli import progress
from ndcheck.cli.progress import ActivityLine, activity_line
from ndcheck.errors import ACTIVITIES, doing


@given(st.text(), st.floats(0, 10_000), st.sampled_from([39, 79, 119]))
def test_a_line_fits_its_screen_and_keeps_the_time(what, elapsed_s, width):
    line = activity_line(what, elapsed_s, width)
    assert cell_len(line) <= width
    assert line.isprintable()
    minutes, seconds = map(int, line.rsplit(" ", 1)[1].split(":"))
    assert minutes * 60 + seconds == int(elapsed_s)


def test_a_text_is_cut_before_its_time():
    assert activity_line("loading the weights", 75, 39) == "loading the weights  1:15"
    assert activity_line("loading the weights", 75, 16) == "loading th  1:15"


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.02)


def wait_for(seen):
    end_s = time.monotonic() + 30
    while not seen() and time.monotonic() < end_s:
        time.sleep(0.01)
    assert seen()


def test_a_log_has_a_line_for_what_takes_long(quickly, capsys):
    said = ""

    def seen():
        nonlocal said
        said += capsys.readouterr().err
        return "weights" in said

    with ActivityLine(quiet=False), doing("opening m"), doing("loading the weights"):
        wait_for(seen)
    assert "ndcheck: loading the weights  0:00" in said.splitlines()
    assert "\x1b" not in said
    assert ACTIVITIES == []


def test_quiet_says_nothing(quickly, capsys):
    with ActivityLine(quiet=True), doing("loading the weights"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_has_one_line_that_is_taken_away(quickly, monkeypatch, columns):
    leader, follower = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    said = b""
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)

        def seen():
            nonlocal said
            said += os.read(leader, 4096)
            return b"0:00" in said

        with ActivityLine(quiet=False), doing("comparing its batches with generate() " * 3):
            wait_for(seen)
        time.sleep(0.05)
        said += os.read(leader, 65536)
    os.close(leader)
    shown = said.decode().split("\r\x1b[2K")
    assert shown[-1] == ""
    lines = {line for line in shown if line}
    assert all(re.fullmatch(r"comparing its batches.*  0:00", line) for line in lines)
    assert {len(line) for line in lines} == {columns - 1}


def test_the_progress_of_trials_is_not_hidden_by_what_each_does(quickly, capsys):
    with ActivityLine(quiet=False) as activity, doing("ndcheck run"):
        activity.settle()
        with doing("sampling trial 3"):
            time.sleep(0.2)
            quiet = capsys.readouterr().err
            said = []

            def seen():
                said.append(capsys.readouterr().err)
                return "first batch" in "".join(said)

            with doing("the first batch of the invariant arm"):
                wait_for(seen)
    assert "sampling" not in quiet
