"""What start-up imports, and what works without torch."""

from __future__ import annotations

import inspect
import subprocess
import sys

import typer

import ndcheck as package
from ndcheck.cli.app import app

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "triton", "tokenizers", "safetensors"):
    sys.modules[name] = None
from ndcheck.cli.app import run_command_line
sys.exit(run_command_line(sys.argv[1:]))
"""


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from ndcheck.cli.app import run_command_line; run_command_line(['--help']);"
        "print(*sorted(set(sys.modules) & {'torch', 'transformers', 'pandas', 'numpy', 'scipy',"
        " 'triton', 'matplotlib', 'httpx2'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert "Exit codes: 0 pass" in " ".join(done.stdout.split())


def test_version(ndcheck):
    assert ndcheck("--version", python=sys.executable).stdout == f"ndcheck {package.__version__}\n"


IN_A_CYCLE = """
import atexit, sys
class Last:
    def __del__(self):
        sys.stdout.write("taken apart\\n")
Last.own = Last()
atexit.register(lambda: sys.stdout.write("at exit\\n"))
from ndcheck.__main__ import main
main()
"""


def test_the_end_is_not_waited_for_but_nothing_is_lost(tmp_path, environment):
    """What was registered runs, and its output and the exit code arrive; objects are left alone."""
    for arguments, code in ((["--version"], 0), (["gate", "missing"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", IN_A_CYCLE, *arguments], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code
        assert done.stdout.endswith("at exit\n")
        assert len(done.stderr.splitlines()) == (code != 0)


def test_report_is_byte_identical_and_needs_no_torch(ndcheck, tmp_path, environment):
    first = ndcheck("run", "--model", "scripted:flaky", "--max-tokens", "8", "--out", "run", "-q")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    for file in (tmp_path / "run").glob("*.csv"):
        file.unlink()
    again = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "report", "run", "--exit-code"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 1, again.stderr
    assert again.stdout == first.stdout
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_current_directory_shadows_nothing(ndcheck, tmp_path):
    """`python -m ndcheck` from a directory with files named like dependencies."""
    for name in ("rich.py", "numpy.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    command = ("run", "--model", "scripted:clean", "--dry-run")
    assert ndcheck(*command, python=sys.executable).returncode == 0


def test_doctor_catches_every_planted_fault(ndcheck):
    done = ndcheck("doctor")
    assert done.returncode == 0, done.stdout
    assert "FAILED" not in done.stdout
    assert done.stdout.count("\n  ok ") == 12


def test_every_option_is_named_in_full():
    """typer 0.27 takes a metavar that equals the parameter's name for the name: `--MODEL`."""
    for command in app.registered_commands:
        for parameter in inspect.signature(command.callback, eval_str=True).parameters.values():
            for info in getattr(parameter.annotation, "__metadata__", ()):
                if isinstance(info, typer.models.OptionInfo):
                    names = [*(info.param_decls or ()), info.default]
                    named = [n for n in names if isinstance(n, str) and n.startswith("--")]
                    assert named, f"{command.callback.__name__}: {parameter.name}"
                    assert [n.lower() for n in named] == named
