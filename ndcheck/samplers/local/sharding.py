"""A model that several ranks share, each with its shard, and weights drawn from a seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ndcheck.errors import UsageError, doing
from ndcheck.samplers.local.checkpoint.quantised import draw_layer


def distributed_config(n_ranks: int) -> Any:
    """What makes transformers apply a model's tensor-parallel plan.

    Raises UsageError where the installed version has none.
    """
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=n_ranks)
    except (ImportError, TypeError):
        raise UsageError(
            f"--tp {n_ranks}: transformers {transformers.__version__} cannot share a model between "
            "ranks as ndcheck needs it: install 5.17 or newer"
        ) from None


def check_heads(config: Any, n_ranks: int) -> None:
    """Raise UsageError where a head would be cut in two: transformers repeats no key-value head."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % n_ranks:
        most = math.gcd(heads, n_ranks)
        raise UsageError(
            f"--tp {n_ranks}: the model has {heads} key-value heads, which transformers does not "
            f"repeat on several ranks; give a number that divides {heads}, such as {most}"
        )


def shard(model: Any, n_ranks: int) -> Any:
    """Cut a model on the meta device by its plan."""
    config, _, mesh = model.prepare_distribute_model(distributed_config(n_ranks))
    return model.maybe_distribute_model(model, config, mesh)


def find_shards(model: Any) -> dict[str, Any]:
    """The parameters by name that a plan has cut."""
    return {name: p for name, p in model.named_parameters() if hasattr(p, "device_mesh")}


@torch.no_grad()
def draw_weights(
    model: Any, seed: int, device: torch.device, shards: Mapping[str, Any] | None = None
) -> None:
    """Give a model on the meta device the weights that its class draws, from ``seed``.

    Quantised layers, which a class does not draw, are normal with its usual deviation, rounded. A
    module's draws depend on the seed and its path alone, so they are the same however many ranks
    share the model, and no more than one module is ever there as a whole. ``shards``: how
    parameters are cut whose layer was replaced after the plan was applied; their scales are cut so.
    """
    std = getattr(model.config.get_text_config(decoder=True), "initializer_range", 0.02)
    drawing = _Drawing(seed, device, std, shards or {}, sum(p.numel() for p in model.parameters()))
    drawing.fill(model, "", model._init_weights)
    model.tie_weights()


@dataclass(slots=True)
class _Drawing:
    seed: int
    device: torch.device
    std: float
    shards: Mapping[str, Any]
    n_weights: int
    n_drawn: int = 0

    def fill(self, module: Any, path: str, init: Callable[[Any], None]) -> None:
        """The module and those below it."""
        for name, child in module.named_children():
            own = child._init_weights if isinstance(child, transformers.PreTrainedModel) else init
            self.fill(child, f"{path}.{name}", own)
        tenth = 100 * self.n_drawn // max(1, self.n_weights) // 10 * 10
        with doing(f"drawing {self.n_weights / 1e9:.1f} billion weights: {tenth} % are there"):
            self._fill_own(module, path, init)

    def _fill_own(self, module: Any, path: str, init: Callable[[Any], None]) -> None:
        planned = {name: p for name, p in module._parameters.items() if p is not None}
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
                    is_parameter = tensors is module._parameters
                    trains = is_parameter and tensor.is_floating_point()
                    tensors[name] = torch.nn.Parameter(zeros, trains) if is_parameter else zeros
        digest = hashlib.blake2b(f"{self.seed}{path}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest) >> 1)
        if not draw_layer(module, self.std):
            init(module)
        for name, parameter in planned.items():
            self.n_drawn += parameter.numel()
            cut = self.shards.get(f"{path}.{name.removesuffix('_scale_inv')}"[1:], parameter)
            if hasattr(cut, "device_mesh"):
                whole = module._parameters[name].detach()
                module._parameters[name] = torch.nn.Parameter(_cut(whole, cut))


def _cut(whole: torch.Tensor, planned: Any) -> Any:
    """This rank's shard of a tensor, in memory of its own."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = planned.device_mesh, planned.placements
    plain = whole.view(torch.uint8) if whole.dtype.itemsize == 1 else whole  # Of FP8, as in gather.
    here = distribute_tensor(plain, mesh, placements, src_data_rank=None).to_local().clone()
    return _as_shard(here.view(whole.dtype), mesh, placements, whole.shape)


def _as_shard(here: torch.Tensor, mesh: Any, placements: Any, shape: Sequence[int]) -> Any:
    """``here`` as this rank's shard of a contiguous tensor of ``shape``."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        here, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def gather(parameter: Any) -> torch.Tensor:
    """A parameter as a whole; where it is shared, every rank must ask for it."""
    if not hasattr(parameter, "full_tensor"):
        return parameter  # type: ignore[no-any-return]
    from torch.distributed.tensor import Shard

    here, mesh, (placement,) = parameter.to_local(), parameter.device_mesh, parameter.placements
    here = here.view(torch.uint8) if here.dtype.itemsize == 1 else here  # For all collectives.
    n_groups = getattr(placement, "split_factor", None)
    if n_groups is None:
        whole = _as_shard(here, mesh, [placement], parameter.shape).full_tensor()
    else:  # Of each group a part, such as of gates and values; torch 2.11 gathers no such tensor.
        dim = placement.dim % here.ndim
        size = (n_groups, parameter.shape[dim] // n_groups)
        shape = (*parameter.shape[:dim], *size, *parameter.shape[dim + 1 :])
        groups = here.unflatten(dim, (n_groups, -1))
        whole = _as_shard(groups, mesh, [Shard(dim + 1)], shape).full_tensor().flatten(dim, dim + 1)
    return whole.view(parameter.dtype)  # type: ignore[no-any-return]
