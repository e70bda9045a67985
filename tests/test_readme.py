"""The README's help texts are the program's own; `python tests/test_readme.py` writes them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- help: written by tests/test_readme.py -->\n", "<!-- end of help -->"


def help_text(*command: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NDCHECK_")}
    done = subprocess.run(
        [sys.executable, "-m", "ndcheck", *command, "--help"],
        env={**kept, "COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return "\n".join(map(str.rstrip, done.stdout.strip().splitlines()))


def commands() -> list[str]:
    from ndcheck.cli.app import app

    return [c.callback.__name__ for c in app.registered_commands if not c.hidden]


def blocks() -> str:
    return "".join(
        f"\n<details>\n<summary><code>ndcheck {command} --help</code></summary>\n\n"
        f"```text\n{help_text(command)}\n```\n\n</details>\n"
        for command in commands()
    )


def test_the_readme_shows_the_help_of_every_command():
    text = README.read_text(encoding="utf-8")
    shown = text.partition(START)[2].partition(END)[0]
    assert "ndcheck run --help" in shown
    assert shown == blocks(), "run: python tests/test_readme.py"


def test_every_command_is_in_the_table():
    text = README.read_text(encoding="utf-8")
    for command in commands():
        assert f"| `ndcheck {command}" in text, command


def test_the_commands_of_the_guide_are_understood(tmp_path):
    text = README.read_text(encoding="utf-8")
    guide = text.partition("## Why are my outputs nondeterministic?")[2].partition("\n## ")[0]
    found = re.findall(r"`ndcheck (run [^`]*)`", guide)
    assert len(found) >= 4
    for command in found:
        arguments = [*shlex.split(command), "--model", "scripted:clean", "--dry-run"]
        done = subprocess.run(
            [sys.executable, "-m", "ndcheck", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    README.write_text(before + START + blocks() + END + rest.partition(END)[2], encoding="utf-8")
