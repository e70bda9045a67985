import pytest
import torch

from ndcheck_kernels.cuda import configs
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.device import capability
from ndcheck_kernels.cuda.products import grouped_matmul, matmul
from ndcheck_kernels.cuda.routing import route
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.ops.experts import route_by_sorting

EXPERTS, N, K = 5, 80, 512
# One row, none, more than a tile, one tile exactly, and the rest.
COUNTS = [1, 0, 20, 16, 2]
CONFIGS = [
    MatmulConfig("pointer", 16, 32, 64),
    MatmulConfig("pointer", 32, 64, 32),
    MatmulConfig("tile", 16, 64, 64),
    MatmulConfig("tile", 16, 64, 128, swap=True),
    MatmulConfig("tile", 32, 32, 64, swap=True),
    MatmulConfig("tile", 64, 64, 64),
]


def ends_of(counts, device):
    return torch.tensor(counts, device=device).cumsum(0).int()


def one_by_one(x, w, counts):
    """The specification: every group's rows through `matmul`, by themselves."""
    parts = [matmul.linear(rows, weight) for rows, weight in zip(x.split(counts), w, strict=True)]
    return torch.cat(parts)


@pytest.fixture
def operands(dtype, device, cancelling):
    """Rows of all groups and weights [E, N, K] whose products are zero: nothing but rounding."""
    x, w = cancelling(sum(COUNTS), EXPERTS * N, K, dtype=dtype, device=device)
    return x, w.view(EXPERTS, N, K)


def test_accuracy(dtype, device, wide, assert_accurate):
    x = wide(sum(COUNTS), K, dtype=dtype, device=device)
    w = wide(EXPERTS, N, K, dtype=dtype, device=device)
    got = grouped_matmul.grouped_matmul(x, w.mT, ends_of(COUNTS, device))
    exact, stock = (
        torch.cat([r @ m.t() for r, m in zip(a.split(COUNTS), b, strict=True)])
        for a, b in ((x.double(), w.double()), (x, w))
    )
    assert_accurate(got, exact, stock)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_schedule_has_the_bits_of_matmul(config, groups, operands, device):
    x, w = operands
    want = torch.cat(
        [
            matmul._launch(
                rows, m.t(), None, 1.0, 1.0, None, MatmulConfig("pointer", 16, 32, 32), groups
            )
            for rows, m in zip(x.split(COUNTS), w, strict=True)
        ]
    )
    ends = ends_of(COUNTS, device)
    by_column = w.mT.contiguous()
    layouts = (w.mT, by_column) if config.kind == "tile" else (w.mT, by_column[:, :, ::2])
    for weights in layouts:
        y = torch.full((len(x), weights.shape[2]), torch.nan, dtype=x.dtype, device=device)
        grouped_matmul._launch(x, weights, ends, y, config, groups)
        expected = want if weights.shape[2] == N else want[:, ::2]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("counts", [COUNTS, [0, 1, 0, 2, 0]], ids=["many", "few"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.swap], ids=str)
def test_a_gate_in_the_same_launch_has_the_bits_of_one_after_it(
    config, groups, counts, operands, device
):
    x, w = operands[0] * 64, operands[1] * 256  # The product of two roundings is no zero.
    source = torch.randint(len(x), (sum(counts),), device=device)
    ends = ends_of(counts, device)
    both = grouped_matmul._launch(x[source], w.mT, ends, None, CONFIGS[0], groups)
    want = silu_mul(*both.chunk(2, -1))
    got = grouped_matmul._launch(x, w.mT, ends, None, config, groups, source)
    assert torch.equal(got, want)
    assert torch.equal(grouped_matmul.grouped_gate(x, source, w.mT, ends), want) or groups == 2
    assert not torch.equal(got, want.roll(1, 0))


@pytest.mark.parametrize(
    "counts", [[39, 0, 0, 0, 0], [0, 0, 0, 0, 39], [7, 8, 8, 8, 8], [0, 1, 0, 1, 0]]
)
def test_the_shares_of_the_groups_change_nothing(counts, operands, device):
    x, w = operands
    x = x[: sum(counts)]
    got = grouped_matmul.grouped_matmul(x, w.mT, ends_of(counts, device))
    assert torch.equal(got, one_by_one(x, w, counts))


def test_a_grouping_that_follows_the_rows_is_caught(operands, device):
    """The planted fault: groups of many rows cut K in two."""
    x, w = operands
    ends = ends_of(COUNTS, device)
    faulty = grouped_matmul._launch(x, w.mT, ends, None, CONFIGS[0], 2)
    right = one_by_one(x, w, COUNTS)
    assert not torch.equal(faulty[1:21], right[1:21])


def test_rubbish_in_other_groups_changes_nothing(operands, device):
    x, w = operands
    ends = ends_of(COUNTS, device)
    want = grouped_matmul.grouped_matmul(x, w.mT, ends)
    x, w = x.clone(), w.clone()
    x[:1], x[21:] = torch.nan, torch.inf
    w[0], w[3] = torch.nan, torch.inf
    for config in CONFIGS[::2]:
        groups = configs.k_groups(N, K, x.element_size(), capability(x.device))
        got = grouped_matmul._launch(x, w.mT, ends, None, config, groups)
        assert torch.equal(got[1:21], want[1:21]), config


def test_combine(dtype, device):
    rows = torch.randn(24, 1100, device=device).to(dtype)
    place = torch.randperm(24, device=device).view(8, 3)
    weights = torch.rand(8, 3, device=device).to(dtype)
    out = grouped_matmul.combine(rows, place, weights)
    expected = (rows[place].double() * weights[..., None].double()).sum(1)
    error = (out.double() - expected).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    for token in (0, 5):
        part = slice(token, token + 1)
        assert torch.equal(grouped_matmul.combine(rows, place[part], weights[part]), out[part])


def test_experts_are_combined_in_the_order_given(dtype, device):
    rows = torch.tensor([[2.0**13], [2.0**13], [1.0]], device=device, dtype=dtype)
    weights = torch.tensor([[2.0**13, -(2.0**13), 1.0]], device=device, dtype=dtype)
    place = torch.tensor([[0, 1, 2]], device=device)
    assert grouped_matmul.combine(rows, place, weights).item() == 1
    assert grouped_matmul.combine(rows, place.flip(1), weights.flip(1)).item() == 0


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 4, 8), (7, 2, 5), (33, 3, 40)])
def test_routes_are_those_of_sorting(tokens, top_k, experts, device):
    scores = torch.rand(tokens, experts, device=device)
    weights, index = scores.topk(top_k)
    counted, by_sorting = (make(index, weights, experts) for make in (route, route_by_sorting))
    for ours, sorts in zip(counted, by_sorting, strict=True):
        assert ours.dtype == sorts.dtype
        assert torch.equal(ours, sorts)


def test_what_it_cannot_do_is_refused(device):
    x, b = torch.ones(4, 8, device=device), torch.ones(2, 8, 16, device=device)
    ends = torch.tensor([1, 4], device=device)
    with pytest.raises(TypeError, match="float16"):
        grouped_matmul.grouped_matmul(x, b.half(), ends)
    with pytest.raises(ValueError, match="cannot multiply"):
        grouped_matmul.grouped_matmul(x, b, ends[:1])
    with pytest.raises(ValueError, match="cannot multiply"):
        grouped_matmul.grouped_matmul(x[:, :7], b, ends)
    assert grouped_matmul.grouped_matmul(x[:0], b, ends * 0).shape == (0, 16)


def test_the_schedule_follows_the_rows_only_where_proven():
    few, many = (configs.grouped_config(rows, 128, 2, 90) for rows in (8, 100_000))
    assert few != many
    assert configs.grouped_config(8, 128, 2, 80) == configs.grouped_config(100_000, 128, 2, 80)
    assert {few, many} <= configs.selectable_grouped_configs(2, 90)
