"""What a newcomer types: every command of README.md, those that a first run advises, and guesses.

    PYTHONPATH=.:kernels python -m bench.reliability.newcomer --out table.md

In an empty directory, one after the other, offline, those of README.md with NDCHECK_SAMPLES and
NDCHECK_MAX_TOKENS small where they name neither. A row is a command, its exit code and the first
line that it says. It fails where a command ends as none should (exit code 4, a traceback, nothing
said), or where one that is advised or shown does not do its work. `--first DIR` takes a run of the
default's instead of making it, `--only PATTERN` some commands.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import ndcheck

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
SMALL = {"NDCHECK_SAMPLES": "24", "NDCHECK_MAX_TOKENS": "16"}
ELSEWHERE = ("Qwen/", "--engine vllm", "torchrun", "kernels bench", "prove --tune", "bisect")
"""What takes a download, other machines, or minutes of timing: refused, or not run."""
SCORES = '{"prompt_ids": [1, 2], "completion_ids": [3, 4], "logprobs": [-0.5, -0.25]}\n'
SHOWS = frozenset({0, 1, 3})
"""It did its work, whatever it found."""
GUESSES = {
    "ndcheck": 0,
    "ndcheck help": 0,
    "ndcheck help run": 0,
    "ndcheck help rnu": 2,
    "ndcheck kernels": 0,
    "ndcheck --version": 0,
    "ndcheck help score": 0,
    "ndcheck help bisect": 0,
    "ndcheck rnu": 2,
    "ndcheck score": 2,
    "ndcheck score latest --help": 0,
    "ndcheck bisect": 2,
    "ndcheck compare latest": 2,
    "ndcheck kernels doctor": 2,
    "ndcheck runs": 0,
    "ndcheck run first": 2,
    "ndcheck run ./my-model": 2,
    "ndcheck run --model ./my-model": 2,
    "ndcheck run --model nobody/no-model": 2,
    "ndcheck run http://127.0.0.1:1/v1": 2,
    "ndcheck run --endpoint http://127.0.0.1:1/v1 --model m": 4,
    "ndcheck run -p 'SELECT 1;' --dry-run": 0,
    "echo 'SELECT 1;' | ndcheck run -p - --dry-run": 0,
    "echo 'SELECT 1;' | ndcheck run --prompt - --dry-run": 0,
    "echo 'SELECT 1;' | ndcheck run --prompts-file - --dry-run": 0,
    "ndcheck run --loads 1-8 --dry-run": 0,
    "ndcheck run --loads 1-64:x2 --dry-run": 0,
    "ndcheck run --loads 8-1": 2,
    "ndcheck run --widths 2-16 --axes width --dry-run": 0,
    "ndcheck run --widths 1": 2,
    "ndcheck run --axes scoring,width --dry-run": 0,
    "ndcheck run --dtype bfloat16 --dry-run": 0,
    "ndcheck run --dtype float16 --dry-run": 0,
    "ndcheck run --dtype float32 --dry-run": 0,
    "ndcheck run --dtype float8": 2,
    "ndcheck run --axes batch-size --loads 1": 2,
    "ndcheck run --axes batchsize": 2,
    "ndcheck order liner": 2,
    "ndcheck report latest": 0,
    "ndcheck gate latest": 1,
    "ndcheck mock-server --help": 0,
    "ndcheck mock-server --fault no-such": 2,
}


@dataclass(frozen=True, slots=True)
class Command:
    """``line`` as it is read, and what is typed; ``right`` are the exit codes that serve."""

    source: str
    line: str
    typed: str
    right: frozenset[int]


def shown(readme: str, server: str) -> Iterator[Command]:
    """The commands of README.md, with the names that a user has to fill in."""
    blocks = re.findall(r"^```(?:bash|text)\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = [
        line.strip().removeprefix("$ ")
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", readme, flags=re.MULTILINE | re.DOTALL)
    lines += [line.replace("\n", " ") for line in re.findall(r"`(ndcheck [^`]*)`", prose)]
    for line in dict.fromkeys(line for line in lines if line.startswith(("ndcheck ", "torchrun "))):
        typed = line.replace("--run DIR", "--run first").replace("--resume DIR", "--resume first")
        typed = typed.replace(" DIR", " first").replace(" A B", " first first")
        typed = typed.replace(" RUN", " first")
        typed = typed.replace("http://127.0.0.1:8000/v1 --model NAME", f"{server} --model mock")
        if typed == "ndcheck run --endpoint":
            typed += f" {server} --model mock"
        typed += " linear --rows 1-4" * (typed == "ndcheck order")
        typed += " first first" * (typed == "ndcheck compare")
        typed += " ndcheck-runs" * (typed == "ndcheck runs")
        typed += " manifest.json" * (typed == "ndcheck kernels manifest")
        right = frozenset({2, 4}) if any(name in line for name in ELSEWHERE) else SHOWS
        yield Command("README", line, typed, right)


def advised(screen: str) -> Iterator[Command]:
    """The next steps on a run's screen."""
    for line in screen.replace("\\\n", " ").splitlines():
        if line.startswith("  ndcheck "):
            yield Command("advice", line.strip(), line.strip(), SHOWS)


def guesses() -> Iterator[Command]:
    for line, code in GUESSES.items():
        yield Command("guess", line, line, frozenset({code}))


def run(typed: str, directory: Path, variables: Mapping[str, str]) -> tuple[int, str, float]:
    """Exit code, all that was said, and seconds."""
    program = f"{shlex.quote(sys.executable)} -m ndcheck"
    typed = re.sub(r"(^|\| )ndcheck\b", rf"\1{program}", typed)
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", typed],
        cwd=directory,
        env={**os.environ, **ENVIRONMENT, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    progress = ("loading ", "timing ", "opening ", "probing ")
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if line.strip() and not line.removeprefix("ndcheck: ").startswith(progress)
    ]
    return done.returncode, "\n".join(said), time.monotonic() - started


@contextmanager
def mock_server(directory: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "ndcheck", "mock-server", "--port", "0"],
        cwd=directory,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def write_gate_config(readme: str, directory: Path) -> None:
    found = re.search(r"<!-- gate config -->\n```toml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit("README.md holds no gate config")
    (directory / "ndcheck.toml").write_text(found[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    failures = 0
    with (
        tempfile.TemporaryDirectory() as name,
        mock_server(directory := Path(name)) as server,
        options.out.open("w", encoding="utf-8") as table,
    ):
        write_gate_config(readme, directory)
        shutil.copy(ROOT / "README.md", directory)
        for scores in ("rollouts.jsonl", "trainer.jsonl"):
            (directory / scores).write_text(SCORES)
        first = directory / "first"
        if options.first is None:
            run("ndcheck run --out first", directory, {})
        else:
            shutil.copytree(options.first, first)
        (directory / "ndcheck-runs").mkdir()
        shutil.copytree(first, directory / "ndcheck-runs" / "first")
        screen = run("ndcheck report first", directory, {})[1]
        commands = [*advised(screen), *guesses(), *shown(readme, server)]
        table.write("| from | command | exit | s | first line |\n|---|---|---|---|---|\n")
        for command in commands:
            if not re.search(options.only, command.line):
                continue
            if "torchrun" in command.line or "kernels bench" in command.line:
                row, is_right = ("-", "not run here", 0.0), True
            else:
                small = SMALL if command.source == "README" else {}
                code, said, elapsed_s = run(command.typed, directory, small)
                is_right = code in command.right and said != "" and "Traceback" not in said
                row = (str(code), said.partition("\n")[0], elapsed_s)
            failures += not is_right
            code_shown = row[0] if is_right else f"**{row[0]}**"
            line, says = (text.replace("|", r"\|") for text in (command.line, row[1][:100]))
            table.write(f"| {command.source} | `{line}` | {code_shown} | {row[2]:.0f} | {says} |\n")
            table.flush()
        table.write(
            f"\nndcheck {ndcheck.__version__}, torch {version('torch')}, Python "
            f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores\n"
        )
    print(f"{failures} of {len(commands)} commands did not serve: {options.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
