"""Stands in for `python` in tests: a process that `server.py` forked, which has torch and
transformers imported already, takes over this one's arguments, directory, variables and open files.

What it cannot take over (closed streams, other flags, other variables of those that are read while
torch is imported) the real interpreter runs. `known.json` is beside this file: `python`, the real
interpreter, `socket`, the server's address, and `variables`, those that the server began with, of
which the names begin with one of `names`.
"""

import json
import os
import signal
import socket
import sys

with open(os.path.join(os.path.dirname(sys.argv[0]), "known.json")) as file:
    known = json.load(file)
first = next((argument for argument in sys.argv[1:] if argument not in ("-u", "-P", "-B")), "-")
names = tuple(known["names"])
variables = {name: value for name, value in os.environ.items() if name.startswith(names)}
open_files = [fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/dev/fd/{fd}")]
if (
    variables != known["variables"]
    or not {0, 1, 2} <= set(open_files)
    or (first.startswith("-") and first not in ("-m", "-c"))
):
    os.execv(known["python"], [known["python"], *sys.argv[1:]])

server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect(known["socket"])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda received, _: server.send(bytes([received])))
request = {
    "python": sys.argv[0],
    "arguments": sys.argv[1:],
    "environment": dict(os.environ),
    "open_files": open_files,
}
directory = os.open(".", os.O_RDONLY)
socket.send_fds(server, [json.dumps(request).encode()], [directory, *open_files])
for fd in open_files:
    os.close(fd)
status = int.from_bytes(server.recv(4), "little")
if os.WIFSIGNALED(status):
    signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.WEXITSTATUS(status))
