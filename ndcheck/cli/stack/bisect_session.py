"""`ndcheck bisect` from options to exit code: an environment between two locks, step by step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import typer

from ndcheck.cli.console import EXIT_CODES, note
from ndcheck.errors import BackendError, UsageError
from ndcheck.judging.verdict import count
from ndcheck.reports.untrusted import visible
from ndcheck.stack.bisection import Found, Outcome, bisect
from ndcheck.stack.locks import Change, Lock, changes, read_lock
from ndcheck.storage.reading import decode, parse_json, read_text
from ndcheck.storage.run_directory import replacing, write_failure

STATE_FILE, LOGS = "bisect.json", "logs"
OUTCOMES: dict[int, Outcome] = {0: "good", 1: "bad"}


@dataclass(slots=True)
class State:
    """What was tested, kept after every step; a key is the numbers of the applied changes.

    ``asked`` is a digest of both locks and the command, which may hold secrets.
    """

    asked: str
    tested: dict[str, object] = field(default_factory=dict)


def run(
    good: Path, bad: Path, command: Sequence[str], out: Path, *, as_json: bool, quiet: bool
) -> int:
    """Name the package that flips the command's verdict. Returns the exit code."""
    locks = read_lock(good), read_lock(bad)
    differing = changes(*locks)
    if not differing:
        raise UsageError(f"{bad}: it pins what {good} pins; there is nothing to find")
    state = _read_state(out, locks, command)
    environment = Environment(out, locks, quiet=quiet)
    n_steps = 0

    def test(applied: frozenset[int]) -> Outcome:
        nonlocal n_steps
        n_steps += 1
        key = ",".join(map(str, sorted(applied)))
        names = ", ".join(differing[i].name for i in sorted(applied)) or "none"
        shown = f"step {n_steps}: {len(applied)} of {len(differing)} changed ({names})"
        if key not in state.tested:
            note(shown, quiet=quiet)
            state.tested[key] = environment.test(_wanted(locks[0], differing, applied), command)
            _write_state(out, state)
        outcome: Outcome = state.tested[key]  # type: ignore[assignment]
        note(f"{shown}: {outcome}", quiet=quiet)
        return outcome

    found = bisect(len(differing), test)
    if as_json:
        document = {
            **asdict(found),
            "steps": n_steps,
            "changes": [asdict(c.shown) for c in differing],
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        for line in _lines(found, differing, n_steps):
            typer.echo(line)
    return 0 if len(found.suspects) == 1 else EXIT_CODES["INCONCLUSIVE"]


def _lines(found: Found, differing: Sequence[Change], n_steps: int) -> list[str]:
    steps = f"{count(n_steps, 'step')}, {count(len(differing), 'package')} changed"
    if found.problem is not None:
        return [f"INCONCLUSIVE  {found.problem}; {steps}"]
    names = [visible(str(differing[i])) for i in found.suspects]
    if len(names) > 1:
        between = "; ".join(names)
        return [f"INCONCLUSIVE  one of these flips the verdict, no set between them could be "
                f"tested: {between}; {steps}"]  # fmt: skip
    alone = {
        "bad": "the good lock with this one change fails too",
        "good": "the good lock with this one change passes: it takes others with it",
        "unknown": "the good lock with this one change could not be tested",
    }
    assert found.alone is not None
    return [f"{names[0]}  flips the verdict", f"{alone[found.alone]}; {steps}"]


def _wanted(lock: Lock, differing: Sequence[Change], applied: frozenset[int]) -> dict[str, str]:
    packages = dict(lock.packages)
    for i in applied:
        change = differing[i]
        packages.pop(change.name, None)
        if change.bad is not None:
            packages[change.name] = change.bad
    return packages


class Environment:
    """One virtual environment that is brought from one set of packages to the next."""

    def __init__(self, out: Path, locks: Sequence[Lock], *, quiet: bool) -> None:
        self._folder = out / "environment"
        self._record = out / "installed.json"
        self._logs = out / LOGS
        self._options = tuple(dict.fromkeys(o for lock in locks for o in lock.options))
        self._quiet = quiet
        self._uv = shutil.which("uv")

    def test(self, packages: dict[str, str], command: Sequence[str]) -> Outcome:
        """Install and run; what does not install is unknown, the reason in the log."""
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{len(list(self._logs.iterdir())) + 1:03}.txt"
        with log.open("w") as file:
            if not self._bring_to(packages, file.fileno()):
                note(f"the packages cannot be installed together: {log}", quiet=self._quiet)
                return "unknown"
            file.flush()
            code = _call([*command], file.fileno(), self._inside())
        if code not in OUTCOMES:
            note(f"the command ended with {code}, neither 0 nor 1: {log}", quiet=self._quiet)
        return OUTCOMES.get(code, "unknown")

    @property
    def _python(self) -> str:
        return str((self._folder / "bin" / "python").absolute())

    def _inside(self) -> dict[str, str]:
        """The variables of a shell in which the environment is active."""
        folder = self._folder.absolute()
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONHOME"}
        path = f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {**kept, "PATH": path, "VIRTUAL_ENV": str(folder)}

    def _bring_to(self, packages: dict[str, str], log: int) -> bool:
        installed = self._installed()
        # While packages change, nobody knows what is there: then it is made anew.
        self._record.unlink(missing_ok=True)
        if installed is None:
            installed = {}
            self._create(log)
        wanted = {name: _digest(pin) for name, pin in packages.items()}
        gone = [name for name, pin in installed.items() if wanted.get(name) != pin]
        new = [pin for name, pin in packages.items() if installed.get(name) != wanted[name]]
        # Out first: pip takes the same version from elsewhere for what is there already.
        if gone and self._pip("uninstall", *(() if self._uv else ("-y",)), *gone, log=log):
            return False
        if new and self._pip("install", "--no-deps", *self._options, *new, log=log):
            return False
        self._record.write_text(json.dumps(wanted))
        return True

    def _installed(self) -> dict[str, str] | None:
        try:
            found = json.loads(self._record.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and Path(self._python).exists() else None

    def _create(self, log: int) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        make = (self._uv, "venv", "--python", sys.executable) if self._uv else (
            sys.executable, "-m", "venv")  # fmt: skip
        if _call([*map(str, make), str(self._folder)], log):
            raise BackendError(f"no virtual environment can be made: {self._logs}")

    def _pip(self, verb: str, *arguments: str, log: int) -> int:
        if self._uv:
            return _call([self._uv, "pip", verb, "--python", self._python, *arguments], log)
        return _call([self._python, "-m", "pip", verb, *arguments], log)


def _call(command: Sequence[str], log: int, variables: dict[str, str] | None = None) -> int:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, check=False
        )
    except OSError as error:
        os.write(log, f"{command[0]}: {error.strerror}\n".encode())
        return 127
    return done.returncode


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _read_state(out: Path, locks: Sequence[Lock], command: Sequence[str]) -> State:
    """What an earlier bisection of the same locks and command has tested."""
    asked = _digest([*(lock.packages for lock in locks), *command])
    file = out / STATE_FILE
    if not file.exists():
        return State(asked)
    try:
        kept = decode(State, parse_json(read_text(file)))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}; choose a new --out") from error
    if kept.asked != asked:
        raise UsageError(f"--out {out}: it holds the bisection of other locks or another command")
    if any(outcome not in ("good", "bad", "unknown") for outcome in kept.tested.values()):
        raise UsageError(f"{file} cannot be read: an outcome is none; choose a new --out")
    return kept


def _write_state(out: Path, state: State) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / STATE_FILE) as file:
            json.dump(asdict(state), file, indent=1)
    except OSError as error:
        raise write_failure(out, error) from error
