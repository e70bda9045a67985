"""Waits for what goes on in an event loop, beside the caller's own where one runs already."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class AnyAddressLoop(asyncio.SelectorEventLoop):
    """Connects to any of the addresses that a name has, since each may be another replica."""

    async def getaddrinfo(self, *arguments: Any, **options: Any) -> Any:
        found = await super().getaddrinfo(*arguments, **options)
        random.shuffle(found)  # Else all connections go to the first, as the resolver sorts them.
        return found


class EventLoop:
    """An event loop that is kept from one call to the next, for one thread.

    Where the caller's thread runs a loop, as that of a notebook does, it runs in another thread.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=AnyAddressLoop)
        self._thread = ThreadPoolExecutor(1)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``; an interrupt cancels it."""
        result: T = self._call(self._runner.run, work)
        return result

    def close(self) -> None:
        self._call(self._runner.close)
        self._thread.shutdown()

    def _call(self, call: Callable[..., T], *arguments: Any) -> T:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return call(*arguments)
        future = self._thread.submit(call, *arguments)
        try:
            return future.result()
        except KeyboardInterrupt:
            loop = self._runner.get_loop()
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            raise
