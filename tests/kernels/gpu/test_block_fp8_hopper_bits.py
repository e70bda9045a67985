"""The FP8 product for Hopper gives the very bits of the one that any GPU runs."""

import pytest
import torch

from bench.fp8 import products as bench
from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.products.fp8 import fp8_matmul
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config
from ndcheck_kernels.cuda.rows.quantise import quantise_rows
from ndcheck_kernels.ops.block_fp8 import quantise_weight

hopper = pytest.importorskip("ndcheck_kernels.cuda.products.fp8.block_fp8_hopper")
DEVICE = torch.device("cuda", 0)
PLAIN = Fp8Config(64, 64, 4, 4)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not device.has_hopper_kernels(DEVICE),
    reason="needs compute capability 9.0 and Triton 3.6",
)


def draw(m, n, k):
    """Operands of wide range whose products cancel, so that another order of addition shows."""
    half = torch.randn(m, k // 2, device="cuda")
    half *= torch.randint(-5, 6, half.shape, device="cuda").exp2()
    order = torch.randperm(k, device="cuda")
    w = torch.randn(n, k // 2, device="cuda")
    codes, row_scales = quantise_rows(torch.cat([half, half], 1)[:, order].bfloat16())
    return codes, row_scales, *quantise_weight(torch.cat([w, -w], 1)[:, order])


def both(operands, config, addend=None, dtype=torch.float32):
    """By the Hopper kernel, which must have run, and by the other."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        own = hopper.multiply
        patch.setattr(hopper, "multiply", lambda *args: calls.append(own(*args)))
        new = fp8_matmul._launch(*operands, addend, dtype, config)
        old = fp8_matmul._launch(*operands, addend, dtype, PLAIN)
    assert len(calls) == 1
    return new, old


def equal(a, b):
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(bits), b.view(bits))


@pytest.mark.parametrize("config", bench.BY_HAND, ids=str)
@pytest.mark.parametrize("k", [128, 208, 1024, 1152, 2176, 4096, 12288])
def test_bits(config, k):
    for m, n in ((64, 384), (65, 200), (129, 1040), (600, 256), (1, 64)):
        new, old = both(draw(m, n, k), config)
        assert new.isfinite().all()
        assert equal(new, old), (m, n)


@pytest.mark.parametrize("config", bench.BY_HAND, ids=str)
def test_bits_where_a_program_has_many_tiles(config):
    """An odd number of K-groups, so that warpgroups change sides from tile to tile."""
    for k in (384, 3072):
        assert equal(*both(draw(2000, 4096, k), config))


@pytest.mark.parametrize("config", bench.BY_HAND, ids=str)
def test_addends_and_dtypes(config):
    operands = draw(200, 320, 2048)
    rows = torch.randn(320, 2, 320, device="cuda").bfloat16()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert equal(*both(operands, config, None, dtype))
    for addend in (rows[0, 0], rows[:200, 1], rows[:, 0, :200].t()):
        assert equal(*both(operands, config, addend, torch.bfloat16))


@pytest.mark.parametrize("config", bench.BY_HAND, ids=str)
def test_another_order_has_other_bits(config):
    """The control: blocks backwards, and so groups, and the columns in a block."""
    operands = draw(150, 256, 4096)
    codes, row_scales, weight, scales = (each.flip(1) for each in operands)
    backwards = codes, row_scales.t().contiguous().t(), weight, scales
    new, old = both(operands, config)
    assert equal(new, old)
    assert not equal(fp8_matmul._launch(*backwards, None, torch.float32, config), old)


@pytest.mark.parametrize("config", bench.BY_HAND, ids=str)
def test_nothing_else_is_written(config):
    operands = draw(70, 200, 1152)
    whole = torch.full((80, 200), torch.nan, device="cuda")
    hopper.multiply(*operands, None, whole[:70], config)
    assert equal(whole[:70], fp8_matmul._launch(*operands, None, torch.float32, PLAIN))
    assert whole[70:].isnan().all()


@pytest.mark.parametrize("config", bench.BY_HAND, ids=str)
def test_replays_of_a_graph_repeat_their_bits(config):
    operands = draw(300, 4096, 4096)
    want = fp8_matmul._launch(*operands, None, torch.float32, PLAIN)
    fp8_matmul._launch(*operands, None, torch.float32, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [fp8_matmul._launch(*operands, None, torch.float32, config) for _ in range(3)]
    for _ in range(50):
        for each in got:
            each.fill_(torch.nan)
        graph.replay()
        assert all(equal(each, want) for each in got)
