"""An adapter of peft's: its files checked, and merged into the weights as peft does it."""

from __future__ import annotations

import importlib.util
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.samplers.local.checkpoint.files import (
    check_files,
    find_directory,
    read_json,
    read_shapes,
)

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KINDS = ("LORA", "IA3", "LOHA", "LOKR")
"""Those that become part of the weights; others add tokens or layers."""
MOST_RANK = 1 << 14
REFUSED = re.compile(
    r".*_config|layer_replication|alora_invocation_tokens|trainable_token_indices|use_(qa|bd)lora"
)
"""Settings that import other packages, rebuild the base, or apply to some tokens only."""
INITIAL = (True, False, None, "gaussian", "orthogonal")
"""Ways to begin that leave the base's weights as they are."""


def read_adapter(directory: Path) -> str | None:
    """The base that an adapter names. Raises UsageError where it is none that can be merged."""
    option = f"--adapter {directory}"
    if find_directory(str(directory), option) is None:
        raise UsageError(f"{option}: it is no directory")
    if not (directory / CONFIG).exists():
        raise UsageError(f"{option}: it holds no {CONFIG}, so it is no adapter of peft's")
    if not (directory / WEIGHTS).exists():
        said = f"{PICKLED} could run code when it is read" if (directory / PICKLED).exists() else ""
        raise UsageError(
            f"{option}: it holds no {WEIGHTS}{said and f', and {said}'}: save it with "
            "safe_serialization=True"
        )
    config = read_json(option, directory / CONFIG)
    for reason in _oddities(config):
        raise UsageError(f"{option}: {CONFIG}: {reason}")
    check_files(directory, option)
    read_shapes(option, directory / WEIGHTS)
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"{option}: an adapter needs peft: pip install 'ndcheck[peft]'")
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _oddities(config: dict[str, Any]) -> list[str]:
    found = []
    kind = config.get("peft_type")
    if kind not in KINDS:
        found.append(f"peft_type {kind!r} cannot be merged into weights; {', '.join(KINDS)} can")
    found += [
        f"{name} is not accepted"
        for name, value in config.items()
        if value and REFUSED.fullmatch(name)
    ]
    initial = config.get("init_lora_weights")
    if not isinstance(initial, bool | str | None) or initial not in INITIAL:
        found.append(f"init_lora_weights {initial!r} changes the base: save it as plain LoRA")
    ranks = config.get("rank_pattern") or {}
    if not isinstance(ranks, dict):
        return [*found, "rank_pattern is no object"]
    for name, rank in {"r": config.get("r", 1), **ranks}.items():
        if kind != "IA3" and not (type(rank) is int and 1 <= rank <= MOST_RANK):
            found.append(f"{name} is {rank!r}: it must be a rank up to {MOST_RANK}")
    return found


def merge_adapter(model: Any, directory: Path) -> Any:
    """``model`` with the adapter in its weights, which are rounded to their dtype once.

    Raises UsageError where the adapter does not fit, so that a part of it would be left out.
    """
    import peft

    option = f"--adapter {directory}"
    config = read_json(option, directory / CONFIG)
    known = {field.name for field in fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]])}
    for name, value in config.items():
        # What is off, and the numbers of what is off, is in the files of every later version.
        if name not in known and name != "peft_version" and (value is True or _is_filled(value)):
            raise UsageError(
                f"{option}: {CONFIG}: peft {peft.__version__} does not know {name}, and would "
                "leave it out: pip install -U peft"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What it would leave out is refused here.
        wrapped = peft.PeftModel.from_pretrained(model, str(directory), torch_device="cpu")
    wanted = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    stored = set(read_shapes(option, directory / WEIGHTS))
    if lacking := sorted(wanted - stored):
        raise UsageError(f"{option}: {WEIGHTS} lacks {len(lacking)} of its tensors ({lacking[0]})")
    if foreign := sorted(stored - wanted - wrapped.state_dict().keys()):
        raise UsageError(
            f"{option}: {type(model).__name__} has no place for {len(foreign)} of its "
            f"tensors ({foreign[0]}): it is an adapter of another model"
        )
    _untie(wrapped.get_base_model())
    return wrapped.merge_and_unload(safe_merge=True)


def _is_filled(value: Any) -> bool:
    return isinstance(value, str | list | dict) and bool(value)


def _untie(model: Any) -> None:
    """Give the head weights of its own where the adapter changes one of two that share them.

    peft computes with the adapter beside the shared weights, and would merge it into both.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not any(isinstance(each, BaseTunerLayer) for each in (embeddings, head)):
        return
    if embeddings.weight is not head.weight:
        return
    own = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
