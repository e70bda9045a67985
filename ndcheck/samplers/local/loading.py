"""A model, its config and its tokenizer, from a hub id or a directory.

transformers fills what a checkpoint lacks with random numbers and drops what it has no place for,
with a warning at most. A measurement of such a model would be one of another model, so here each of
these ends with a UsageError that names the model, the file and the tensor.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.errors import BackendError, NdcheckError, UsageError, first_line
from ndcheck.records import RunSpec
from ndcheck.samplers import options
from ndcheck.samplers.local.checkpoint.adapters import merge_adapter
from ndcheck.samplers.local.checkpoint.bounds import bounded
from ndcheck.samplers.local.checkpoint.files import (
    ACCEPTED,
    CONFIG,
    can_hold,
    check_config,
    count_elements,
    find_zeros,
    read_dtypes,
)
from ndcheck.samplers.local.checkpoint.fp8_layouts import FP8, kept_fp8
from ndcheck.samplers.local.checkpoint.gguf_file import SUFFIX, read_gguf_head
from ndcheck.samplers.local.checkpoint.packed import make_layers, stored_layers
from ndcheck.samplers.local.checkpoint.quantised import (
    Quantisation,
    check_quantisation,
    forget_quantisation,
    loading_options,
    prepare_stock,
    put_layers,
    read_quantisation,
    stored_by_us,
    warn_of_cache,
)
from ndcheck.samplers.local.device import seeded
from ndcheck.samplers.local.memory import free_bytes, is_out_of_memory
from ndcheck.samplers.local.sharding import (
    check_heads,
    distributed_config,
    draw_weights,
    find_shards,
    gather,
    shard,
)

CONFIG_S, GGUF_S, BUILD_S, ADAPTER_S = 20, 300, 60, 3600
"""Most of CPU time to read a config, one inside a GGUF file with all of its vocabulary, to build
the empty model that it describes, and to merge an adapter."""
FOREIGN = re.compile(
    r"(^|\.)((layers|h|blocks)\.\d+\.(?!(.*\.)?(attn|attention)\.(masked_)?bias$).*(weight\w*|bias|sinks)"
    r"|(score|classifier|qa_outputs|v_head)\..*)$"
)
"""Names of stored tensors that a model cannot do without: those of its layers and their scales
(`weight_scale`), or of another head.

Where the model has no place for one, the config describes another model. Anything else without a
place does no harm: a buffer that older versions of transformers stored (`attn.bias`, a mask), or
biases of zeros, which tools for GPTQ give to layers without.
"""
DTYPES = {short: getattr(torch, name) for short, name in options.DTYPES.items()}


def load_config(source: str, spec: RunSpec) -> Any:
    """The model's config. Raises UsageError where there is none, or none of a decoder."""
    transformers.utils.logging.disable_progress_bar()
    is_gguf = source.endswith(SUFFIX)
    if not is_gguf:
        check_config(source)
    part, most_s = ("its metadata", GGUF_S) if is_gguf else (CONFIG, CONFIG_S)
    with _one_line_errors(source, part), bounded(f"--model {source}: {part}", most_s):
        config = transformers.AutoConfig.from_pretrained(
            **_place(source), trust_remote_code=spec.trust_remote_code
        )
        if is_gguf:
            config.dtype = DTYPES[read_gguf_head(Path(source)).dtype]
        else:
            _check_architecture(source, config)
    return config


def _place(source: str) -> dict[str, str]:
    """Where transformers' ``from_pretrained`` finds a directory, a hub id, or a GGUF file."""
    if not source.endswith(SUFFIX):
        return {"pretrained_model_name_or_path": source}
    file = Path(source)
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def dequantised() -> dict[str, Any]:
    """What makes plain tensors of a GGUF file's; earlier versions of transformers always do."""
    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _check_architecture(source: str, config: Any) -> None:
    """Raise UsageError where the config is not one of a causal language model."""
    names = [str(name) for name in config.architectures or []]
    if any(re.search(r"(ForCausalLM|LMHeadModel)$", name) for name in names):
        return
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"--model {source}: {', '.join(names) or type(config).__name__} is an encoder and a "
            "decoder: ndcheck measures causal language models"
        )
    mapping = transformers.AutoModelForCausalLM._model_mapping
    made = mapping[type(config)].__name__ if type(config) in mapping else None
    other = [name for name in names if re.search(r"For[A-Z]\w+$", name) and name != made]
    if other and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise UsageError(
            f"--model {source}: {CONFIG} names {', '.join(other)}, which is no causal language "
            "model"
        )


def load_tokenizer(source: str, spec: RunSpec) -> Any:
    """The model's tokenizer; with random weights the embedded model's, if it has none of its own.

    Raises UsageError where there is none, or where it turns text into no tokens.
    """
    origin = _tokenizer_source(source, spec)
    with _one_line_errors(origin, "tokenizer.json, tokenizer_config.json"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            **_place(origin), trust_remote_code=spec.trust_remote_code
        )
        serves = bool(tokenizer("a")["input_ids"])
    if not serves:
        raise UsageError(f"--model {origin}: it has no tokenizer that gives tokens")
    if origin != source:
        rows = load_config(source, spec).get_text_config(decoder=True).vocab_size
        if rows < len(tokenizer):
            raise UsageError(
                f"--model {source}: its vocab_size is {rows}; without a tokenizer of its own it "
                f"needs {len(tokenizer)}, for that of the embedded model"
            )
    return tokenizer


def load_model(
    source: str, config: Any, spec: RunSpec, device: torch.device, adapter: Path | None = None
) -> Any:
    """The model on ``device``, as `eval`: its weights, or random ones where the spec wants them.

    An ``adapter`` is merged into stored weights of one process. Where ranks share the model, each
    has its shard. Raises UsageError and BackendError as `TransformersSampler` does.
    """
    if spec.tensor_parallel > 1:
        check_heads(config, spec.tensor_parallel)
    # Its warnings are about what is refused here, or about plans for layers of other models.
    transformers.utils.logging.set_verbosity_error()
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.attention.startswith("paged|"):
        name = spec.attention.removeprefix("paged|")
        raise UsageError(f"--attn {spec.attention}: give {name}, which --batching continuous pages")
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    stored = _count_elements(source) if spec.random_weights is None else None
    found = None if source.endswith(SUFFIX) else read_quantisation(config)
    check_quantisation(source, found, spec)
    options_of_weights = loading_options(config, found, spec)
    if spec.dequantise:
        config = copy.deepcopy(config)
        forget_quantisation(config)
    _check_size(source, config, spec, options, device, stored, found)
    if spec.random_weights is not None:
        made = _make(source, config, spec, options, device)
        prepare_stock(made, device, spec, source)
        return made
    if spec.tensor_parallel > 1:
        options["distributed_config"] = distributed_config(spec.tensor_parallel)
    dtype = DTYPES.get(spec.dtype, "auto")
    if source.endswith(SUFFIX):
        options |= dequantised()
        dtype = DTYPES.get(spec.dtype, config.dtype)
    options |= options_of_weights
    packed = stored_by_us(found, spec)
    if adapter is not None and packed is not None and not spec.dequantise:
        raise UsageError(f"--adapter {adapter}: it is merged into plain weights: --dequantise")
    part = "its weights and generation_config.json"
    with _one_line_errors(source, part), kept_fp8(), stored_layers(packed):
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            **_place(source),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # Those are found and refused below, by name.
            **options,
        )
    _check_loaded(source, model, said)
    warn_of_cache(config, _names(said.get("unexpected_keys")), spec)
    if packed is not None:
        with _one_line_errors(source, "its weights"):
            make_layers(model, device, is_plain=spec.dequantise)
    if adapter is not None:
        model = _add_adapter(model, adapter)
    model = model if spec.tensor_parallel > 1 else model.to(device)
    prepare_stock(model, device, spec, source)
    return model.eval()


def _count_elements(source: str) -> int | None:
    """The elements of all stored tensors; None for a hub id."""
    is_gguf = source.endswith(SUFFIX)
    return read_gguf_head(Path(source)).n_elements if is_gguf else count_elements(source)


def _make(
    source: str, config: Any, spec: RunSpec, options: dict[str, Any], device: torch.device
) -> Any:
    assert spec.random_weights is not None
    found = read_quantisation(config)
    # As if a checkpoint had been stored: in another dtype it is the same model, not other draws.
    dtype = DTYPES.get(spec.dtype, config.dtype or torch.bfloat16)
    # Codes are drawn in float32, and their scales stay in it.
    stored = dtype if found else config.dtype or torch.bfloat16
    # One process draws as `from_config` does, so that a short script has the same weights. Several
    # draw their shards, so that none ever holds the whole model; quantised ones a matrix at a time.
    is_spread = spec.tensor_parallel > 1 or spec.tp_groups is not None
    with _one_line_errors(source, CONFIG), seeded(spec.random_weights, device):
        with torch.device("meta") if is_spread or found else device:
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=stored, **options)
        shards = {}
        if spec.tensor_parallel > 1:
            made = shard(made, spec.tensor_parallel)
            shards = find_shards(made)
        if found:
            put_layers(made, found)
        if is_spread or found:
            draw_weights(made, spec.random_weights, device, shards)
    if stored != dtype:
        made.config.dtype = dtype
        for parameter in made.parameters():
            if parameter.dtype == stored:
                parameter.data = parameter.data.to(dtype)
        like = build_empty(source, config, spec, options).buffers()
        for buffer, other in zip(made.buffers(), like, strict=True):
            buffer.data = buffer.data.to(other.dtype)
    return made.eval()


def build_empty(
    source: str, config: Any, spec: RunSpec, options: dict[str, Any] | None = None
) -> Any:
    """The model that a config describes, without memory. Raises UsageError where it is none."""
    dtype = DTYPES.get(spec.dtype, config.dtype or torch.bfloat16)
    with (
        _one_line_errors(source, CONFIG),
        bounded(f"--model {source}: building what {CONFIG} describes", BUILD_S),
        torch.device("meta"),
    ):
        empty = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, **(options or {})
        )
        found = read_quantisation(config)
        if found is not None and found.is_covered:
            put_layers(empty, found)
        return empty


def _check_size(
    source: str,
    config: Any,
    spec: RunSpec,
    options: dict[str, Any],
    device: torch.device,
    stored: int | None,
    found: Quantisation | None,
) -> None:
    """Raise UsageError where the config describes more than the files, or the memory, can hold.

    ``stored`` is what the files hold, None where nothing is loaded. Of ``found`` weights that stay
    packed no size is known.
    """
    empty = build_empty(source, config, spec, options)
    n_weights = sum(p.numel() for p in empty.parameters())
    n_bytes = sum(t.nbytes for t in (*empty.parameters(), *empty.buffers()))
    is_counted = found is None or found.method == FP8  # Others pack several weights into one.
    if stored is not None and is_counted and n_weights > 2 * stored:
        raise UsageError(
            f"--model {source}: {CONFIG} describes {n_weights:,} weights, and the "
            f"{'file holds' if source.endswith(SUFFIX) else 'safetensors files hold'} {stored:,}"
        )
    free = free_bytes(device) * max(1, spec.tensor_parallel)
    if (found is None or found.is_covered or spec.dequantise) and n_bytes > free:
        raise UsageError(
            f"--model {source}: {CONFIG} describes a model of {n_bytes / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free on {device}"
        )


def _add_adapter(model: Any, directory: Path) -> Any:
    option = f"--adapter {directory}"
    part = "its adapter_config.json and weights"
    with _one_line_errors(str(directory), part, "--adapter"), bounded(option, ADAPTER_S):
        return merge_adapter(model, directory)


def _check_loaded(source: str, model: Any, found: dict[str, Any]) -> None:
    """Raise UsageError where the model in memory is not the stored one.

    ``found`` is what transformers says of the loading: tensors missing, left over, of other shapes.
    """
    name = type(model).__name__
    for kind, said in (
        ("missing_keys", "are missing from the checkpoint and would be filled at random"),
        ("mismatched_keys", "have another shape in the checkpoint and would be filled at random"),
        ("conversion_errors", "cannot be made from those in the checkpoint"),
        ("error_msgs", "could not be loaded"),
    ):
        if keys := _names(found.get(kind)):
            raise UsageError(
                f"--model {source}: {len(keys)} of {name}'s tensors {said} ({keys[0]}): "
                "--random-weights SEED measures its shape without weights"
            )
    left_over = [*filter(FOREIGN.search, _names(found.get("unexpected_keys")))]
    zeros = find_zeros(source, {key for key in left_over if key.endswith(".bias")})
    foreign = [key for key in left_over if key not in zeros]
    if foreign:
        raise UsageError(
            f"--model {source}: {name} has no place for {len(foreign)} tensors of the checkpoint "
            f"({foreign[0]}), so it would not be the stored model: {CONFIG} describes another"
        )
    dtypes = {} if source.endswith(SUFFIX) else read_dtypes(source)
    for key, parameter in model.named_parameters():
        if key in dtypes and not can_hold(str(parameter.dtype), dtypes[key]):
            raise UsageError(
                f"--model {source}: {key} is stored as {dtypes[key]}, and {CONFIG} makes it "
                f"{parameter.dtype}: it would not be the stored model"
            )
        if type(parameter.data) is not torch.Tensor and not hasattr(parameter, "device_mesh"):
            raise UsageError(
                f"--model {source}: {key} is a {type(parameter.data).__name__}: quantised tensors "
                "that are no plain ones cannot be measured"
            )


def _names(keys: Any) -> list[str]:
    """Sorted names out of what transformers lists: strings, tuples that begin with one, a dict."""
    return sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys or ())


def digest_weights(model: Any) -> str:
    """16 hexadecimal digits over name, shape, dtype and 4096 elements of every tensor.

    The elements are evenly spaced: few enough to be fast at any size, and enough for a fine-tuned
    model to have another digest.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.state_dict().items()):
        flat = gather(parameter.detach()).reshape(-1)
        step = max(1, flat.numel() // 4096)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer_source(source: str, spec: RunSpec) -> str:
    """Where the tokenizer is: with ``source``, or the embedded model's for a bare config.json.

    Only random weights may go without a tokenizer of their own: they speak no language.
    """
    directory = Path(source)
    is_bare = directory.is_dir() and not any(directory.glob("tokenizer*"))
    return str(MODEL_DIRECTORY) if spec.random_weights is not None and is_bare else source


@contextmanager
def _one_line_errors(source: str, part: str, option: str = "--model") -> Iterator[None]:
    """Loading fails in many ways; each becomes one line that names the model and what of it."""
    try:
        yield
    except NdcheckError:
        raise
    except BaseException as error:
        # A panic of the tokenizers' Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
            raise BackendError(f"cannot load {source}: {first_line(error)}") from error
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        if re.search("attn_implementation=|has been toggled on", first_line(error)):
            raise UsageError(f"--attn: {first_line(error)}") from error
        raise UsageError(
            f"{option} {source}: {part}: {kind}{first_line(error)}"
            f"{f' {ACCEPTED}' if isinstance(error, OSError) else ''}"
        ) from error
