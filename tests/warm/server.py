"""Forks a process for each `client.py`; see there.

Arguments: the socket to listen on, and the process that it ends with. Once it listens, it goes to
the background.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

PRELOADED = (
    *("ndcheck.cli.run_session", "ndcheck.cli.gate_session", "ndcheck.samplers.local.sampler"),
    *("ndcheck.samplers.local.beside.compiling", "ndcheck_kernels.models.direct_layers"),
    *("ndcheck_kernels.cpu", "pydantic.type_adapter", "pydantic.types", "pydantic.fields"),
    *("ndcheck.reports.exports.tables", "pandas", "scipy.special", "torch._dynamo"),
    *("transformers.models.llama.modeling_llama", "transformers.quantizers.auto"),
    *("transformers.convert_slow_tokenizer", "transformers.models.auto.tokenization_auto"),
    "transformers.models.qwen3.modeling_qwen3",
)
"""With all that these import it is what a run imports."""


def serve(address: str, main: int) -> tuple[dict, list[int]]:
    """Return in each process that is to run something, with its request and its files."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    ended = os.pidfd_open(main)
    if os.fork():
        os._exit(0)
    n_keepers = 0
    while True:
        ready, *_ = select.select([listener, ended], [], [])
        if ended in ready:
            os._exit(0)
        client, _ = listener.accept()
        while n_keepers and os.waitpid(-1, os.WNOHANG)[0]:
            n_keepers -= 1
        n_keepers += 1
        if os.fork() == 0:
            listener.close()
            os.close(ended)
            content, files, *_ = socket.recv_fds(client, 2**20, 253)
            if process := os.fork():
                for fd in files:
                    os.close(fd)
                keep(client, process)
            client.close()
            return json.loads(content), files
        client.close()


def keep(client: socket.socket, process: int) -> NoReturn:
    """Pass signals on, and how the process ends; end it where the client is gone."""
    ended = os.pidfd_open(process)
    while True:
        ready, *_ = select.select([client, ended], [], [])
        if ended in ready:
            client.send(os.waitpid(process, 0)[1].to_bytes(4, "little"))
            os._exit(0)
        if number := client.recv(1):
            os.kill(process, number[0])
        else:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os._exit(0)


def take_over(request: dict, files: list[int]) -> None:
    """The client's directory, files, variables."""
    directory, *files = files
    os.fchdir(directory)
    os.close(directory)
    above = 1 + max(*request["open_files"], *files)
    for fd, number in zip(
        [fcntl.fcntl(fd, fcntl.F_DUPFD, above) for fd in files], request["open_files"], strict=True
    ):
        os.dup2(fd, number)
        os.close(fd)
    for fd in set(files) - set(request["open_files"]):
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["python"]
    if paths := os.environ.get("PYTHONPATH"):
        sys.path[:0] = paths.split(os.pathsep)


def run(arguments: list[str]) -> None:
    """As the interpreter does."""
    flags = []
    while arguments[0] in ("-u", "-P", "-B"):
        flags.append(arguments.pop(0))
    if "-u" in flags or os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        if "-P" not in flags:
            sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def end(code: object) -> NoReturn:
    """As the interpreter does, but for taking apart what was imported, which takes 2 s."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    del sys.path[0]
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # Or each process would copy what its collector looks at.
    request, files = serve(sys.argv[1], int(sys.argv[2]))
    take_over(request, files)
    try:
        run(request["arguments"])
    except SystemExit as ending:
        end(ending.code)
    except BaseException:
        gc.unfreeze()  # Or triton would take what is left at the end for a leak.
        raise
    end(0)
