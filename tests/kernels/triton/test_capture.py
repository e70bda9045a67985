"""What a CUDA graph must not meet in a decode step: a value that the host reads from the device.

Without a GPU the CUDA registrations stand in for the CPU's, and the reads are counted.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from ndcheck_kernels import invariant_kernels, invariant_model
from ndcheck_kernels.models import attention as model_attention
from ndcheck_kernels.models.caches.argument import cache_argument
from ndcheck_kernels.ops import attention
from ndcheck_kernels.scope import registry

SMALLER = {"num_hidden_layers": 1, "num_attention_heads": 2}  # as wide as all their heads
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    # Makes a mask for windows that no layer has.
    "qwen2-moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 4.0}),
    "stablelm": ("StableLm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {}),
}
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "unique_dim")

pytestmark = pytest.mark.usefixtures("cuda_registrations")


class Reads(TorchDispatchMode):
    """The ops whose result the host waits for; those of an implementation are seen as well."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_decode_step_reads_nothing_back(family, device, sizes, monkeypatch) -> None:
    monkeypatch.delitem(registry._pointwise, "cpu", raising=False)  # CUDA has no such proofs.
    name, values = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(sizes | SMALLER | values))
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(device).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=8)
    mask = torch.ones(2, 8, dtype=torch.int64, device=device)
    ids = torch.tensor([[3, 5, 7], [2, 4, 6]], device=device)

    def step(ids, first):
        positions = torch.arange(first, first + ids.shape[1], device=device)[None]
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **{cache_argument(model.forward): cache},
        ).logits[:, -1]

    with invariant_model(model), Reads() as reads, invariant_kernels():
        step(ids, 0)
        checked = len(reads.seen)
        for module in (attention, model_attention):
            monkeypatch.setattr(module, "is_capturing", lambda: True)
        logits = step(ids[:, :1], 3)
    assert logits.isfinite().all()
    assert checked > 0  # Or reads would not be seen at all.
    assert reads.seen[checked:] == []


def test_reads_are_seen(device) -> None:
    with Reads() as reads, invariant_kernels():
        attention.spans_from_mask(torch.ones(1, 2, 3, dtype=torch.bool, device=device))
    assert reads.seen
