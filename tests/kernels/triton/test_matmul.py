import pytest
import torch

from ndcheck_kernels.cuda import configs
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import matmul


def exact(x, w, bias=None):
    y = x.double() @ w.double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 512), (5, 96, 600), (33, 40, 72), (20, 7, 13)])
def test_linear_is_as_accurate_as_torch(m, n, k, dtype, device, wide, assert_accurate):
    x, w, bias = (wide(*s, dtype=dtype, device=device) for s in ((m, k), (n, k), (n,)))
    stock = torch.nn.functional.linear(x, w, bias)
    assert_accurate(matmul.linear(x, w, bias), exact(x, w, bias), stock)


def test_linear_is_batch_invariant(dtype, device, cancelling, batch_sizes, assert_batch_invariant):
    rows, w = cancelling(max(batch_sizes) + 1, 96, 1024, dtype=dtype, device=device)
    assert_batch_invariant(lambda x: matmul.linear(x, w), rows, batch_sizes)


def test_a_grouping_that_follows_the_batch_is_caught(
    dtype, device, cancelling, batch_sizes, assert_batch_invariant
):
    rows, w = cancelling(max(batch_sizes) + 1, 96, 1024, dtype=dtype, device=device)
    config = MatmulConfig("pointer", 32, 32, 32)

    def faulty(x):
        groups = 1 if len(x) < 16 else 2
        return matmul._launch(x, w.t(), None, 1.0, 1.0, None, config, groups)

    with pytest.raises(AssertionError, match="M="):
        assert_batch_invariant(faulty, rows, batch_sizes)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    [
        MatmulConfig("pointer", 16, 32, 64),
        MatmulConfig("tile", 16, 64, 64),
        MatmulConfig("tile", 16, 64, 64, swap=True, prefetch=256),
        MatmulConfig("tile", 16, 64, 64, swap=True, parallel=True),
        MatmulConfig("tile", 64, 64, 64, extra_n=32),
        MatmulConfig("tile", 16, 64, 64, extra_n=64, swap=True),
        MatmulConfig("persistent", 64, 64, 64),
    ],
    ids=lambda c: f"{c.kind}{'-swap' * c.swap}{'-parallel' * c.parallel}-{c.extra_n}",
)
def test_every_kind_of_schedule_computes_the_product(config, groups, device, wide, assert_accurate):
    if config.refusal(groups):
        pytest.skip(config.refusal(groups))
    x, w, bias = (
        wide(*s, dtype=torch.float16, device=device) for s in ((40, 1320), (144, 1320), (144,))
    )
    y = torch.full((40, 144), float("nan"), dtype=x.dtype, device=device)
    matmul._launch(x, w.t(), bias, 1.0, 1.0, y, config, groups)
    assert_accurate(y, exact(x, w, bias), torch.nn.functional.linear(x, w, bias))


def test_an_fp32_result_of_narrow_operands_is_not_rounded(device, wide, assert_accurate):
    x, w = (wide(*s, dtype=torch.float16, device=device) for s in ((20, 600), (40, 600)))
    out = torch.full((20, 40), float("nan"), device=device)
    matmul.matmul(x, w.t(), out=out)
    assert torch.equal(out.half(), matmul.linear(x, w))
    assert_accurate(out, exact(x, w), x.float() @ w.float().t())
    with pytest.raises(TypeError, match="matmul takes one of"):
        matmul.matmul(x, w.t(), out=out.bfloat16())


def test_addmm_scales_both_terms(dtype, device, wide, assert_accurate):
    a, b, c = (wide(*s, dtype=dtype, device=device) for s in ((5, 40), (40, 24), (5, 24)))
    stock = torch.addmm(c, a, b, beta=0.5, alpha=2.0)
    want = 0.5 * c.double() + 2.0 * (a.double() @ b.double())
    assert_accurate(matmul.matmul(a, b, c, alpha=2.0, beta=0.5), want, stock)


def test_beta_zero_ignores_the_addend(device):
    a = torch.ones(3, 16, dtype=torch.float16, device=device)
    c = torch.full((3, 3), float("nan"), dtype=torch.float16, device=device)
    assert torch.equal(matmul.matmul(a, a.t(), c, beta=0.0), matmul.matmul(a, a.t()))


def test_layout_does_not_change_bits(dtype, device, cancelling):
    x, w = cancelling(9, 48, 256, dtype=dtype, device=device)
    want = matmul.linear(x, w)
    padded = torch.empty(9, 300, dtype=dtype, device=device)[:, 3:259]
    padded.copy_(x)
    assert torch.equal(matmul.linear(padded, w), want)
    assert torch.equal(matmul.matmul(x.t().contiguous().t(), w.t().contiguous()), want)
    out = torch.empty(48, 9, dtype=dtype, device=device).t()
    assert torch.equal(matmul.matmul(x, w.t(), out=out), want)
    assert torch.equal(
        matmul.matmul(x[None].expand(2, -1, -1), w.t()[None].expand(2, -1, -1))[1], want
    )


def test_empty_operands(dtype, device):
    w = torch.ones(8, 16, dtype=dtype, device=device)
    assert matmul.linear(w.new_empty(0, 16), w).shape == (0, 8)
    assert matmul.linear(w.new_empty(2, 3, 16), w).shape == (2, 3, 8)
    assert torch.equal(matmul.matmul(w[:, :0], w[:, :0].t()), w.new_zeros(8, 8))


def test_what_it_cannot_do_is_refused(device):
    with pytest.raises(TypeError, match="bfloat16"):
        matmul.matmul(*(torch.ones(4, 4, dtype=torch.float64, device=device),) * 2)
    with pytest.raises(ValueError, match="cannot multiply"):
        matmul.matmul(*(torch.ones(4, 3, device=device),) * 2)
    assert MatmulConfig("persistent", 64, 64, 64).refusal(2)


def test_the_grouping_never_sees_the_batch():
    assert configs.chunk_length(8192, 2) == 4096
    assert configs.chunk_length(600, 2) % 256 == 0
    assert configs.k_groups(64, 64, 4, 90) == 1
    assert configs.k_groups(1280, 8192, 2, 80) == 1
