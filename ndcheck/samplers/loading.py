"""A model, its config and its tokenizer, from a hub id or a directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.errors import BackendError, UsageError
from ndcheck.records import RunSpec
from ndcheck.samplers.sharding import check_heads, distributed_config, draw_weights, gather, shard

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def load_config(source: str, spec: RunSpec) -> Any:
    """Raises UsageError where there is none."""
    transformers.utils.logging.disable_progress_bar()
    with _one_line_errors(source):
        return transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=spec.trust_remote_code
        )


def load_tokenizer(source: str, spec: RunSpec) -> Any:
    """Raises UsageError where there is none, or one that does not serve."""
    origin = _tokenizer_source(source, spec)
    with _one_line_errors(origin):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            origin, trust_remote_code=spec.trust_remote_code
        )
    if not tokenizer("a")["input_ids"]:
        raise UsageError(f"--model {origin}: it has no tokenizer that gives tokens")
    if origin != source:
        rows = load_config(source, spec).get_text_config(decoder=True).vocab_size
        if rows < len(tokenizer):
            raise UsageError(
                f"--model {source}: its vocab_size is {rows}; without a tokenizer of its own it "
                f"needs {len(tokenizer)}, for that of the embedded model"
            )
    return tokenizer


def load_model(source: str, config: Any, spec: RunSpec, device: torch.device) -> Any:
    """The model on ``device``, as `eval`: its weights, or random ones where the spec wants them.

    Where ranks share it, each has its shard. Raises UsageError and BackendError as
    `TransformersSampler` does.
    """
    if spec.tensor_parallel > 1:
        check_heads(config, spec.tensor_parallel)
        # Its plan names what only other models of the class have.
        transformers.utils.logging.set_verbosity_error()
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    if spec.random_weights is not None:
        dtype = DTYPES.get(spec.dtype, config.dtype or torch.bfloat16)
        # One process makes what four lines of a script do; several never have a whole model.
        is_spread = spec.tensor_parallel > 1 or spec.tp_groups is not None
        torch.manual_seed(spec.random_weights)
        with _one_line_errors(source):
            with torch.device("meta") if is_spread else device:
                made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
            if spec.tensor_parallel > 1:
                made = shard(made, spec.tensor_parallel)
            if is_spread:
                draw_weights(made, spec.random_weights, device)
        return made.eval()
    if spec.tensor_parallel > 1:
        options["distributed_config"] = distributed_config(spec.tensor_parallel)
    with _one_line_errors(source):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES.get(spec.dtype, "auto"),
            use_safetensors=True,
            **options,
        )
    return (model if spec.tensor_parallel > 1 else model.to(device)).eval()


def digest_weights(model: Any) -> str:
    """16 hexadecimal digits over every parameter's name, shape, dtype and 4096 of its elements.

    Evenly spaced elements keep this fast at any size; a fine-tune changes some of them.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.state_dict().items()):
        flat = gather(parameter.detach()).reshape(-1)
        step = max(1, flat.numel() // 4096)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer_source(source: str, spec: RunSpec) -> str:
    """A bare config.json has no tokenizer; random weights speak no language, so any will do."""
    directory = Path(source)
    is_bare = directory.is_dir() and not any(directory.glob("tokenizer*"))
    return str(MODEL_DIRECTORY) if spec.random_weights is not None and is_bare else source


@contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    """Loading fails in many ways; each becomes one line that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"--model {source}: {first_line(error)} "
            "(accepted: builtin, a directory with config.json and safetensors, or a hub id)"
        ) from error
    except RuntimeError as error:
        raise BackendError(f"cannot load {source}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
