"""Where vLLM can be entered: the names of its releases, and what each must look like.

Nothing here imports vLLM. tests/kernels/engines reads the same names out of vLLM's sources.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any

RELEASES = ("0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32", "0.33")
"""Whose sources have been read."""
_MOVED = 29
"""The minor release from which the invariant mode's module has its new name."""
_ALL2ALL = 27
"""That from which a communicator is told whether experts are spread."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A function, or a class's method, that the plug-in puts its own in place of."""

    module: str
    name: str
    parameters: tuple[str, ...]

    def find(self) -> tuple[Any, str, Any]:
        """The object that holds it, its name there, and itself.

        Raises SeamError where it is missing or takes other parameters.
        """
        try:
            holder: Any = import_module(self.module)
            *path, name = self.name.split(".")
            for part in path:
                holder = getattr(holder, part)
            found = getattr(holder, name)
        except (ImportError, AttributeError) as error:
            raise SeamError(f"{self} is not there: {error}") from error
        if tuple(inspect.signature(found).parameters) != self.parameters:
            raise SeamError(f"{self} takes other parameters: {inspect.signature(found)}")
        return holder, name, found

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


class SeamError(RuntimeError):
    """vLLM is not as this release's sources said."""


_EXPERTS = (
    "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation",
    "global_num_experts", "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2",
    "expert_tokens_meta", "apply_router_weight_on_input",
)  # fmt: skip


_COMMUNICATOR = (
    "self", "cpu_group", "device", "device_group", "unique_name", "global_ranks",
    "global_world_size", "tcp_store_group",
)  # fmt: skip


def release_of(version: str) -> str:
    """0.26 of 0.26.0+cu130."""
    return ".".join(version.split(".")[:2])


def seams(release: str) -> dict[str, Seam]:
    """What is replaced in a release of `RELEASES`, by what it is for; ``pair_*`` are called.

    ``start`` runs first in every worker and puts the others in place; ``graph_sizes`` before, where
    the configuration is made.
    """
    minor = int(release.split(".")[1])
    folder = "layers" if minor < _MOVED else "determinism"
    mode = f"vllm.model_executor.{folder}.batch_invariant"
    layers = "vllm.model_executor.layers"
    worker = "vllm.v1.worker.gpu_worker"
    devices = "vllm.distributed.device_communicators"
    ranks, pair = f"{devices}.cuda_communicator", f"{devices}.custom_all_reduce"
    linear = ("input", "weight", "bias")
    return {
        "graph_sizes": Seam("vllm.config.vllm", "VllmConfig._set_cudagraph_sizes", ("self",)),
        "start": Seam(mode, "init_batch_invariance", ()),
        "linear": Seam(f"{layers}.linear", "linear_batch_invariant", linear),
        "output": Seam(f"{layers}.vocab_parallel_embedding", "linear_batch_invariant", linear),
        "log_softmax": Seam(
            mode, "_log_softmax_batch_invariant", ("input", "dim", "_half_to_float")
        ),
        "experts": Seam(f"{layers}.fused_moe.experts.triton_moe", "TritonExperts.apply", _EXPERTS),
        "fp8_linear": Seam(
            f"{layers}.quantization.fp8",
            "Fp8LinearMethod.apply",
            ("self", "layer", "x", "bias"),
        ),
        "communicator": Seam(
            ranks,
            "CudaCommunicator.__init__",
            _COMMUNICATOR if minor < _ALL2ALL else (*_COMMUNICATOR, "use_all2all"),
        ),
        "pair_fits": Seam(pair, "CustomAllreduce.should_custom_ar", ("self", "inp")),
        "pair_sum": Seam(pair, "CustomAllreduce.custom_all_reduce", ("self", "input")),
        "all_reduce": Seam(ranks, "CudaCommunicator.all_reduce", ("self", "input_")),
        "reduce_scatter": Seam(ranks, "CudaCommunicator.reduce_scatter", ("self", "input_", "dim")),
        "attention_step": Seam(
            "vllm.v1.attention.backends.flash_attn",
            "FlashAttentionMetadataBuilder.build",
            ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        ),
        "load": Seam(worker, "Worker.load_model", ("self", "load_dummy_weights")),
        "warm_up": Seam(worker, "Worker.compile_or_warm_up_model", ("self",)),
    }


class Replacements:
    """Functions of vLLM's in whose place others stand, until `restore`."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Any, str, Any]] = {}

    def __getitem__(self, use: str) -> Any:
        """vLLM's own."""
        return self._found[use][2]

    def put(self, places: dict[str, Seam], functions: dict[str, Any]) -> None:
        """All of them, or none. Raises SeamError."""
        found = {use: places[use].find() for use in functions}
        for use, (holder, name, _) in found.items():
            setattr(holder, name, functions[use])
        self._found |= found

    def restore(self, but: Collection[str] = ()) -> None:
        for use, (holder, name, own) in self._found.items():
            if use not in but:
                setattr(holder, name, own)
