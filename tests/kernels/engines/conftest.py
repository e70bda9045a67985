"""A stand-in for vLLM as far as the plug-in reaches into it, with planted faults.

Its layers compute by torch and say so, so that what computed a result can be told. Their names and
signatures are those of vLLM's sources, to which `test_seams` holds them.
"""

from __future__ import annotations

import os
import sys
from inspect import Parameter, Signature
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ndcheck_kernels.cuda.products import borrowed
from ndcheck_kernels.engines import coverage, layers
from ndcheck_kernels.engines.plugin import register
from ndcheck_kernels.engines.seams import seams
from ndcheck_kernels.ops.block_fp8 import dequantise, quantise_rows, quantise_weight

HIDDEN, INTER, VOCABULARY, EXPERTS, TOP_K = 32, 48, 64, 4, 2
PARALLEL = (
    *("tensor_parallel_size", "data_parallel_size"),
    *("decode_context_parallel_size", "prefill_context_parallel_size"),
)
FP8_INTER = 128  # Gates and values have blocks of their own.


class LinearMethod:
    def __init__(self, module):
        self.module = module

    def apply(self, layer, x, bias=None):
        return self.module.linear_batch_invariant(x, layer.weight, bias)


def method(name, module):
    return type(name, (LinearMethod,), {})(module)


class Layer(torch.nn.Module):
    """One of vLLM's: it multiplies by its weight through its method."""

    def __init__(self, quant_method, n, k, dtype=torch.float16):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(n, k).to(dtype), requires_grad=False)
        self.quant_method = quant_method

    def forward(self, x):
        return self.quant_method.apply(self, x)


class RMSNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(HIDDEN), requires_grad=False)
        self._forward_method = self.forward_native

    def forward_native(self, x):
        return x

    def forward(self, x):
        return self._forward_method(x)


class Attention(torch.nn.Module):
    kv_cache_dtype = "auto"
    sliding_window, head_size = None, 64

    def __init__(self, builder, backend="FLASH_ATTN"):
        super().__init__()
        self.impl = SimpleNamespace(vllm_flash_attn_version=3)
        self.attn_backend = SimpleNamespace(
            get_name=lambda: backend, get_builder_cls=lambda: builder
        )

    def forward(self, x):
        return x


class RoutedExperts(torch.nn.Module):
    expert_map = None
    apply_router_weight_on_input = False
    activation = SimpleNamespace(value="silu")

    def __init__(self, experts_class):
        super().__init__()
        own = experts_class()
        # A module of its own in vLLM, so that it is listed with the layers.
        self.quant_method = type("UnquantizedFusedMoEMethod", (torch.nn.Module,), {})()
        self.quant_method.moe_kernel = SimpleNamespace(fused_experts=own)
        for name, shape in (("w13_weight", (2 * INTER, HIDDEN)), ("w2_weight", (HIDDEN, INTER))):
            weight = torch.randn(EXPERTS, *shape).to(torch.float16)
            setattr(self, name, torch.nn.Parameter(weight, requires_grad=False))

    def prepared(self, x):
        return {"hidden_states": x, "a1q_scale": None}

    def forward(self, x):
        output = torch.empty_like(x)
        index = torch.arange(len(x) * TOP_K, dtype=torch.int32).view(-1, TOP_K) % EXPERTS
        self.quant_method.moe_kernel.fused_experts.apply(
            output=output, **self.prepared(x), w1=self.w13_weight, w2=self.w2_weight,
            topk_weights=torch.full(index.shape, 0.5), topk_ids=index, activation=self.activation,
            global_num_experts=EXPERTS, expert_map=None, a2_scale=None,
            workspace13=None, workspace2=None, expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )  # fmt: skip
        return output


class Fp8Layer(Layer):
    """One whose weight is FP8 in blocks, as `Fp8LinearMethod` leaves it."""

    def __init__(self, quant_method, n, k, dtype=torch.float16):
        super().__init__(quant_method, n, k, dtype)
        self.orig_dtype = dtype
        codes, scales = quantise_weight(self.weight * 0.1)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(scales, requires_grad=False)


class Fp8Experts(RoutedExperts):
    def __init__(self, experts_class):
        super().__init__(experts_class)
        self.orig_dtype = torch.float16
        kernel = self.quant_method.moe_kernel
        del self.quant_method
        self.quant_method = type("Fp8MoEMethod", (), {})()
        self.quant_method.moe_kernel, own = kernel, kernel.fused_experts
        own.quant_dtype, own.block_shape = torch.float8_e4m3fn, [128, 128]
        for name, shape in (
            ("w13", (2 * FP8_INTER, HIDDEN)),
            ("w2", (HIDDEN, FP8_INTER)),
        ):
            codes, scales = quantise_weight(torch.randn(EXPERTS, *shape) * 0.1)
            setattr(self, f"{name}_weight", torch.nn.Parameter(codes, requires_grad=False))
            setattr(own, f"{name.replace('13', '1')}_scale", scales)

    def prepared(self, x):
        """As vLLM hands rows to its experts: codes, and a scale for every 128 columns."""
        codes, scales = quantise_rows(x)
        return {"hidden_states": codes, "a1q_scale": scales.contiguous()}


def named(name, base=Layer):
    return type(name, (base,), {})


class Vllm:
    """The modules, and a model and a worker made of them."""

    def __init__(self, release):
        self.release = release
        self.places = seams(release)
        self.modules = {}
        self.calls = []
        for name in ("vllm", "vllm.envs", *(seam.module for seam in self.places.values())):
            self._module(name)
        self.modules["vllm"].__version__ = f"{release}.0"
        self.modules["vllm.envs"].VLLM_BATCH_INVARIANT = True
        self._functions()

    def _module(self, name):
        parent, _, last = name.rpartition(".")
        if name not in self.modules:
            self.modules[name] = ModuleType(name)
            if parent:
                setattr(self._module(parent), last, self.modules[name])
        return self.modules[name]

    def _functions(self):
        calls = self.calls

        def linear_batch_invariant(input, weight, bias=None):
            calls.append("linear")
            return torch.nn.functional.linear(input, weight, bias)

        def _log_softmax_batch_invariant(input, dim, _half_to_float):
            calls.append("log_softmax")
            return input.log_softmax(dim)

        def init_batch_invariance():
            calls.append("start")
            os.environ["NCCL_PROTO"] = "Simple"

        class TritonExperts:
            quant_dtype = w1_bias = w2_bias = gemm1_clamp_limit = None

            def apply(  # noqa: PLR0913
                      self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation,
                      global_num_experts, expert_map, a1q_scale, a2_scale, workspace13, workspace2,
                      expert_tokens_meta, apply_router_weight_on_input):  # fmt: skip
                calls.append("experts")
                output.copy_(hidden_states)

        class Fp8LinearMethod:
            weight_block_size = (128, 128)

            def apply(self, layer, x, bias=None):
                calls.append("fp8_linear")
                weight = dequantise(layer.weight, layer.weight_scale_inv, x.dtype)
                return torch.nn.functional.linear(x, weight, bias)

        class CudaCommunicator:
            pynccl_comm = ca_comm = None

            def __init__(self, world_size=1, unique_name="tp:0"):
                self.world_size, self.unique_name = world_size, unique_name
                self.cpu_group, self.device = "gloo", "cuda:0"

            def all_reduce(self, input_):
                calls.append("all_reduce")
                return input_

            def reduce_scatter(self, input_, dim=-1):
                calls.append("reduce_scatter")
                return input_

        class CustomAllreduce:
            other = None

            def __init__(self, group, device):
                calls.append(f"pair {group} {device}")

            def should_custom_ar(self, inp):
                return inp.numel() < 1000

            def custom_all_reduce(self, input):
                calls.append("pair_sum")
                return (input.float() + self.other.float()).to(input.dtype)

        class FlashAttentionMetadataBuilder:
            def __init__(self, headdim):
                self.headdim = headdim

            def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
                calls.append("attention_step")
                return SimpleNamespace(max_query_len=common_attn_metadata.max_query_len)

        class VllmConfig:
            def _set_cudagraph_sizes(self):
                calls.append("graph_sizes")

        class Worker:
            def __init__(self, model, config):
                self.model_runner = SimpleNamespace(get_model=lambda: model)
                self.vllm_config, self.model = config, model

            def load_model(self, *, load_dummy_weights=False):
                calls.append("load")

            def compile_or_warm_up_model(self):
                self.model(torch.randn(3, HIDDEN).to(torch.float16))
                return "times"

        own = locals()
        CudaCommunicator.__init__.__signature__ = Signature(
            [
                Parameter(n, Parameter.POSITIONAL_OR_KEYWORD)
                for n in self.places["communicator"].parameters
            ]
        )
        for seam in self.places.values():
            name = seam.name.partition(".")[0]
            setattr(self.modules[seam.module], name, own[name])
        self.Worker, self.TritonExperts = Worker, TritonExperts
        self.Fp8LinearMethod, self.CudaCommunicator = Fp8LinearMethod, CudaCommunicator
        self.VllmConfig, self.Builder = VllmConfig, FlashAttentionMetadataBuilder

    def start(self):
        """What every worker calls first, by the name that its module has then."""
        seam = self.places["start"]
        getattr(self.modules[seam.module], seam.name)()

    def model(self, name="Qwen3MoeForCausalLM", **extra):
        linear = self.modules[self.places["linear"].module]
        head = self.modules[self.places["output"].module]
        kinds = {
            "qkv_proj": ("QKVParallelLinear", HIDDEN, HIDDEN),
            "gate": ("ReplicatedLinear", EXPERTS, HIDDEN),
        }
        model = torch.nn.Module()
        block = torch.nn.Module()
        for layer, (kind, n, k) in kinds.items():
            own = method("UnquantizedLinearMethod", linear)
            block.add_module(layer, named(kind)(own, n, k))
        block.add_module("attn", Attention(self.Builder))
        block.add_module("norm", RMSNorm())
        block.add_module("experts", RoutedExperts(self.TritonExperts))
        for layer, module in extra.items():
            block.add_module(layer, module)
        model.layers = torch.nn.ModuleList([block])
        model.lm_head = named("ParallelLMHead")(
            method("UnquantizedEmbeddingMethod", head), VOCABULARY, HIDDEN
        )

        def forward(own, x):
            for module in own.layers[0].children():
                y = module(x)
                x = y if y.shape == x.shape else x
            return own.lm_head(x)

        model.__class__ = type(name, (torch.nn.Module,), {"forward": forward})
        return model

    def fp8_model(self):
        """With a linear layer and experts in FP8."""
        layer = named("QKVParallelLinear", Fp8Layer)(self.Fp8LinearMethod(), HIDDEN, HIDDEN)
        experts = type("RoutedExperts", (Fp8Experts,), {})(self.TritonExperts)
        return self.model(qkv_proj=layer, experts=experts)

    def worker(self, model):
        return self.Worker(model, make())


def make(**compilation):
    found = {
        "pass_config": SimpleNamespace(fuse_allreduce_rms=False),
        "mode": SimpleNamespace(name="VLLM_COMPILE"),
        "backend": "inductor",
        "compile_sizes": [],
        "get_compile_ranges": lambda: [(1, 64)],
        "cudagraph_capture_sizes": [1, 2],
    }
    return SimpleNamespace(
        compilation_config=SimpleNamespace(**found | compilation),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=4, max_num_seqs=4),
        kernel_config=SimpleNamespace(ir_op_priority=SimpleNamespace(rms_norm=["native"])),
        parallel_config=SimpleNamespace(rank=0, **dict.fromkeys(PARALLEL, 1)),
        speculative_config=None,
        kv_transfer_config=None,
    )


@pytest.fixture
def make_config():
    """``make_config(**compilation)``: vLLM's configuration, as far as the plug-in reads it."""
    return make


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("NDCHECK_VLLM", raising=False)
    monkeypatch.setenv("NCCL_PROTO", "LL128")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(coverage, "PACKAGES", (__name__.partition(".")[0], "torch"))
    yield
    borrowed.settle(False)
    layers.fires.clear()
    layers.weights_seen.clear()
    layers.output_sizes.clear()


@pytest.fixture
def install(monkeypatch):
    """``install(release)``: the stand-in as the vLLM that is imported."""

    def make(release="0.26"):
        found = Vllm(release)
        for name, module in found.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return found

    return make


@pytest.fixture
def begin(install, monkeypatch):
    """``begin(mode, release)``: vLLM with the plug-in registered and its worker started."""

    def make(mode="1", release="0.26", alter=lambda vllm: None):
        vllm = install(release)
        monkeypatch.setenv("NDCHECK_VLLM", mode)
        alter(vllm)
        register()
        vllm.start()
        return vllm

    return make
