"""What the command line makes of recorded runs, byte for byte as it was kept under ``kept/``.

After a change on purpose, `python tests/reports/test_kept_outputs.py` keeps the outputs anew: read
their diff. With a new folder they go there, to compare the outputs of two commits.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest

from ndcheck.cli.app import run_command_line

RUNS = Path(__file__).parents[1] / "runs"
KEPT = Path(__file__).parent / "kept"
RECORDED = sorted(path.name for path in RUNS.iterdir() if path.is_dir())
DETAILED = ("embedded", "endpoint", "fork")
"""Those whose JSON documents, which are large, are kept too."""

SUMS = """
def add(x, columns):
    total = x[:, columns[0]].clone()
    for column in columns[1:]:
        total = total + x[:, column]
    return total

def steady(x):
    return add(x, range(x.shape[1]))

def switching(x):
    return add(x, range(x.shape[1]) if len(x) < 3 else range(x.shape[1] - 1, -1, -1))

def no_sum(x):
    return add(x * x, range(x.shape[1]))
"""
"""Additions of one element at a time, which every machine does alike."""

COMMANDS = {
    **{f"{name}/report.txt": f"report {name}" for name in RECORDED},
    **{f"{name}/report.json.txt": f"report {name} --json" for name in DETAILED},
    "fork/page.txt": "report fork --html",
    "runs.txt": "runs .",
    "runs.json.txt": "runs . --json",
    "gate.txt": "gate clean out-of-memory --junit junit.xml",
    "gate.json.txt": "gate clean out-of-memory --json",
    "gate-rules.txt": "gate embedded --allow-latent --max-slowdown 1.5 --max-unique 1",
    "gate-baseline.txt": "gate fork --baseline clean --fail-on tokens,bits,rate",
    "compare.txt": "compare clean fork",
    "compare.json.txt": "compare clean fork --json",
    "compare-apart.txt": "compare fork hostile",
    "compare-fail-on.txt": "compare schema-1 embedded --fail-on environment,load,bits",
    "order.txt": "order --fn sums.py:switching --terms 8 --rows 1-4 --svg tree.svg --dot tree.dot",
    "order.json.txt": "order --fn sums.py:steady --terms 8 --rows 1,2 --json",
    "order-of-no-sum.txt": "order --fn sums.py:no_sum --terms 8 --rows 1,2",
    "trace-of-nothing.txt": "trace --run clean",
    "trace-of-no-model.txt": "trace --run fork",
    "trace-of-a-server.txt": "trace --run endpoint",
    "shrink-of-nothing.txt": "shrink --run clean",
    "shrink-of-no-model.txt": "shrink --run fork",
    "plan.txt": "run --model scripted:clean --loads 1,3 -n 24 --max-tokens 4 --dry-run",
    "plan-in-full.txt": "run --model scripted:clean --loads 1,3 -n 24 --max-tokens 4 --dry-run "
    "--verbose",
    "live-batch-dependent.txt": "run --model scripted:batch-dependent --loads 1,2 -n 4 "
    "--max-tokens 5 --kernels stock,invariant --out live-batch-dependent",
    "live-latent.txt": "run --model scripted:latent --mode mixed --loads 1,2 -n 4 "
    "--max-tokens 5 --temperature 0.7 --allow-latent --out live-latent",
    "live-out-of-memory.txt": "run --model scripted:out-of-memory --loads 2,4 -n 4 "
    "--max-tokens 4 --out live-out-of-memory",
}
"""Where the screen of each command is kept; all run in one folder, in this order."""


def mask(name: str, text: str) -> str:
    """Everything that is left out of the comparison.

    Of pages the scripts and styles, whose digests the page's policy holds; of live runs what the
    day, the machine and the installed versions are.
    """
    if name.endswith(".html"):
        text = re.sub(r"(?s)<(script|style)>.*?</\1>", r"<\1></\1>", text)
    if name.startswith("live-"):
        text = re.sub(r"(?m)^model     .*\n( {10}.*\n)*", "model     ...\n", text)
        text = re.sub(r'(?ms)^( *)"environment": \{.*?^\1\}', r'\1"environment": {}', text)
        text = re.sub(r'"(run_id|started_at|ndcheck_version|nonce)": ".*"', r'"\1": "..."', text)
        text = re.sub(r'(?m)^\{"nonce":"\w+"', '{"nonce":"..."', text)
    return text


def transcript(command: str, out: str, err: str, code: int) -> str:
    return f"$ ndcheck {command}\n{out}--- stderr\n{err}--- exit code {code}\n"


def environment() -> dict[str, str]:
    ours = ("NDCHECK_", "TRITON_INTERPRET")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": "gate-summary.md",
    }


def say(command: str) -> str:
    """The screen of a command run in this process, whose clock ticks whenever it is read."""
    ticks = (n / 1024 for n in itertools.count())
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(time, "perf_counter", ticks.__next__),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run_command_line(shlex.split(command))
    return transcript(command, out.getvalue(), err.getvalue(), code)


def set_out(folder: Path) -> None:
    """The recorded runs, and the functions that `ndcheck order` reads."""
    for name in RECORDED:
        shutil.copytree(RUNS / name, folder / name)
    (folder / "sums.py").write_text(SUMS)


def render() -> dict[str, str]:
    """Every screen, and every file that the commands wrote, by the name under which it is kept."""
    handler = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        set_out(folder)
        given = set(folder.rglob("*"))
        with mock.patch.dict(os.environ, environment(), clear=True), contextlib.chdir(folder):
            texts = {name: say(command) for name, command in COMMANDS.items()}
        for path in sorted(set(folder.rglob("*")) - given):
            name = path.relative_to(folder).as_posix()
            # The reports of a live run are those of a recorded one but for its environment.
            is_report = name.startswith("live-") and path.suffix not in (".json", ".jsonl")
            if path.is_file() and "__pycache__" not in name and not is_report:
                texts[name] = path.read_bytes().decode()
    signal.signal(signal.SIGTERM, handler)
    return {name: mask(name, text) for name, text in texts.items()}


def kept(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in paths}


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return render()


@pytest.mark.parametrize("name", sorted(kept(KEPT)))
def test_an_output_is_as_it_was_kept(rendered, name) -> None:
    assert rendered.get(name) == kept(KEPT)[name], f"on purpose? python {Path(__file__)}"


def test_no_output_is_new(rendered) -> None:
    assert set(rendered) == set(kept(KEPT))


@pytest.mark.parametrize("name", ["fork/report.txt", "compare-apart.txt"])
def test_another_process_shows_the_same(name, warm_python, tmp_path) -> None:
    set_out(tmp_path)
    done = subprocess.run(
        [warm_python(), "-m", "ndcheck", *shlex.split(COMMANDS[name])],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    shown = transcript(COMMANDS[name], done.stdout, done.stderr, done.returncode)
    assert shown == kept(KEPT)[name]


if __name__ == "__main__":
    outputs = render()
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
        target.mkdir()
    else:
        target = KEPT
        shutil.rmtree(target)
    for name, text in outputs.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(text.encode())
