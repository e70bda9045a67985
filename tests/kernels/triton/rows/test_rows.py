"""Operations on rows: norms, softmax and its relatives, sums."""

import pytest
import torch
from torch.nn import functional as F

from ndcheck_kernels.cuda import configs
from ndcheck_kernels.cuda.configs import RowTile
from ndcheck_kernels.cuda.rows import layer_norm, reductions, rms_norm, silu_mul, softmax

N = 300
OPS = {
    "rms_norm": (
        lambda x, w: rms_norm.rms_norm(x, w),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
    ),
    "add_rms_norm": (
        lambda x, w: rms_norm.add_rms_norm(x, w.expand_as(x), w)[0],
        lambda x, w: F.rms_norm(x + w, w.shape, w, 1e-6),
    ),
    "layer_norm": (
        lambda x, w: layer_norm.layer_norm(x, w, w),
        lambda x, w: F.layer_norm(x, w.shape, w, w),
    ),
    "softmax": (lambda x, w: softmax.softmax(x), lambda x, w: x.softmax(-1)),
    "log_softmax": (lambda x, w: softmax.log_softmax(x), lambda x, w: x.log_softmax(-1)),
    "logsumexp": (lambda x, w: softmax.logsumexp(x), lambda x, w: x.logsumexp(-1)),
    "sum": (lambda x, w: reductions.sum(x, -1), lambda x, w: x.sum(-1)),
    "mean": (lambda x, w: reductions.mean(x, -1), lambda x, w: x.mean(-1)),
    "cumsum": (lambda x, w: reductions.cumsum(x, -1), lambda x, w: x.cumsum(-1)),
    "silu_mul": (lambda x, w: silu_mul.silu_mul(x, w.expand_as(x)), lambda x, w: F.silu(x) * w),
}
LONG = ("softmax", "log_softmax", "logsumexp", "sum", "mean", "cumsum")
LONG_N = 40000


@pytest.fixture(params=[*((name, N) for name in OPS), *((name, LONG_N) for name in LONG)], ids=str)
def case(request, dtype, device, wide):
    """(ours, torch's, rows, weight)"""
    (ours, stock), n = OPS[request.param[0]], request.param[1]
    sizes = 301 if device == "cuda" and n == N else 40
    w = torch.randn(n, device=device).to(dtype)
    rows = wide(sizes, n, dtype=dtype, device=device)
    return (lambda x: ours(x, w)), stock, rows, w


def test_as_accurate_as_torch(case, assert_accurate):
    ours, stock, rows, w = case
    x = rows[:7]
    assert_accurate(ours(x), stock(x.double(), w.double()), stock(x, w))


def test_batch_invariant(case, batch_sizes, assert_batch_invariant):
    ours, _, rows, _ = case
    sizes = [m for m in batch_sizes if m < len(rows)]
    if rows.device.type == "cpu" and rows.shape[1] == LONG_N:  # A program has one of these rows.
        sizes = [1, 3, 17]
    assert_batch_invariant(ours, rows, sizes)


def test_strides_and_alignment_do_not_change_bits(case):
    ours, _, rows, _ = case
    x = rows[:5]
    want = ours(x)
    padded = torch.empty(5, x.shape[1] + 17, dtype=x.dtype, device=x.device)[:, 3:-14]
    padded.copy_(x)
    assert torch.equal(ours(padded), want)
    assert torch.equal(ours(x.t().contiguous().t()), want)


def test_empty_batches(case):
    ours, stock, rows, w = case
    assert ours(rows[:0]).shape == stock(rows[:0], w).shape


def test_a_tile_that_follows_the_batch_is_caught(
    device, wide, batch_sizes, assert_batch_invariant, monkeypatch
):
    rows = wide(max(batch_sizes) + 1, 4096, dtype=torch.float32, device=device)

    def faulty(x):
        small = len(x) < 16
        monkeypatch.setattr(reductions, "CHUNK", 256 if small else 4096)
        monkeypatch.setattr(reductions, "row_tile", lambda n: RowTile(1, 256 if small else 4096, 4))
        return reductions.sum(x, -1)

    with pytest.raises(AssertionError, match="M="):
        assert_batch_invariant(faulty, rows, batch_sizes)


def test_fusing_the_residual_costs_no_bits(dtype, device, wide):
    x, residual, w = (wide(*s, dtype=dtype, device=device) for s in ((6, N), (6, N), (N,)))
    y, h = rms_norm.add_rms_norm(x, residual, w)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm.rms_norm(x + residual, w))


def test_a_running_sum_does_not_follow_the_length(dtype, device, wide):
    x = wide(3, 2500, dtype=dtype, device=device)
    whole = reductions.cumsum(x, -1)
    for n in (1, 2, 1023, 1024, 1025, 2048, 2499):
        assert torch.equal(reductions.cumsum(x[:, :n], -1), whole[:, :n])


def test_running_sums_follow_torch_in_dimension_and_dtype(device):
    x = torch.randn(3, 4, 5, device=device)
    for dim in (0, 1, -1):
        torch.testing.assert_close(reductions.cumsum(x, dim), x.cumsum(dim))
    half = reductions.cumsum(x.half(), 1, torch.float32)
    torch.testing.assert_close(half, x.half().cumsum(1, dtype=torch.float32))


def test_dimensions_and_keepdim_follow_torch(device):
    x = torch.randn(3, 4, 5, 6, device=device)
    for dim in (0, 1, -1, (0, 2), (1, 2, 3), None):
        for keepdim in (False, True):
            ours, want = reductions.sum(x, dim, keepdim), x.sum(dim, keepdim)
            assert ours.shape == want.shape
            torch.testing.assert_close(ours, want)
    torch.testing.assert_close(softmax.softmax(x, 1), x.softmax(1))
    torch.testing.assert_close(softmax.logsumexp(x, 1, keepdim=True), x.logsumexp(1, keepdim=True))


def test_output_dtype(device):
    x = torch.randn(3, 40, device=device).half()
    assert softmax.softmax(x, dtype=torch.float32).dtype == torch.float32
    assert reductions.sum(x, -1, dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(
        softmax.softmax(x, dtype=torch.float32), x.softmax(-1, torch.float32)
    )


def test_masked_rows(device):
    """Entries of -inf count for nothing; a row of nothing else is what torch makes it."""
    x = torch.randn(3, 40, device=device)
    x[0, 7:] = float("-inf")
    x[1] = float("-inf")
    torch.testing.assert_close(softmax.softmax(x), x.softmax(-1), equal_nan=True)
    torch.testing.assert_close(softmax.logsumexp(x), x.logsumexp(-1))


def test_nothing_to_reduce(device):
    x = torch.empty(3, 0, device=device)
    assert torch.equal(reductions.sum(x, -1), x.sum(-1))
    assert reductions.mean(x, -1).isnan().all()


def test_what_they_cannot_do_is_refused(device):
    x = torch.ones(2, 3, dtype=torch.int64, device=device)
    for op in (reductions.sum, reductions.mean, softmax.softmax):
        with pytest.raises(TypeError, match="int64"):
            op(x, -1)
    with pytest.raises(ValueError, match="65536"):
        configs.row_tile(65537)
