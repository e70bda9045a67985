"""torch's scaled_dot_product_attention, backend by backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ndcheck_kernels.measure.timing import Launches

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def backends(operands: Sequence[Operands]) -> dict[str, Launches]:
    """The launches of every backend that takes the problem."""
    found: dict[str, Launches] = {}
    for backend in BACKENDS:
        launches = [_call(backend, *o) for o in operands]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                launches[0]()
            except RuntimeError:
                continue
        found[backend.name] = launches
    return found


def _call(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[], torch.Tensor]:
    causal = q.shape[2] > 1  # one query sees every key: no mask is the same problem, and faster
    grouped = q.shape[1] != k.shape[1]

    def launch() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return launch
