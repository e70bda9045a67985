"""Faults put into vLLM before its engine starts: the plug-in must refuse it, or leave it alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

UNKNOWN_VERSION = "0.99.0"


def plant(fault: str) -> None:
    """``unknown-version``, ``uncovered-layer`` or ``dead-override``."""
    import vllm
    from vllm.v1.worker.gpu_worker import Worker

    if fault == "unknown-version":
        vllm.__version__ = UNKNOWN_VERSION
        return
    alter = {"uncovered-layer": add_layer, "dead-override": bypass}[fault]
    Worker.load_model = _then(Worker.load_model, alter)


def _then(load: Callable[..., None], alter: Callable[[Any], None]) -> Callable[..., None]:
    @wraps(load)  # The plug-in looks at the parameters before it takes the function's place.
    def load_and_alter(worker: Any, **named: Any) -> None:
        load(worker, **named)
        alter(worker.model_runner.get_model())

    return load_and_alter


def add_layer(model: Any) -> None:
    """One of a class that nothing covers."""
    import torch

    model.model.layers[0].add_module("mixer", torch.nn.Linear(8, 8))


def bypass(model: Any) -> None:
    """A layer that calls a product by another name, as a release that moved it would."""
    import torch

    def apply(layer: Any, x: Any, bias: Any = None) -> Any:
        return torch.nn.functional.linear(x, layer.weight, bias)

    model.model.layers[0].self_attn.o_proj.quant_method.apply = apply
