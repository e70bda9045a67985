"""Every name of vLLM's that the plug-in relies on, in the sources of its releases.

``seams.json`` holds what those sources said, and is always compared with the plug-in's own list.
With ``NDCHECK_VLLM_SOURCES``, a folder of unpacked releases (vllm-0.26.0/vllm/...), it is read out
of them again; `python tests/kernels/engines/test_seams.py FOLDER` writes it anew.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest

from ndcheck_kernels.engines.coverage import ATTENTION, LINEAR, MODELS, OWN_KEYS, OWN_STORE
from ndcheck_kernels.engines.seams import RELEASES, release_of, seams

RECORD = Path(__file__).with_name("seams.json")
SOURCES = os.environ.get("NDCHECK_VLLM_SOURCES")
LAYERS = "vllm/model_executor/layers"
CLASSES = {
    f"{LAYERS}/linear.py": (*LINEAR[1:], "UnquantizedLinearMethod"),
    f"{LAYERS}/vocab_parallel_embedding.py": (
        *("ParallelLMHead", "VocabParallelEmbedding", "UnquantizedEmbeddingMethod"),
    ),
    f"{LAYERS}/layernorm.py": ("RMSNorm",),
    f"{LAYERS}/activation.py": ("SiluAndMul",),
    f"{LAYERS}/logits_processor.py": ("LogitsProcessor",),
    f"{LAYERS}/attention/attention.py": ("Attention",),
    f"{LAYERS}/fused_moe/routed_experts.py": ("RoutedExperts",),
    f"{LAYERS}/fused_moe/unquantized_fused_moe_method.py": ("UnquantizedFusedMoEMethod",),
    f"{LAYERS}/fused_moe/router/gate_linear.py": LINEAR[:1],
    f"{LAYERS}/quantization/fp8.py": ("Fp8LinearMethod", "Fp8MoEMethod"),
    "vllm/model_executor/models/utils.py": ("PPMissingLayer",),
    "vllm/lora/layers/column_parallel_linear.py": ("QKVParallelLinearWithLoRA",),
    **{
        f"vllm/model_executor/models/{name}.py": (kind,)
        for name, kind in zip(
            ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"), MODELS, strict=True
        )
    },
}
"""Classes that the audit tells layers by, where each is."""
ATTRIBUTES = {
    f"{LAYERS}/quantization/fp8.py": (
        *("self.weight_block_size", "layer.orig_dtype", '"weight_scale_inv"'),
    ),
    f"{LAYERS}/fused_moe/modular_kernel.py": (
        *("def quant_dtype", "def block_shape", "def w1_scale", "def w2_scale"),
    ),
    f"{LAYERS}/attention/attention.py": (
        *("self.sliding_window = ", "self.head_size = ", "self.impl = "),
    ),
    "vllm/config/parallel.py": (
        *("tensor_parallel_size: int = ", "data_parallel_size: int = "),
        *("decode_context_parallel_size: int = ", "prefill_context_parallel_size: int = "),
    ),
    "vllm/v1/core/sched/scheduler.py": (
        *("self.max_num_scheduled_tokens = ", "def get_request_counts(self)"),
        "long_prefill_token_threshold",
    ),
    "vllm/v1/core/sched/output.py": ("num_scheduled_tokens: dict[str, int]", "preempted_req_ids"),
    "vllm/v1/engine/core.py": ("self.scheduler: SchedulerInterface = ",),
    "vllm/sampling_params.py": ("skip_reading_prefix_cache", "prompt_logprobs"),
    "vllm/config/vllm.py": (
        *(
            "speculative_config: SpeculativeConfig | None = ",
            "kv_transfer_config: KVTransferConfig",
        ),
        *(f'"{connector}"' for connector in OWN_KEYS),
    ),
    "vllm/config/kv_transfer.py": ("kv_connector: str | None", "kv_connector_extra_config: dict"),
    "vllm/v1/kv_offload/factory.py": (f'extra_config.get("spec_name", "{OWN_STORE}")',),
    "vllm/config/compilation.py": (
        *("pass_config: PassConfig = ", "fuse_allreduce_rms: bool = "),
        "enable_qk_norm_rope_fusion: bool = ",
    ),
    "vllm/config/kernel.py": ("rms_norm: list[str] = ", "fused_add_rms_norm: list[str] = "),
    "vllm/config/model.py": ("def head_dtype(self) -> torch.dtype:",),
    "vllm/v1/attention/backends/flash_attn.py": (
        "self.vllm_flash_attn_version = ",
        *("return FlashAttentionMetadataBuilder", "max_query_len: int", "self.headdim = "),
        "max_seqlen_q = attn_metadata.max_query_len",
    ),
}
"""What FP8 layers, attention, settings and the scheduler that `ndcheck run` watches are known to
hold, where each is written."""
OWN_USES = ("linear_batch_invariant", "init_batch_invariance", "_log_softmax_batch_invariant")


def releases(folder):
    """Those under a folder, by release."""
    found = {release_of(path.name.removeprefix("vllm-")): path for path in folder.glob("vllm-*")}
    return {release: found[release] for release in RELEASES if release in found}


def read(source, release):
    """What a release's sources say of the seams, the classes, and who else uses our names."""
    return {
        "seams": {
            use: parameters(source, seam.module, seam.name) for use, seam in seams(release).items()
        },
        "classes": {
            path: [name for name in names if name in names_of(source / path)]
            for path, names in CLASSES.items()
        },
        "attributes": {
            path: [name for name in names if name in (source / path).read_text()]
            for path, names in ATTRIBUTES.items()
        },
        "users": {name: users(source, name) for name in OWN_USES},
        "attention": [name for name in ATTENTION if is_backend(source, name)],
    }


def parameters(source, module, name):
    """Of a function or method, also of one that the module imports by name from another."""
    *path, name = name.split(".")
    body = ast.parse((source / f"{module.replace('.', '/')}.py").read_text()).body
    for part in path:
        (found,) = [n for n in body if isinstance(n, ast.ClassDef) and n.name == part]
        body = found.body
    functions = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
    if not functions:
        imports = [n for n in body if isinstance(n, ast.ImportFrom)]
        (origin,) = [n.module for n in imports if name in [alias.name for alias in n.names]]
        return parameters(source, origin, name)
    arguments = functions[-1].args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def names_of(file):
    return {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)}


def users(source, name):
    """Modules that import it: a replacement must stand in each that a GPU of ours runs."""
    found = []
    for file in sorted((source / "vllm").rglob("*.py")):
        text = file.read_text()
        if name in text and f"def {name}" not in text:
            found.append(file.relative_to(source).as_posix())
    return found


def is_backend(source, name):
    text = (source / "vllm/v1/attention/backends/registry.py").read_text()
    return f"{name} = " in text


def listed(release):
    """What the plug-in expects of a release."""
    return {use: list(seam.parameters) for use, seam in seams(release).items()}


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_every_release_was_read(record):
    assert list(record) == list(RELEASES)


@pytest.mark.parametrize("release", RELEASES)
def test_the_plugins_list_is_what_the_sources_said(record, release):
    assert record[release]["seams"] == listed(release)
    assert record[release]["attention"] == list(ATTENTION)


@pytest.mark.parametrize("release", RELEASES)
def test_every_class_that_the_audit_knows_is_there(record, release):
    assert record[release]["classes"] == {path: list(names) for path, names in CLASSES.items()}


@pytest.mark.parametrize("release", RELEASES)
def test_layers_hold_what_the_plugin_reads(record, release):
    expected = {path: list(names) for path, names in ATTRIBUTES.items()}
    assert record[release]["attributes"] == expected


@pytest.mark.parametrize("release", RELEASES)
def test_our_products_stand_wherever_vllms_are_used(record, release):
    """layers/utils.py calls vLLM's in ROCm's products only."""
    places = seams(release)
    ours = {f"{places[use].module.replace('.', '/')}.py" for use in ("linear", "output")}
    rocm = {f"{LAYERS}/utils.py"}
    assert ours <= set(record[release]["users"]["linear_batch_invariant"]) <= ours | rocm
    assert record[release]["users"]["init_batch_invariance"] == ["vllm/v1/worker/gpu_worker.py"]
    assert record[release]["users"]["_log_softmax_batch_invariant"] == []


def test_a_renamed_seam_is_seen(record):
    altered = {**record["0.26"]["seams"], "linear": ["x", "weight"]}
    assert altered != listed("0.26")


@pytest.mark.skipif(not SOURCES, reason="NDCHECK_VLLM_SOURCES names no folder of vLLM's sources")
def test_the_sources_say_what_the_record_says(record):
    found = releases(Path(SOURCES))
    assert len(found) >= 2
    for release, source in found.items():
        assert read(source, release) == record[release]


if __name__ == "__main__":
    read_all = {r: read(source, r) for r, source in releases(Path(sys.argv[1])).items()}
    lines = ",\n".join(f"{json.dumps(r)}: {json.dumps(read_all[r])}" for r in read_all)
    RECORD.write_text(f"{{{lines}}}\n")
