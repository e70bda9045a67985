"""The process of one arm: it opens the model once more, and runs the trials that it is sent."""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from ndcheck.errors import BackendError


def main() -> None:
    """Answer each message on the connection whose descriptor is the argument.

    The first holds the spec and the number of threads, and is answered by the digest of the
    weights and the token ids of the prompts; the others hold what `Sampler.sample` takes, and are
    answered by its samples. An exception is an answer too.
    """
    connection = Connection(int(sys.argv[1]))
    messages = queue.SimpleQueue[Any]()
    threading.Thread(target=_read, args=(connection, messages), daemon=True).start()
    try:
        with _silence():
            import torch

            from ndcheck.samplers.local.sampler import TransformersSampler

            spec, n_threads = messages.get()
            torch.set_num_threads(n_threads)
            sampler = TransformersSampler(spec)
            prompts = [sampler.encode(probe.content) for probe in spec.probes]
            opened = sampler.describe()["digest"], prompts
    except Exception as error:
        connection.send_bytes(_pickled(error))
        return
    connection.send_bytes(_pickled(opened))
    while True:
        try:
            answer: Any = sampler.sample(*messages.get())
        except Exception as error:
            answer = error
        connection.send_bytes(_pickled(answer))


def _read(connection: Connection, messages: queue.SimpleQueue[Any]) -> None:
    """Pass messages on; end the process, whatever it computes, as soon as its parent is gone."""
    while True:
        try:
            messages.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _pickled(answer: Any) -> bytes:
    try:
        answer_bytes = pickle.dumps(answer)
        if isinstance(answer, Exception):
            pickle.loads(answer_bytes)
        return answer_bytes
    except Exception:
        return pickle.dumps(BackendError(f"unexpected {type(answer).__name__}: {answer}"))


@contextmanager
def _silence() -> Iterator[None]:
    """Without stderr: the parent opens the same model and says the same."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


if __name__ == "__main__":
    main()
