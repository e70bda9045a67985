"""A process that works beside this one: both sides send each other objects.

It never outlives its parent, and its death is told from its silence.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from ndcheck.errors import BackendError, how_it_ended

ENDING_S = 10.0


class WorkerProcess:
    """Runs ``module``, whose main program talks to its `Parent`; errors call it ``name``."""

    def __init__(self, module: str, name: str) -> None:
        self.name = name
        self.connection, theirs = Pipe()
        self._process = subprocess.Popen(
            # -P: a file in the current directory must not pass for one of a dependency's.
            [sys.executable, "-P", "-m", module, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # Ctrl-C is for ndcheck, which ends the process itself.
            start_new_session=True,
        )
        theirs.close()

    def send(self, message: Any) -> None:
        """Raises BackendError if it is dead."""
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Any:
        """Its next answer. Raises it if it is an exception, and BackendError if it is dead."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, _Raised):
            raise answer.error from _ThereError(answer.where)
        return answer

    def close(self) -> None:
        """End the process and its children, whatever they do."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()

    def _death(self) -> BackendError:
        try:
            code = self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            return BackendError(f"{self.name} closed its connection")
        return BackendError(f"{self.name} {how_it_ended(code)}")


class Parent:
    """The process that started this one, which ends as soon as that one is gone."""

    def __init__(self) -> None:
        self._connection = Connection(int(sys.argv[1]))
        self._messages = queue.SimpleQueue[bytes]()
        threading.Thread(target=self._read, daemon=True).start()

    def receive(self) -> Any:
        return pickle.loads(self._messages.get())

    def send(self, answer: Any) -> None:
        """An exception is an answer too."""
        self._connection.send_bytes(_pickled(answer))

    def answer(self, call: Callable[..., Any]) -> NoReturn:
        """Each message holds the arguments of ``call``; what that returns or raises goes back."""
        while True:
            try:
                answer = call(*self.receive())
            except Exception as error:
                answer = error
            self.send(answer)

    def _read(self) -> None:
        while True:
            try:
                self._messages.put(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)


class _Raised:
    """An exception as an answer, with the traceback that pickling takes from it."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.where = "".join(traceback.format_exception(error))


class _ThereError(Exception):
    """The traceback of an exception in another process."""


def _pickled(answer: Any) -> bytes:
    try:
        if not isinstance(answer, Exception):
            return pickle.dumps(answer)
        answer_bytes = pickle.dumps(_Raised(answer))
        pickle.loads(answer_bytes)
        return answer_bytes
    except Exception:
        return pickle.dumps(_Raised(BackendError(f"unexpected {type(answer).__name__}: {answer}")))
