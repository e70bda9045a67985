"""Matrix products on CPU: accurate, one bit class, and a check that can tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.cpu import proven_rows
from ndcheck_kernels.measure.reference import addmm_reference, linear_reference, matmul_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128), (256, 256), (255, 77), (2048, 40)]


def products(weight: torch.Tensor, bias: torch.Tensor):
    """Ways to multiply rows by a weight [N, K], each as a function of the rows."""
    wide = weight.t()
    row_major = wide.contiguous()

    def mm_out(x):
        out = x.new_empty(x.shape[0], wide.shape[1])
        return torch.mm(x, wide, out=out)

    return {
        "linear": lambda x: F.linear(x, weight),
        "linear, bias": lambda x: F.linear(x, weight, bias),
        "mm, row-major": lambda x: torch.mm(x, row_major),
        "mm, out=": mm_out,
        "addmm": lambda x: torch.addmm(bias, x, wide, beta=0.5, alpha=2.0),
        "addmm_": lambda x: bias.repeat(x.shape[0], 1).addmm_(x, wide),
        "matmul, 3-d": lambda x: torch.matmul(x[:, None], wide)[:, 0],
        "bmm": lambda x: torch.bmm(x.expand(3, -1, -1), wide.expand(3, -1, -1))[2],
        "bmm, items": lambda x: torch.bmm(x[:, None], wide.expand(len(x), -1, -1))[:, 0],
        "baddbmm": lambda x: torch.baddbmm(bias, x[None], wide[None], beta=2.0)[0],
        "einsum": lambda x: torch.einsum("mk,nk->mn", x, weight),
        "mv": lambda x: torch.mv(x, weight[0])[:, None],
        "grouped_mm": lambda x: torch._grouped_mm(
            x, wide[None].contiguous(), torch.tensor([len(x)], dtype=torch.int32)
        ),
    }


NAMES = list(products(torch.zeros(1, 1), torch.zeros(1)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_linear_is_one_bit_class(k, n, dtype, noise_operands, find_violations):
    rows, weight = noise_operands(k, n, dtype)
    with invariant_kernels() as scope:
        assert find_violations(lambda x: F.linear(x, weight), rows) == []
    assert scope.fires["linear"] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_product_is_one_bit_class(name, dtype, noise_operands, find_violations):
    rows, weight = noise_operands(96, 80, dtype)
    product = products(weight, torch.zeros(80, dtype=dtype))[name]
    with invariant_kernels():
        assert find_violations(product, rows) == []


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("k", "n"), [(48, 9), (64, 5), (255, 8), (255, 17)])
def test_odd_shapes_are_one_bit_class_in_both_layouts(k, n, dtype, noise_operands, find_violations):
    """Here even the place within a tile of 16 rows changes torch's own bits."""
    rows, weight = noise_operands(k, n, dtype)
    wide, bias = weight.t().contiguous(), torch.zeros(n, dtype=dtype)
    with invariant_kernels():
        assert find_violations(lambda x: x @ wide, rows) == []
        assert find_violations(lambda x: F.linear(x, weight), rows) == []
        assert find_violations(lambda x: torch.addmm(bias, x, wide), rows) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 33, 130])
@pytest.mark.parametrize("k", range(2, 18))
def test_a_sum_of_few_terms_is_one_bit_class(k, n, dtype):
    """Terms that cancel have 0 for a sum in every order, where they are few: proofs saw nothing."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(80, k, generator=generator, dtype=torch.float64)
        x[:, -1] = -x[:, 0] * (1 + 2**-8 * torch.rand(80, generator=generator))
        x, weight = x.to(dtype), torch.randn(n, k, generator=generator).to(dtype)
        for b in (weight.t(), weight.t().contiguous()):
            with invariant_kernels():
                together, batched = x @ b, torch.bmm(x[None], b[None])[0]
                for m in (1, 2, 3, 5, 9, 17, 31, 33):
                    assert torch.equal(x[7 : 7 + m] @ b, together[7 : 7 + m])
                    alone = torch.bmm(x[None, 7 : 7 + m], b[None])[0]
                    assert torch.equal(alone, batched[7 : 7 + m])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_column_is_one_bit_class(dtype):
    """One number a row says little in a proof: a place of another order passed it by chance."""
    torch.manual_seed(0)
    rows, weight = torch.randn(400, 64).to(dtype), torch.randn(1, 64).to(dtype)
    with invariant_kernels():
        whole = F.linear(rows, weight)
        for m in range(1, 120):
            assert torch.equal(F.linear(rows[:m], weight), whole[:m]), m


@pytest.mark.usefixtures("threads")
def test_stock_products_fail_the_same_check(noise_operands, find_violations):
    rows, weight = noise_operands(256, 256, torch.float32)
    assert find_violations(lambda x: F.linear(x, weight), rows) != []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_grouping_that_follows_the_rows_is_caught(dtype, noise_operands, find_violations):
    rows, weight = noise_operands(256, 256, dtype)

    def planted(x):
        group = 96 if len(x) > 16 else 256
        parts = x.float().split(group, -1), weight.float().split(group, -1)
        with invariant_kernels():
            return sum(F.linear(a, b) for a, b in zip(*parts, strict=True)).to(dtype)

    assert find_violations(planted, rows) != []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 33, 200])
def test_products_are_as_accurate_as_stock(count, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(count, 384, dtype=dtype), torch.randn(96, 384, dtype=dtype)
    bias = torch.randn(96, dtype=dtype)

    def error(result, reference):
        return (result.double() - reference).abs().max()

    def results():
        return [
            (F.linear(x, weight), linear_reference(x, weight)),
            (F.linear(x, weight, bias), linear_reference(x, weight, bias)),
            (x @ weight.t(), matmul_reference(x, weight.t())),
            (
                torch.addmm(bias, x, weight.t(), beta=0.5, alpha=2.0),
                addmm_reference(bias, x, weight.t(), beta=0.5, alpha=2.0),
            ),
            (
                torch.baddbmm(bias, x[None], weight.t()[None], alpha=0.5),
                addmm_reference(bias, x[None], weight.t()[None], alpha=0.5),
            ),
            (torch.einsum("mk,nk->nm", x, weight), matmul_reference(weight, x.t())),
        ]

    stock = [error(*pair) for pair in results()]
    with invariant_kernels():
        ours = [error(*pair) for pair in results()]
    # Results are about 20 in size, at most about 100; float32 may be one long chain of additions.
    ulp = torch.finfo(dtype).eps * 64 * (16 if dtype == torch.float32 else 1)
    assert all(o <= 1.5 * s + ulp for o, s in zip(ours, stock, strict=True)), (ours, stock)


def test_a_zero_beta_ignores_the_bias():
    bias = torch.full((4,), torch.nan)
    with invariant_kernels():
        out = torch.addmm(bias, torch.ones(2, 8), torch.ones(8, 4), beta=0)
    assert torch.equal(out, torch.full((2, 4), 8.0))


@pytest.mark.parametrize(("m", "k", "n"), [(0, 8, 4), (3, 0, 4), (3, 8, 0), (3, 1, 4)])
def test_degenerate_shapes_equal_stock(m, k, n):
    a, b = torch.randn(m, k), torch.randn(k, n)
    stock = a @ b, torch.bmm(a[None], b[None])
    with invariant_kernels():
        assert torch.equal(a @ b, stock[0])
        assert torch.equal(torch.bmm(a[None], b[None]), stock[1])


def test_vectors_multiply_like_one_row():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 300), torch.randn(300, 40)
    with invariant_kernels():
        rows = x @ weight
        assert torch.equal(x[3] @ weight, rows[3])
        assert torch.equal(torch.dot(x[3], weight[:, 7]), torch.mv(x, weight[:, 7])[3])


def test_number_of_threads_changes_no_bit(noise_operands):
    rows, weight = noise_operands(256, 300, torch.float32)
    results = []
    for count in (1, 2, 3, 5, 8):
        torch.set_num_threads(count)
        with invariant_kernels():
            results.append(F.linear(rows, weight))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_must_be_ieee(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        with invariant_kernels(), pytest.raises(UncoveredOpError, match="'highest'"):
            torch.ones(2, 8) @ torch.ones(8, 2)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mixed_and_complex_dtypes_are_refused():
    with invariant_kernels():
        with pytest.raises(UncoveredOpError, match="no product of"):
            torch.ones(2, 8) @ torch.ones(8, 2, dtype=torch.bfloat16)
        with pytest.raises(UncoveredOpError, match="no product of"):
            torch.ones(2, 8, dtype=torch.complex64) @ torch.ones(8, 2, dtype=torch.complex64)


def test_integer_products_are_exact_and_pass():
    a = torch.arange(12).view(3, 4)
    with invariant_kernels() as scope:
        assert torch.equal(a @ a.t(), torch.tensor([[14, 38, 62], [38, 126, 214], [62, 214, 366]]))
    assert not scope.refused


def test_proofs_leave_the_random_state_alone():
    proven_rows._proofs.clear()
    state = torch.get_rng_state()
    with invariant_kernels():
        torch.ones(5, 48) @ torch.ones(48, 9)
    assert torch.equal(torch.get_rng_state(), state)
