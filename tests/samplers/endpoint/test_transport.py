"""Connections, to real servers over loopback."""

import asyncio
import socket
from contextlib import AsyncExitStack

from ndcheck.samplers.endpoint.transport import Transport
from ndcheck.samplers.event_loop import AnyAddressLoop

REPLICAS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


async def answer_by_name(reader, writer):
    await reader.readuntil(b"\r\n\r\n")
    body = f'{{"replica": "{writer.get_extra_info("sockname")[0]}"}}'.encode()
    head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length"
    writer.write(f"{head}: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    writer.close()


async def ask(n_requests):
    """Who answered, of servers that share a name as pods of a headless service do."""
    async with AsyncExitStack() as stack:
        port = 0
        for replica in REPLICAS:
            server = await asyncio.start_server(answer_by_name, replica, port)
            await stack.enter_async_context(server)
            port = server.sockets[0].getsockname()[1]
        transport = Transport(f"http://replicas.test:{port}/v1", {}, timeout_s=20)
        found = []
        for _ in range(n_requests):
            await transport.stream(
                f"{transport.base}/completions", {}, 1000, lambda event, _: found.append(event)
            )
        await transport.close()
        return {event["replica"] for event in found}


def test_a_name_with_several_addresses_reaches_them_all(monkeypatch):
    """The resolver gives them in the same order each time. By chance 1 in 4 million tests fails."""

    def resolve(host, port, *_, **__):
        addresses = REPLICAS if host in ("replicas.test", b"replicas.test") else [host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with asyncio.Runner(loop_factory=AnyAddressLoop) as runner:
        assert runner.run(ask(40)) == set(REPLICAS)
    with asyncio.Runner() as runner:
        assert runner.run(ask(40)) == {REPLICAS[0]}
