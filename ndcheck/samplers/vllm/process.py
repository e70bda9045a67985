"""An engine's worker process: started, asked, and its death told from its silence."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ndcheck.errors import BackendError, TrialError, UsageError, how_it_ended
from ndcheck.records import Arm, InvariantBy

VARIABLES = {
    # In the engine's own process, so that every row is waiting before the first pass.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}
N_LOG_LINES = 4
POLL_S = 0.5
ENDING_S = 10.0
PLUGIN: dict[InvariantBy, str] = {"auto": "auto", "ndcheck": "strict", "vllm": "0"}
"""What NDCHECK_VLLM is in the invariant arm: the plug-in of ndcheck_kernels reads it."""


class Worker:
    """One arm's engine. `ask` sends a JSON object and returns the answer.

    Raises UsageError where the engine refuses its arguments, TrialError where one batch failed,
    BackendError with the last lines of its log where the process failed or died.
    """

    def __init__(
        self, arm: Arm, arguments: dict[str, Any], invariant_by: InvariantBy = "auto"
    ) -> None:
        self._arm = arm
        is_invariant = arm == "invariant"
        with tempfile.NamedTemporaryFile(
            prefix=f"ndcheck-{arm}-", suffix=".log", delete=False
        ) as log:
            self.log = Path(log.name)
            self._process = subprocess.Popen(
                # -P: a file in the current directory must not pass for one of the engine's.
                [sys.executable, "-P", "-m", "ndcheck.samplers.vllm.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={
                    **os.environ,
                    **VARIABLES,
                    "VLLM_BATCH_INVARIANT": str(int(is_invariant)),
                    "NDCHECK_VLLM": PLUGIN[invariant_by] if is_invariant else "0",
                },
                # Ctrl-C is for ndcheck, which ends its workers and their children itself.
                start_new_session=True,
            )
        self._received = b""
        self._has_failed = False
        try:
            start = {"arguments": arguments, "invariant": is_invariant, "by": invariant_by}
            self.ready: dict[str, Any] = self.ask(start)["ready"]
        except BaseException:
            self.close()
            raise

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send one message and wait for its answer, for as long as the process lives."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._death() from error
        answer = json.loads(self._read_line())
        if "fatal" in answer:
            raise self._failure(f"failed: {answer['fatal']}")
        for kind in (UsageError, TrialError):
            if kind.__name__ in answer:
                raise kind(answer[kind.__name__])
        return dict(answer)

    def close(self) -> None:
        """End the process and its children. The log stays only where something failed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(ENDING_S)
            except (ProcessLookupError, PermissionError):
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            # What a dead process did not read any more cannot be flushed to it.
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        if not self._has_failed:
            self.log.unlink(missing_ok=True)

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._received:
            # A child of the worker may hold the pipe open, so its end is not told by the pipe.
            is_dead = self._process.poll() is not None
            if select.select([pipe], [], [], 0 if is_dead else POLL_S)[0]:
                part = os.read(pipe, 1 << 20)
                if part:
                    self._received += part
                    continue
                self._process.wait(ENDING_S)
                is_dead = True
            if is_dead:
                raise self._death()
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _death(self) -> BackendError:
        return self._failure(how_it_ended(self._process.wait()))

    def _failure(self, how: str) -> BackendError:
        self._has_failed = True
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = [line.strip() for line in lines if line.strip()][-N_LOG_LINES:]
        said = f" last log lines: {' | '.join(line[:200] for line in last)};" if last else ""
        return BackendError(
            f"the vLLM process of the {self._arm} arm {how};{said} whole log: {self.log}"
        )
