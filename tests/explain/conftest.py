"""Sums of known order, and ops with planted faults."""

from __future__ import annotations

import pytest
import torch

from ndcheck.explain.order.sumtree import SumTree


@pytest.fixture(autouse=True)
def one_thread():
    """Waiting for threads on a busy machine takes long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Trees:
    """Builders of known orders over n leaves."""

    @staticmethod
    def chain(terms, n, nodes):
        total = terms[0]
        for term in terms[1:]:
            nodes.append((total, term))
            total = n + len(nodes) - 1
        return total

    @staticmethod
    def halves(terms, n, nodes):
        while len(terms) > 1:
            half = len(terms) // 2
            nodes += [(terms[i], terms[i + half]) for i in range(half)]
            terms = [n + len(nodes) - half + i for i in range(half)]
        return terms[0]

    def in_order(self, n):
        nodes = []
        self.chain(list(range(n)), n, nodes)
        return SumTree(n, tuple(nodes))

    def backwards(self, n):
        nodes = []
        self.chain(list(range(n))[::-1], n, nodes)
        return SumTree(n, tuple(nodes))

    def pairwise(self, n):
        nodes = []
        self.halves(list(range(n)), n, nodes)
        return SumTree(n, tuple(nodes))

    def blocks(self, n, size):
        nodes = []
        starts = range(0, n, size)
        blocks = [self.chain(list(range(s, min(s + size, n))), n, nodes) for s in starts]
        self.chain(blocks, n, nodes)
        return SumTree(n, tuple(nodes))

    def lanes(self, n, count):
        nodes = []
        lanes = [self.chain(list(range(s, n, count)), n, nodes) for s in range(count)]
        self.halves(lanes, n, nodes)
        return SumTree(n, tuple(nodes))

    def fused(self, n, width):
        nodes, total = [], ()
        for start in range(0, n, width):
            nodes.append((*range(start, min(start + width, n)), *total))
            total = (n + len(nodes) - 1,)
        return SumTree(n, tuple(nodes))


@pytest.fixture
def trees():
    return Trees()


def sum_in_order(x, columns):
    """Row sums [rows, 1], one addition after the other."""
    total = x[:, columns[0]].clone()
    for column in columns[1:]:
        total += x[:, column]
    return total[:, None]


@pytest.fixture(scope="module")
def planted_ops():
    """Custom ops on [rows, ..., n]: two sum by the number of rows, one reads the row above.

    For the invariant kernels all are taken as they are, but for `curable`, which they compute in
    one order: so no other op of the invariant arm is guilty.
    """
    import ndcheck_kernels
    from ndcheck_kernels.scope import registry

    library = torch.library.Library("planted", "DEF")

    def add_sums(x, *, backwards):
        """Add eight weighted sums, each to its own columns: one alone may round alike both ways."""
        columns = list(range(x.shape[-1]))
        rows, generator = x.reshape(-1, len(columns)), torch.Generator().manual_seed(1)
        result = rows.clone()
        for k in range(8):
            terms = rows * torch.randn(len(columns), generator=generator).to(x.dtype)
            total = sum_in_order(terms, columns[::-1] if backwards else columns)
            result[:, k::8] += total
        return result.reshape(x.shape)

    functions = {
        "follows_rows": lambda x: add_sums(x, backwards=len(x) >= 4),
        "curable": lambda x: add_sums(x, backwards=len(x) >= 2),
        "reads_neighbour": lambda x: x + 0.25 * x.roll(1, 0),
        "spoils_later_rows": lambda x: torch.cat([x[:1], x[1:] * 1.25]),
        "clean": lambda x: x * 2,
    }
    for name, function in functions.items():
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, function, "CompositeExplicitAutograd")
        op = getattr(torch.ops.planted, name).default
        if name == "curable":
            ndcheck_kernels.implements(op, device="cpu")(lambda x: add_sums(x, backwards=False))
        else:
            ndcheck_kernels.accept(op, device="cpu")
    yield torch.ops.planted
    # What the kernels cover is counted elsewhere in this process.
    for name in functions:
        registry._implementations["cpu"].pop(getattr(torch.ops.planted, name).default)
    registry.resolved.clear()
    library._destroy()
