"""Products with packed weights on CUDA, or in the interpreter, have the bits of plain weights."""

import pytest
import torch

from ndcheck_kernels.cuda.configs import k_groups
from ndcheck_kernels.cuda.products import weight_only as kernels
from ndcheck_kernels.cuda.products.grouped_matmul import grouped_matmul
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.products.mxfp4 import mxfp4_matmul
from ndcheck_kernels.ops import mxfp4
from ndcheck_kernels.ops.weight_only import Packed, dequantise, pack, quantise

IS_GPU = torch.cuda.is_available()
FORMS = [  # bits, columns, columns of a scale, whether it has zeros
    (4, 256, 128, False),
    (4, 512, 32, True),
    (4, 256, 64, True),
    (4, 512, 512, False),
    (8, 256, 128, True),
    (8, 512, 64, False),
]


def packed(n, bits, k, group, has_zeros, device, scales=torch.float16):
    codes = torch.randint(0, 1 << bits, (n, k))
    zeros = torch.randint(0, (1 << bits) + 1, (k // group, n), dtype=torch.int16)
    zeros[0, :2] = torch.tensor([0, 1 << bits])
    drawn = (torch.rand(k // group, n) * 2.0**-bits).to(scales)
    drawn[0, 2:5] = torch.tensor([0, torch.finfo(scales).smallest_normal / 4, -1])
    made = Packed(pack(codes, bits), drawn, zeros if has_zeros else None, None, bits, k)
    made.check()
    return on(made, device)


def on(made, device):
    return Packed(
        made.codes.to(device), made.scales.to(device),
        None if made.zeros is None else made.zeros.to(device),
        None if made.group_of is None else made.group_of.to(device), made.bits, made.columns,
    )  # fmt: skip


@pytest.mark.parametrize("magnitude", [8, 11], ids=["bfloat16", "float16"])
def test_pairs_of_small_numbers_have_the_bits_of_float32(magnitude):
    """Every code, zero and scale: only the last step of the arithmetic of pairs rounds."""
    dtype = {8: torch.bfloat16, 11: torch.float16}[magnitude]
    scales = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    scales = scales[scales.isfinite()]
    base = 2.0 ** (magnitude - 1)
    for zero in range(17):
        codes = torch.arange(16)[:, None]
        exact = (codes - zero).float()
        small = (base + codes).to(dtype) - torch.tensor(base + zero, dtype=dtype)
        assert torch.equal(small.float(), exact)
        got, expected = small * scales, (exact * scales.float()).to(dtype)
        assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_unpacked_as_on_the_cpu(form, dtype, device):
    made = packed(48, *form, device=device)
    expected = dequantise(on(made, "cpu"), dtype)
    assert torch.equal(kernels.unpacked(made, dtype).cpu(), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [96, 300])
def test_any_columns_and_groups_are_unpacked(k, bits, dtype, device):
    made = quantise(torch.randn(40, k), bits, k // 3, is_symmetric=False)
    order = (torch.arange(k) // (k // 3))[torch.randperm(k)].to(torch.int32)
    for each in (made, Packed(made.codes, made.scales, made.zeros, order, bits, k)):
        assert torch.equal(kernels.unpacked(on(each, device), dtype).cpu(), dequantise(each, dtype))
        rows = torch.randn(3, k, dtype=dtype, device=device)
        plain = matmul(rows, kernels.unpacked(on(each, device), dtype).t())
        assert torch.equal(kernels.weight_only_matmul(rows, on(each, device)), plain)


def configs():
    """All of those of tiles on a GPU; in the interpreter, where each takes seconds, the default."""
    tables = kernels.selectable_configs(4, 128 if IS_GPU else 0)
    return [each for each in tables if isinstance(each, kernels.WeightOnlyConfig)]


@pytest.mark.parametrize("config", configs(), ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16], ids=str)
def test_products_have_the_bits_of_plain_weights(scales, form, config, device):
    """Scales of the rows' dtype and others are multiplied by different instructions."""
    dtypes = [torch.float16, *([torch.bfloat16] if IS_GPU else [])]
    for dtype in dtypes:
        made = packed(72, *form, device=device, scales=scales)
        rows = torch.randn(19, form[1], dtype=dtype, device=device)
        assert kernels.can_fuse(rows, made)
        weight = dequantise(on(made, "cpu"), dtype).to(device)
        bias = torch.randn(72, dtype=dtype, device=device)
        for addend in (None, bias, torch.randn(19, 72, dtype=dtype, device=device)):
            got = kernels._launch(rows, made, addend, config)
            assert torch.equal(got, matmul(rows, weight.t(), addend))


def test_few_rows_are_for_sums_in_one_group_of_columns():
    """The kernel adds K from end to end, which has `matmul`'s bits only where it does so too."""
    for n, k in kernels._MEASURED:
        assert k_groups(n, k, 2, 90) == 1
        assert k % kernels.FEW_ROWS.block_k == 0


@pytest.mark.parametrize(
    ("has_hopper", "change", "is_few"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"rows": 33}, False),
        (True, {"dtype": torch.float16}, False),
        (True, {"scales": torch.float16}, False),
        (True, {"has_zeros": True}, False),
        (True, {"group": 64}, False),
    ],
)
def test_few_rows_have_a_schedule_of_their_own(has_hopper, change, is_few, monkeypatch):
    monkeypatch.setattr(kernels.device, "has_hopper_kernels", lambda _: has_hopper)
    form = {"rows": 1, "dtype": torch.bfloat16, "scales": torch.bfloat16, "group": 128} | change
    n, k = 4096, 4096
    rows = torch.empty(form["rows"], k, dtype=form["dtype"], device="meta")
    scales = torch.empty(k // form["group"], n, dtype=form["scales"], device="meta")
    zeros = scales.to(torch.int16) if form.get("has_zeros") else None
    codes = torch.empty(n, k // 2, dtype=torch.uint8, device="meta")
    chosen = kernels.product_config(rows, Packed(codes, scales, zeros, None, 4, k))
    assert isinstance(chosen, kernels.FewRowsConfig) == is_few
    assert chosen is not None


@pytest.mark.skipif(IS_GPU, reason="the interpreter")
def test_the_interpreter_runs_no_schedule_of_hopper():
    assert not kernels.device.has_hopper_kernels(torch.device("cpu"))


def test_a_sum_in_two_parts_has_the_bits_of_plain_weights(device):
    """A narrow product of a long K is cut in two by `matmul`."""
    made = quantise(torch.randn(16, 4096), 4, 128, is_symmetric=True)
    made = on(made, device)
    dtype = torch.bfloat16 if IS_GPU else torch.float16
    rows = torch.randn(2, 4096, dtype=dtype, device=device)
    assert kernels.can_fuse(rows, made)
    plain = matmul(rows, kernels.unpacked(made, dtype).t())
    assert torch.equal(kernels.weight_only_matmul(rows, made), plain)


@pytest.mark.parametrize(
    ("change", "is_fused"),
    [({}, True), ({"k": 384}, False), ({"group": 16}, False), ({"dtype": torch.float32}, False)],
)
def test_what_a_tile_cannot_unpack_is_unpacked_before(change, is_fused, device):
    said = {"k": 256, "group": 128, "dtype": torch.float16} | change
    made = on(quantise(torch.randn(48, said["k"]), 4, said["group"], is_symmetric=False), device)
    rows = torch.randn(3, said["k"], dtype=said["dtype"], device=device)
    assert kernels.can_fuse(rows, made) == is_fused
    plain = matmul(rows, kernels.unpacked(made, said["dtype"]).t())
    assert torch.equal(kernels.weight_only_matmul(rows, made), plain)


@pytest.mark.parametrize("k", [64, 288])
def test_experts_have_the_bits_of_plain_weights(k, dtype, device):
    blocks, scales = mxfp4.quantise(torch.randn(4, 40, k))
    blocks[0], scales[2, :3] = 7, torch.tensor([0, 1, 96], dtype=torch.uint8)[:, None]
    weight = mxfp4.dequantise(blocks, scales, dtype)
    ends = torch.tensor([3, 3, 9, 10], dtype=torch.int32, device=device)
    rows = torch.randn(10, k, dtype=dtype, device=device)
    got = mxfp4_matmul(rows, blocks.to(device), scales.to(device), ends)
    expected = grouped_matmul(rows, weight.transpose(1, 2).contiguous().to(device), ends)
    assert torch.equal(got, expected)


def test_a_row_has_its_bits_in_any_company(device, batch_sizes, assert_batch_invariant):
    made = on(quantise(torch.randn(48, 512), 4, 128, is_symmetric=True), device)
    rows = torch.randn(max(batch_sizes) + 1, 512, dtype=torch.float16, device=device)
    assert_batch_invariant(lambda x: kernels.weight_only_matmul(x, made), rows, batch_sizes)


def test_a_scale_of_the_batch_is_seen(device, batch_sizes, assert_batch_invariant):
    """The planted fault: rows that share a factor, taken out and put in again."""
    made = on(quantise(torch.randn(48, 512), 4, 128, is_symmetric=True), device)
    rows = torch.randn(max(batch_sizes) + 1, 512, dtype=torch.float16, device=device)

    def faulty(x):
        shared = x.nan_to_num(0, 0, 0).abs().amax()
        return kernels.weight_only_matmul(x / shared, made) * shared

    with pytest.raises(AssertionError):
        assert_batch_invariant(faulty, rows, batch_sizes)
