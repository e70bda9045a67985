"""One bit class: every configuration that the tables can select gives the same bits.

The operands' exact product is zero, so each result is nothing but rounding: any other order of
summation shows in nearly every element, as the controls confirm.
"""

import pytest
import torch

from ndcheck_kernels.cuda import configs, device
from ndcheck_kernels.cuda.products import matmul

SHAPES = [
    (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096),
    (1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584), (1000, 1000), (256, 4104),
    (128, 2048),
]  # fmt: skip
ROWS = 300
LARGE = [p + d for p in (512, 1024, 2048, 4096, 8192) for d in (-1, 0, 1)]


@pytest.fixture(params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def operands(request):
    n, k = request.param
    a, b = (torch.randn(rows, k // 2, device="cuda").bfloat16() for rows in (ROWS, n))
    order = torch.randperm(k, device="cuda")
    return torch.cat([a, a], 1)[:, order].contiguous(), torch.cat([b, -b], 1)[:, order].contiguous()


def test_every_batch_size_and_position(operands):
    x, w = operands
    alone = torch.cat([matmul.linear(x[i : i + 1], w) for i in range(ROWS)])
    for m in range(1, ROWS + 1):
        first = (7 * m) % (ROWS - m + 1)
        assert torch.equal(matmul.linear(x[first : first + m], w), alone[first : first + m]), (
            f"M={m}"
        )
    for m in LARGE if w.shape[0] < 100_000 else LARGE[:6]:
        filler = torch.full((m - ROWS, x.shape[1]), float("nan"), device="cuda", dtype=x.dtype)
        split = ROWS // 3
        y = matmul.linear(torch.cat([x[:split], filler, x[split:]]), w)
        assert torch.equal(y[:split], alone[:split]), f"M={m}"
        assert torch.equal(y[m - ROWS + split :], alone[split:]), f"M={m}"


def test_every_selectable_configuration(operands):
    x, w = operands
    n, k = w.shape
    capability = device.capability(x.device)
    groups = configs.k_groups(n, k, 2, capability)
    want = torch.cat([matmul.linear(x[i : i + 1], w) for i in range(ROWS)])
    for config in configs.selectable_configs(n, k, 2, capability):
        y = torch.full_like(want, float("nan"))
        matmul._launch(x, w.t(), None, 1.0, 1.0, y, config, groups)
        assert torch.equal(y, want), config


def test_another_grouping_is_told_apart(operands):
    x, w = operands
    groups = configs.k_groups(*w.shape, 2, device.capability(x.device))
    config = configs.MatmulConfig("pointer", 64, 64, 64)
    right, wrong = (
        matmul._launch(x, w.t(), None, 1.0, 1.0, None, config, g) for g in (groups, groups + 1)
    )
    assert (right != wrong).float().mean() > 0.5


def test_layouts(operands):
    x, w = operands
    want = matmul.linear(x, w)
    by_column = w.t().contiguous()
    assert torch.equal(matmul.matmul(x, by_column), want)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view_as(x).copy_(x)
    assert torch.equal(matmul.linear(shifted, w), want)


@pytest.mark.parametrize("m", [1, 60, ROWS])
def test_a_kept_launch_computes_what_triton_would_launch(operands, m):
    x, w = operands
    for bias in (None, w[:, 0].contiguous()):
        matmul.linear(torch.full_like(x[:m], float("nan")), w, bias)
        for rows in (x[:m], x[ROWS - m :].clone()):
            again = matmul.linear(rows, w.clone(), bias)
            kept = dict(matmul._compiled)
            matmul._compiled.clear()
            assert torch.equal(matmul.linear(rows, w, bias), again)
            matmul._compiled.update(kept)


def test_under_a_graph(operands):
    x, w = operands
    want = matmul.linear(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul.linear(x, w)
        matmul.linear(x[:3], w)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want)
