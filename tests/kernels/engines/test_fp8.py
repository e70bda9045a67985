"""FP8 layers of the stand-in for vLLM: what our ops compute, and what is left to it by name."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ndcheck_kernels.engines import layers
from ndcheck_kernels.engines.plugin import CoverageError, register
from ndcheck_kernels.engines.seams import RELEASES
from ndcheck_kernels.ops.block_fp8 import dequantise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def begin(install, monkeypatch):
    def make(mode="1", release="0.26"):
        vllm = install(release)
        monkeypatch.setenv("NDCHECK_VLLM", mode)
        register()
        vllm.start()
        return vllm

    return make


@pytest.mark.parametrize("release", [RELEASES[0], RELEASES[-1]])
def test_an_fp8_model_is_computed_by_our_ops_alone(begin, release):
    vllm = begin(release=release)
    worker = vllm.worker(vllm.fp8_model())
    worker.load_model()
    assert worker.compile_or_warm_up_model() == "times"
    assert vllm.calls == ["start", "load"]
    answer = worker.ndcheck_coverage()
    assert answer["fires"] == {"block_fp8": 1, "linear": 1, "experts": 1, "output": 1}
    assert answer["uncovered"] == []
    assert "ndcheck experts in FP8" in answer["table"]


def test_a_layer_gives_what_its_dequantised_weight_does(begin):
    """Within e4m3's rounding of the rows: a 16th, and either sign as often."""
    vllm = begin()
    model = vllm.fp8_model()
    vllm.worker(model).load_model()
    layer, x = model.layers[0].qkv_proj, torch.randn(5, 32).half()
    weight = dequantise(layer.weight, layer.weight_scale_inv, torch.float32).double()
    exact, size = x.double() @ weight.t(), (x.double() ** 2 @ weight.t() ** 2).sqrt()
    got = layer(x).double()
    assert ((got - exact).abs() <= 6 * 2.0**-4 * size).all()
    assert ((1.5 * got - exact).abs() > 6 * 2.0**-4 * size).any()
    assert "fp8_linear" not in vllm.calls


def test_experts_compute_what_each_says(begin):
    """Against float64 of the dequantised weights, token by token."""
    vllm = begin()
    model = vllm.fp8_model()
    vllm.worker(model).load_model()
    own = model.layers[0].experts
    method = own.quant_method.moe_kernel.fused_experts
    w1 = dequantise(own.w13_weight, method.w1_scale, torch.float32).double()
    w2 = dequantise(own.w2_weight, method.w2_scale, torch.float32).double()
    x = torch.randn(5, 32).half()
    got, expected = own(x).double(), torch.zeros(5, 32, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for i in range(2):
            e = (2 * t + i) % 4
            gate, up = (w1[e] @ row).chunk(2)
            expected[t] += 0.5 * (w2[e] @ (torch.nn.functional.silu(gate) * up))
    # Rows are rounded by a 32nd of themselves on average, before each of the two products.
    assert (got - expected).norm() / expected.norm() < 2.0**-3
    assert (got.roll(1, 0) - expected).norm() / expected.norm() > 2.0**-1
    assert "experts" not in vllm.calls


@pytest.mark.parametrize("name", ["qkv_proj", "experts"])
def test_a_row_has_its_bits_in_any_company(begin, name):
    vllm = begin()
    model = vllm.fp8_model()
    vllm.worker(model).load_model()
    module, rows = getattr(model.layers[0], name), torch.randn(20, 32).half()
    rows[2] *= 100
    together = module(rows)
    for m in (2, 4, 20):  # Experts of a row follow its place: two rows have all four.
        assert torch.equal(module(rows[:m]), together[:m])
    if name == "qkv_proj":
        assert torch.equal(module(rows[7:8]), together[7:8])

        def faulty(x):  # The planted fault: a scale that all rows share.
            shared = x.abs().amax() / 448
            return module((x / shared).to(torch.float8_e4m3fn).to(x.dtype) * shared)

        assert not torch.equal(faulty(rows[:1]), faulty(rows)[:1])


def test_torch_compile_keeps_the_product_whole_at_every_number_of_rows(begin):
    vllm = begin()
    model = vllm.fp8_model()
    vllm.worker(model).load_model()
    layer, graphs = model.layers[0].qkv_proj, []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(layer, backend=keep, fullgraph=True, dynamic=True)
    x = torch.randn(7, 32).half()
    for m in (7, 3, 5):
        rows = x[:m].clone()
        assert torch.equal(compiled(rows), layer(rows))
    (targets,) = graphs
    assert "ndcheck_engines.block_fp8" in targets


def no_blocks(model):
    model.layers[0].qkv_proj.quant_method.weight_block_size = None


def other_blocks(model):
    model.layers[0].qkv_proj.quant_method.weight_block_size = [64, 128]


def packed_scales(model):
    layer = model.layers[0].qkv_proj
    layer.weight_scale_inv = torch.nn.Parameter(
        layer.weight_scale_inv.to(torch.int32), requires_grad=False
    )


def other_experts(model):
    own = model.layers[0].experts.quant_method.moe_kernel.fused_experts
    own.__class__ = type("TritonOrDeepGemmExperts", (), {})


def scale_a_tensor(model):
    model.layers[0].experts.quant_method.moe_kernel.fused_experts.block_shape = None


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (no_blocks, r"qkv_proj .*vLLM's Fp8LinearMethod: FP8 without blocks"),
        (other_blocks, r"qkv_proj .*FP8 in blocks of \[64, 128\]"),
        (packed_scales, r"qkv_proj .*scales in a kernel's own layout: torch.int32"),
        (other_experts, r"experts .*vLLM's TritonOrDeepGemmExperts of Fp8MoEMethod"),
        (scale_a_tensor, r"experts .*vLLM's TritonExperts: FP8 without blocks"),
    ],
)
def test_other_fp8_is_refused_by_name(begin, alter, said):
    vllm = begin()
    model = vllm.fp8_model()
    alter(model)
    with pytest.raises(CoverageError, match=said):
        vllm.worker(model).load_model()


def test_partial_leaves_an_fp8_layer_to_vllm(begin, caplog):
    vllm = begin("partial")
    model = vllm.fp8_model()
    no_blocks(model)
    worker = vllm.worker(model)
    worker.load_model()
    worker.compile_or_warm_up_model()
    assert vllm.calls == ["start", "load", "fp8_linear"]
    assert worker.ndcheck_coverage()["uncovered"] == ["layers.0.qkv_proj"]


def test_auto_leaves_all_to_vllm(begin):
    vllm = begin("auto")
    model = vllm.fp8_model()
    no_blocks(model)
    worker = vllm.worker(model)
    worker.load_model()
    model.layers[0].qkv_proj(torch.randn(3, 32).half())
    assert vllm.calls[-1] == "fp8_linear"
    assert worker.ndcheck_coverage()["by"] == "vllm"


def test_a_planted_dead_override_is_refused(begin):
    """A layer that calls vLLM's own by another name."""
    vllm = begin()
    model = vllm.fp8_model()
    model.layers[0].qkv_proj.forward = lambda x: x
    worker = vllm.worker(model)
    worker.load_model()
    with pytest.raises(CoverageError, match=r"1 layers never came .* layers\.0\.qkv_proj"):
        worker.compile_or_warm_up_model()


def test_the_fake_implementation_says_what_the_op_gives(begin):
    layer = begin().fp8_model().layers[0].qkv_proj
    x, bias = torch.randn(2, 3, 32).half(), torch.randn(32).half()
    torch.library.opcheck(
        torch.ops.ndcheck_engines.block_fp8.default,
        (x, layer.weight, layer.weight_scale_inv, bias),
        test_utils="test_faketensor",
    )
    assert_close(
        layers.block_fp8_linear(x, layer.weight, layer.weight_scale_inv, bias) - bias,
        layers.block_fp8_linear(x, layer.weight, layer.weight_scale_inv),
        rtol=1e-2,
        atol=1e-2,
    )
