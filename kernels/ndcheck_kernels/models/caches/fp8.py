"""A static key-value cache in FP8: e4m3 codes of the numbers themselves, as servers keep it.

Computes: of each key and value x, bounded by 448, the nearest e4m3 number; scales are 1, as vLLM's
    are without a calibration. Attention reads the codes as the numbers that they are, which every
    dtype here holds exactly: its order is that over a cache of the model's dtype.
Depends on: the number alone.
Dtypes: bfloat16, float16, float32 to float8_e4m3fn.
Not claimed: layers with a window, or with other states than keys and values.

Inside a scope attention takes the codes; outside, which is the stock arm, it is given copies in the
model's dtype.
"""

from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from ndcheck_kernels.ops.block_fp8 import LARGEST
from ndcheck_kernels.scope.state import active_scope


def keep_fp8(cache: StaticCache, dtype: torch.dtype) -> None:
    """Let an empty cache of a model that computes in ``dtype`` hold FP8.

    Raises ValueError, naming the first layer that is no plain static one.
    """
    for index, layer in enumerate(cache.layers):
        # Earlier versions of transformers tell a layer its columns.
        if type(layer) is not StaticLayer or not hasattr(layer, "cumulative_length"):
            raise ValueError(f"layer {index} keeps a {type(layer).__name__}")
    cache.layers = [Fp8Layer(layer.max_cache_len, dtype) for layer in cache.layers]


class Fp8Layer(StaticLayer):
    """Keys and values [B, heads, columns, D] as e4m3 codes."""

    def __init__(self, max_cache_len: int, dtype: torch.dtype) -> None:
        super().__init__(max_cache_len)
        self._wide = dtype

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        narrow = (
            s.new_empty(s.shape, dtype=torch.float8_e4m3fn) for s in (key_states, value_states)
        )
        super().lazy_initialization(*narrow)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[-2]
        columns = torch.arange(length, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(length)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            # As bytes: not every torch copies FP8 by index.
            held.view(torch.uint8).index_copy_(2, columns, as_codes(new).view(torch.uint8))
        if active_scope() is not None:
            return self.keys, self.values
        return self.keys.to(self._wide), self.values.to(self._wide)


def as_codes(x: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 numbers up to 448; what is beyond them is 448, and NaN stays NaN."""
    return x.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
