"""The scope that a thread is in, and what happened in it."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# What `Scope.missing` understands beside op names: one of the ops must have fired.
OP_GROUPS: dict[str, frozenset[str]] = {
    "gemm": frozenset(
        {
            *("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "dot"),
            *("block_fp8_linear", "row_fp8_linear", "weight_only_linear"),
        }
    ),
    "attention": frozenset({"attention", "scaled_dot_product_attention", "selective_scan"}),
}

_thread = threading.local()


@dataclass
class Scope:
    """What happened inside one `invariant_kernels()` block."""

    fires: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def missing(self, expected: Iterable[str] = ("gemm", "attention")) -> tuple[str, ...]:
        """The expected ops or `OP_GROUPS` that no implementation has computed so far."""
        fired = set(self.fires)
        return tuple(name for name in expected if not fired & OP_GROUPS.get(name, {name}))


def active_scope() -> Scope | None:
    """The scope this thread is in."""
    return getattr(_thread, "scope", None)


def enter(scope: Scope, end: Callable[[], None]) -> None:
    """Make it this thread's scope, until the last block that joins it leaves, which calls `end`."""
    _thread.scope, _thread.end, _thread.blocks = scope, end, 0


@contextmanager
def joined() -> Iterator[Scope]:
    """One block in this thread's scope."""
    _thread.blocks += 1
    try:
        yield _thread.scope
    finally:
        _thread.blocks -= 1
        if not _thread.blocks:
            _thread.scope = None
            _thread.end()
