"""Parts of a benchmark end when their time does, with what they run, and are named."""

import subprocess
import sys
import time

from bench.parts import run_parts


def test_a_part_that_takes_too_long_is_cut_short(capsys):
    done, started = [], time.monotonic()

    def wait_for_another():
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=True)

    parts = [
        ("short", lambda: done.append("short")),
        ("wrong", lambda: 1 / 0),
        ("long", wait_for_another),
        ("late", lambda: done.append("late")),
    ]
    assert run_parts(parts, 1.0) == 1
    assert time.monotonic() - started < 30
    assert done == ["short"]
    out = capsys.readouterr().out
    assert "late: no time left" in out
    assert "failed: wrong, long (cut short)" in out


def test_parts_that_all_end_are_no_failure(capsys):
    assert run_parts([("short", lambda: None)], 60) == 0
    assert "failed: nothing" in capsys.readouterr().out
