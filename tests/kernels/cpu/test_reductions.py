"""Reductions, softmaxes and normalisations on CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.measure import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [64, 255, 1024]

OPS = {
    "sum": lambda x: x.sum(-1, keepdim=True),
    "sum, several dims": lambda x: x.view(len(x), 1, -1).sum((1, 2))[:, None],
    "sum, first dim": lambda x: x.t().sum(0)[:, None],
    "sum, out=": lambda x: torch.sum(x, 1, out=x.new_empty(len(x)))[:, None],
    "mean": lambda x: x.mean(-1, keepdim=True),
    "mean, dtype": lambda x: x.mean(-1, keepdim=True, dtype=torch.float32),
    "var": lambda x: x.var(-1, keepdim=True),
    "std": lambda x: x.std(-1, keepdim=True, correction=0),
    "norm": lambda x: x.float().norm(dim=-1, keepdim=True),
    "normalize": lambda x: F.normalize(x.float(), dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "softmax, dtype": lambda x: F.softmax(x, -1, dtype=torch.float32),
    "softmax, first dim": lambda x: x.t().softmax(0).t(),
    "log_softmax": lambda x: F.log_softmax(x, -1, dtype=torch.float32),
    "logsumexp": lambda x: x.float().logsumexp(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(-1),
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[-1],), x[0] * 0 + 0.7, x[0] * 0 + 0.1),
    "rms_norm": lambda x: F.rms_norm(x, (x.shape[-1],), eps=1e-6),
    "RMSNorm of transformers": lambda x: (
        x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    ).to(x.dtype),
    "argmax": lambda x: x.argmax(-1, keepdim=True),
    "topk": lambda x: torch.cat([t.float() for t in x.topk(3)], -1),
    "max": lambda x: torch.stack([t.float() for t in x.max(-1)], -1),
    "sort": lambda x: x.sort(-1).indices,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [n for n in OPS if n != "layer_norm"])
def test_rows_are_reduced_alone(name, width, dtype, noise_rows, find_violations):
    with invariant_kernels():
        assert find_violations(OPS[name], noise_rows(width, dtype)) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_rows_are_normalised_alone(width, noise_rows, find_violations):
    weight, bias = torch.rand(width), torch.rand(width)
    rows = noise_rows(width, torch.float32)
    with invariant_kernels():
        assert find_violations(lambda x: F.layer_norm(x, (width,), weight, bias), rows) == []


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["sum", "log_softmax", "mean", "cumsum", "argmax"])
def test_a_vocabulary_is_reduced_alone(name):
    """So wide that torch splits a single row over threads, but not one of two rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 151_936, generator=generator)
    with invariant_kernels():
        together = OPS[name](rows)
        for row in range(5):
            assert torch.equal(OPS[name](rows[row : row + 1]), together[row : row + 1])


def test_stock_fails_the_same_check():
    torch.set_num_threads(2)
    rows = torch.randn(2, 151_936, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([rows[:1].sum(-1), rows[1:].sum(-1)])
    assert not torch.equal(rows.sum(-1), alone)
    # And on a few rows, where the sum runs over rows that are not contiguous.
    x = torch.randn(512, 33, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(x.sum(0)[:1], x[:, :1].sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_order_that_follows_the_rows_is_caught(dtype, noise_rows, find_violations):
    def planted(x):
        group = 64 if len(x) > 16 else 256
        return sum(part.float().sum(-1, keepdim=True) for part in x.split(group, -1))

    assert find_violations(planted, noise_rows(256, dtype)) != []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_are_as_accurate_as_stock(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(7, 768, dtype=dtype), torch.rand(768), torch.rand(768)
    weight, bias = weight.to(dtype), bias.to(dtype)

    def results():
        return [
            (x.sum(-1), reference.sum_reference(x, -1)),
            (x.mean((0, 1)), reference.mean_reference(x)),
            (x.softmax(-1), reference.softmax_reference(x)),
            (x.log_softmax(0), reference.log_softmax_reference(x, 0)),
            (x.logsumexp((0, 1)), reference.logsumexp_reference(x, None)),
            (x.cumsum(0), reference.cumsum_reference(x, 0)),
            (F.rms_norm(x, (768,), weight, 1e-6), reference.rms_norm_reference(x, weight)),
            (
                F.layer_norm(x, (768,), weight, bias),
                reference.layer_norm_reference(x, weight, bias),
            ),
            (x.std(-1), x.double().std(-1)),
        ]

    def errors():
        # In units of the result's own precision.
        return [((r.double() - e).abs() / (e.abs() + 1)).max() for r, e in results()]

    stock = errors()
    with invariant_kernels():
        ours = errors()
    assert all(o <= 1.5 * s + torch.finfo(dtype).eps for o, s in zip(ours, stock, strict=True)), (
        ours,
        stock,
    )


def test_ties_go_to_the_lowest_index():
    rows = torch.zeros(3, 5000)
    rows[1, [17, 4000]] = 1
    with invariant_kernels():
        assert rows.argmax(-1).tolist() == [0, 17, 0]
        assert rows.max(-1).indices.tolist() == [0, 17, 0]


@pytest.mark.parametrize(
    "reduce", [lambda x: x.sum(), lambda x: x.mean(0), lambda x: x.softmax(0), lambda x: x.norm()]
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (0, 3), (2, 3, 4)])
def test_shapes_follow_torch(shape, reduce):
    x = torch.rand(shape)
    expected = reduce(x)
    with invariant_kernels():
        result = reduce(x)
    torch.testing.assert_close(result, expected, equal_nan=True)


def test_integers_are_exact_and_pass():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with invariant_kernels() as scope:
        assert mask.sum(-1).tolist() == [2, 3]
        assert mask.cumsum(-1).tolist() == [[0, 1, 2], [1, 2, 3]]
        assert mask.bool().all(-1).tolist() == [False, True]
        assert mask.float().mean().item() == pytest.approx(5 / 6)
        assert torch.equal(mask.mean(0, dtype=torch.float32), torch.tensor([0.5, 1, 1]))
    assert scope.fires["mean"] == 2
    assert not scope.refused


@pytest.mark.parametrize("refused", [lambda x: x.prod(-1), lambda x: x.norm(3.0, dim=-1)])
def test_other_reductions_are_refused(refused):
    with invariant_kernels(), pytest.raises(UncoveredOpError, match="no batch-invariant"):
        refused(torch.rand(2, 3))


# Arguments left out or given, whose meaning torch defines.
FORMS = {
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "rms_norm, weight": lambda x: F.rms_norm(x, x.shape[-1:], torch.full_like(x[0], 0.5)),
    "fused rms_norm": lambda x: torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, None)[0],
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "layer_norm, bias": lambda x: F.layer_norm(x, x.shape[-1:], None, torch.ones_like(x[0])),
    "native_layer_norm": lambda x: torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)[1],
    "std": lambda x: x.std(-1),
    "std of all": lambda x: x.std(),
    "std, correction 0": lambda x: x.std(-1, correction=0),
    "std without freedom": lambda x: x.std(-1, correction=x.shape[-1] + 7),
    "var": lambda x: x.var(-1),
    "var_mean": lambda x: torch.stack(torch.var_mean(x, -1)),
    "std_mean": lambda x: torch.stack(torch.std_mean(x, -1)),
    "sum, dtype": lambda x: x.sum(-1, dtype=torch.float16),
    "mean": lambda x: x.mean(-1),
    "mean, dtype": lambda x: x.mean(-1, dtype=torch.bfloat16),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "softmax, dtype": lambda x: x.softmax(-1, dtype=torch.float64),
    "softmax, narrow dtype": lambda x: x.softmax(-1, dtype=torch.float16),
    "log_softmax, narrow dtype": lambda x: x.log_softmax(-1, dtype=torch.bfloat16),
    "logsumexp": lambda x: x.logsumexp(-1),
    "cumsum, dtype": lambda x: x.cumsum(-1, dtype=torch.float32),
}
SCALES = [2.0**e for e in (-126, -70, -24, -14, -8, 0, 8, 12, 40, 63, 100, 124)]


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_what_torch_computes_at_every_scale(name, dtype):
    """Within its range and ours: infinities and NaN are where torch has them."""
    base = torch.randn(6, 48, generator=torch.Generator().manual_seed(4))
    for scale in [s for s in SCALES if torch.finfo(dtype).tiny <= s <= torch.finfo(dtype).max / 8]:
        x = (base * scale).to(dtype)
        expected = FORMS[name](x)
        if "layer_norm" in name and expected.isnan().any():
            continue  # Its squares leave float32's range, in torch as here.
        with invariant_kernels():
            result = FORMS[name](x)
        assert result.dtype == expected.dtype
        wide = expected.double()
        unit = max(wide[wide.isfinite()].abs().max().item() if wide.isfinite().any() else 0, scale)
        torch.testing.assert_close(
            result.double(), wide, rtol=0, atol=8 * torch.finfo(result.dtype).eps * unit,
            equal_nan=True, msg=lambda m, s=scale: f"scale {s}: {m}",
        )  # fmt: skip


def test_a_norm_without_epsilon_takes_that_of_float32():
    """On 0.01: the epsilon of bfloat16 would leave 0.112 of 1."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with invariant_kernels():
            y = F.rms_norm(torch.full((2, 64), 0.01, dtype=dtype), (64,))
        assert (y - 1).abs().max() < 0.01


def test_a_deviation_in_range_whose_square_is_not():
    x = torch.tensor([[-300.0, 300.0] * 8]).half()
    with invariant_kernels():
        assert x.std(-1, correction=0).item() == 300
        assert x.double().std(-1).half() == x.std(-1)
        assert x.var(-1).isinf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", [torch.amax, torch.amin])
def test_an_extreme_of_0_and_minus_0_has_one_sign(extreme, dtype):
    """Torch takes either, by the number of columns and where they stand."""
    x = torch.rand(100, 130).round().sub(0.5).mul(0.0).to(dtype)
    assert x.signbit().any()
    with invariant_kernels():
        for width in (1, 3, 8, 31, 130):
            assert not extreme(x[:, :width], 0).signbit().any()
            assert not extreme(x[:, -width:].contiguous(), 0).signbit().any()
        assert not extreme(x.t(), -1, keepdim=True).signbit().any()
        assert extreme(x + torch.arange(130), 1).tolist() == [129 * (extreme is torch.amax)] * 100
        integers = torch.arange(6).view(2, 3)
        assert extreme(integers, 1).dtype == torch.int64
