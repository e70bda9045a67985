"""One bit class for products in groups: that of `matmul`, whatever the groups hold.

The operands' exact product is zero, so each result is nothing but rounding.
"""

from dataclasses import replace

import pytest
import torch

from ndcheck_kernels.cuda import configs, device
from ndcheck_kernels.cuda.products import grouped_matmul, matmul
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul

# E, N, K: the two products of Qwen3-30B-A3B, of gpt-oss-20B, and one that TMA cannot read.
SHAPES = [(128, 1536, 2048), (128, 2048, 768), (32, 5760, 2880), (32, 2880, 2880), (8, 100, 1000)]
ROWS = 512


@pytest.fixture(params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def operands(request):
    e, n, k = request.param
    a, b = (torch.randn(rows, k // 2, device="cuda").bfloat16() for rows in (ROWS, e * n))
    order = torch.randperm(k, device="cuda")
    x, w = torch.cat([a, a], 1)[:, order], torch.cat([b, -b], 1)[:, order]
    return x.contiguous(), w.view(e, n, k)


def shares(groups, generator):
    """Ways to share ROWS rows among groups: even, skewed, all in one, one each."""
    even = torch.full((groups,), ROWS // groups)
    skewed = torch.bincount(
        (torch.rand(ROWS, generator=generator) ** 4 * groups).long(), minlength=groups
    )
    one = torch.zeros(groups, dtype=torch.int64)
    one[groups // 2] = ROWS
    single = torch.zeros(groups, dtype=torch.int64)
    single[: groups // 3] = 1
    return [even, skewed, one, single]


def one_by_one(x, w, counts):
    rows = x[: int(counts.sum())].split(counts.tolist())
    return torch.cat([matmul.linear(r, weight) for r, weight in zip(rows, w, strict=True)])


def test_every_share_and_every_configuration(operands):
    x, w = operands
    e, n, k = w.shape
    capability = device.capability(x.device)
    groups = configs.k_groups(n, k, 2, capability)
    by_column = w.mT.contiguous()
    for counts in shares(e, torch.Generator().manual_seed(0)):
        want = one_by_one(x, w, counts)
        ends = counts.cumsum(0).int().cuda()
        rows = x[: len(want)]
        assert torch.equal(grouped_matmul.grouped_matmul(rows, w.mT, ends), want)
        for config in configs.selectable_grouped_configs(2, capability):
            for weights in (w.mT, by_column):
                y = torch.full_like(want, float("nan"))
                grouped_matmul._launch(rows, weights, ends, y, config, groups)
                assert torch.equal(y, want), (config, counts)


def test_every_gate_and_what_it_asks_for_ahead(operands):
    x, w = operands[0] * 64, operands[1] * 256  # The product of two roundings is no zero.
    e, n, k = w.shape
    if n % 2 or k % 8:
        pytest.skip("TMA cannot read it")
    groups = configs.k_groups(n, k, 2, device.capability(x.device))
    source = torch.randint(len(x), (ROWS,), device="cuda")
    for counts in shares(e, torch.Generator().manual_seed(0)):
        ends, rows = counts.cumsum(0).int().cuda(), source[: int(counts.sum())]
        want = silu_mul(*one_by_one(x[rows], w, counts).chunk(2, -1))
        assert torch.equal(grouped_matmul.grouped_gate(x, rows, w.mT, ends), want)
        for config in configs.selectable_gate_configs(2, 90):
            for each in (config, replace(config, prefetch=512)):
                got = grouped_matmul._launch(x, w.mT, ends, None, each, groups, rows)
                assert torch.equal(got, want), (each, counts)


def test_another_grouping_is_told_apart(operands):
    x, w = operands
    groups = configs.k_groups(*w.shape[1:], 2, device.capability(x.device))
    ends = shares(len(w), torch.Generator().manual_seed(0))[1].cumsum(0).int().cuda()
    config = configs.MatmulConfig("pointer", 64, 64, 64)
    right, wrong = (
        grouped_matmul._launch(x, w.mT, ends, None, config, g) for g in (groups, groups + 1)
    )
    assert (right != wrong).float().mean() > 0.5


def test_under_a_graph(operands):
    x, w = operands
    ends = torch.arange(1, len(w) + 1, device="cuda").mul_(ROWS // len(w)).int()
    want = grouped_matmul.grouped_matmul(x, w.mT, ends)
    other = torch.full_like(ends, ROWS)
    graph, seen = torch.cuda.CUDAGraph(), ends.clone()
    with torch.cuda.graph(graph):
        y = grouped_matmul.grouped_matmul(x, w.mT, seen)
    for _ in range(2):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want)
    seen.copy_(other)  # The groups may change under the graph.
    graph.replay()
    assert torch.equal(y, matmul.linear(x, w[0]))
