"""Settings of vLLM's by which something else than the covered layers computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ndcheck_kernels.engines.plugin import CoverageError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def parallel(**sizes):
    return lambda worker: vars(worker.vllm_config.parallel_config).update(sizes)


def fused(name, ranks):
    def alter(worker):
        parallel(tensor_parallel_size=ranks)(worker)
        setattr(worker.vllm_config.compilation_config.pass_config, name, True)

    return alter


def speculative(worker):
    worker.vllm_config.speculative_config = SimpleNamespace(method="ngram")


def transfer(connector, **extra):
    def alter(worker):
        worker.vllm_config.kv_transfer_config = SimpleNamespace(
            kv_connector=connector, kv_connector_extra_config=extra
        )

    return alter


def norms_by(op):
    def alter(worker):
        setattr(worker.vllm_config.kernel_config.ir_op_priority, op, ["vllm_c", "native"])

    return alter


def head_in_float32(worker):
    worker.vllm_config.model_config.head_dtype = torch.float32


def flash_attention(version):
    def alter(worker):
        worker.model.layers[0].attn.impl.vllm_flash_attn_version = version

    return alter


REFUSED = [
    (speculative, r"speculative_config \(setting: drafts, and passes that verify them\)"),
    (parallel(data_parallel_size=2), r"data_parallel_size \(setting: sums of experts"),
    (parallel(decode_context_parallel_size=2), "decode_context_parallel_size"),
    (parallel(prefill_context_parallel_size=2), "prefill_context_parallel_size"),
    (transfer("NixlConnector"), "NixlConnector brings from elsewhere"),
    (transfer("OffloadingConnector", spec_name="TieringOffloadingSpec"), "kv_transfer_config"),
    (transfer("MultiConnector"), "MultiConnector brings from elsewhere"),
    (fused("fuse_allreduce_rms", 2), r"pass_config\.fuse_allreduce_rms"),
    (fused("enable_sp", 2), r"pass_config\.enable_sp"),
    (fused("fuse_gemm_comms", 4), r"pass_config\.fuse_gemm_comms"),
    (fused("enable_qk_norm_rope_fusion", 1), r"enable_qk_norm_rope_fusion \(setting: vLLM's norms"),
    (norms_by("rms_norm"), "forward_native, which may follow the number of tokens"),
    (norms_by("fused_add_rms_norm"), "forward_native, which may follow the number of tokens"),
    (head_in_float32, r"lm_head \(ParallelLMHead: torch's product in torch.float32"),
    (flash_attention(2), r"attn \(Attention: vLLM's FlashAttention 2\)"),
    (flash_attention(4), "FlashAttention 4"),
    (flash_attention(None), "FlashAttention None"),
]


@pytest.mark.parametrize(("alter", "said"), REFUSED)
def test_it_is_refused_by_name(begin, alter, said):
    vllm = begin()
    worker = vllm.worker(vllm.model())
    alter(worker)
    with pytest.raises(CoverageError, match=said):
        worker.load_model()


@pytest.mark.parametrize("alter", [alter for alter, _ in REFUSED])
def test_the_audit_has_it(begin, capsys, alter):
    vllm = begin("audit")
    worker = vllm.worker(vllm.model())
    alter(worker)
    with pytest.raises(SystemExit):
        worker.load_model()
    assert capsys.readouterr().out.count("NOT COVERED") == 1


@pytest.mark.parametrize(
    "alter",
    [
        parallel(tensor_parallel_size=2),
        fused("fuse_allreduce_rms", 1),
        # What --kv-offloading-size sets, and a config that names no connector.
        transfer("OffloadingConnector", cpu_bytes_to_use=1 << 30),
        transfer(None),
    ],
)
def test_what_changes_no_sum_is_covered(begin, alter):
    vllm = begin()
    worker = vllm.worker(vllm.model())
    alter(worker)
    worker.load_model()
    assert worker.compile_or_warm_up_model() == "times"


def test_replicas_of_a_model_without_experts_are_covered(begin):
    vllm = begin()
    model = vllm.model("Qwen3ForCausalLM")
    del model.layers[0].experts
    worker = vllm.worker(model)
    parallel(data_parallel_size=2)(worker)
    worker.load_model()
    assert worker.compile_or_warm_up_model() == "times"


@pytest.mark.parametrize(("ranks", "is_on"), [(1, True), (2, False)])
def test_sums_over_ranks_are_not_fused_with_norms(begin, make_config, caplog, ranks, is_on):
    """vLLM 0.26 to 0.28 fuse them by default in their invariant mode, too."""
    vllm = begin()
    config = vllm.VllmConfig()
    vars(config).update(vars(make_config()))
    config.compilation_config.max_cudagraph_capture_size = None
    config.compilation_config.pass_config.fuse_allreduce_rms = True
    config.parallel_config.tensor_parallel_size = ranks
    config._set_cudagraph_sizes()
    assert config.compilation_config.pass_config.fuse_allreduce_rms is is_on
    assert ("fuse_allreduce_rms is turned off" in caplog.text) is not is_on
    assert vllm.calls[-1] == "graph_sizes"
