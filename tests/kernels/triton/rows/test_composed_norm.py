"""RMSNorm modules as one launch: the bits of their own ops, or they are left alone."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.models.rows.norms import composed_norms

pytestmark = pytest.mark.usefixtures("cuda_registrations")

# One of each way to cut rows into tiles.
LENGTHS = [16, 100, 128, *((256, 2560, 4096, 5120, 8192) if torch.cuda.is_available() else ())]
COVERED = (LlamaRMSNorm, GemmaRMSNorm, NemotronHRMSNorm, Qwen3_5RMSNorm, Qwen3_5RMSNormGated)


class LateRMSNorm(torch.nn.Module):
    """Adds epsilon after the root, which rows of ordinary size hardly show."""

    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        root = x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.eps
        return self.weight * (x.float() / root).to(x.dtype)


class GroupedRMSNormGated(Zamba2RMSNormGated):
    def __init__(self, n):
        super().__init__(n, group_size=n // 4)


def make(kind, n, dtype, device):
    module = kind(n).to(device=device, dtype=dtype)
    torch.nn.init.uniform_(module.weight, -1.5, 1.5)
    return module


def given(module, x):
    return (x, x.flip(-1).contiguous()) if type(module).__name__.endswith("Gated") else (x,)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", COVERED, ids=lambda kind: kind.__name__)
def test_a_module_has_the_bits_of_its_own_ops(kind, n, dtype, device, wide):
    module = make(kind, n, dtype, device)
    x = wide(3, 7, 2 * n, dtype=dtype, device=device)[..., :n]  # Rows of a joined projection.
    with torch.inference_mode(), invariant_kernels():
        own = module(*given(module, x))
    with torch.inference_mode(), composed_norms(module) as replaced, invariant_kernels() as scope:
        assert replaced == 1
        assert torch.equal(module(*given(module, x)), own)
        assert scope.fires["mean"] == 1
        padded = torch.cat([torch.full_like(x[:1], torch.nan), x])
        assert torch.equal(module(*given(module, padded))[1:], own)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("kind", [LateRMSNorm, GroupedRMSNormGated], ids=lambda kind: kind.__name__)
def test_a_module_of_another_arithmetic_is_left_alone(kind, dtype, device):
    module = make(kind, 128, dtype, device)
    with composed_norms(module) as replaced:
        assert replaced == 0
        assert "forward" not in vars(module)


def test_outside_of_a_scope_a_module_computes_as_ever(dtype, device, wide):
    module = make(LlamaRMSNorm, 128, dtype, device)
    x = wide(5, 128, dtype=dtype, device=device)
    own = module(x)
    with composed_norms(module) as replaced:
        assert replaced == 1
        assert torch.equal(module(x), own)


def test_a_module_in_another_dtype_is_looked_at_again(device):
    """In float32 all ways to round the weighted row are one."""
    module = make(NemotronHRMSNorm, 128, torch.float32, device)
    with composed_norms(module) as replaced:
        assert replaced == 1
    module.half()
    x = torch.randn(64, 128, device=device).half()
    with torch.inference_mode(), invariant_kernels():
        own = module(x)
        with composed_norms(module) as replaced:
            assert replaced == 1
            assert torch.equal(module(x), own)
            module.float()
            assert module(x.float()).dtype == torch.float32
