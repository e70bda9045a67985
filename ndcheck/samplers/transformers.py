"""In-process sampling with transformers, under exactly the batch that a trial asks for.

`generate()` is not used: it may change the batch's shape as rows finish. Here every row decodes
to the end of the trial, a finished row's further tokens are dropped, and the batch never changes.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import transformers

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.errors import BackendError, TrialError, UsageError
from ndcheck.load import CACHE_STATES
from ndcheck.records import Arm, Decoding, Load, Probe, RunSpec, Sample, Trial, Witness
from ndcheck.samplers.batch import ExactBatch
from ndcheck.samplers.device import choose_device
from ndcheck.samplers.prompts import first_line, load_prompts, one_line_errors
from ndcheck.samplers.steps import DecodeSteps, Stream

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}

MOST_CAPTURED = 8
"""Batches whose captured step and KV cache are kept for trials of the same shape."""


class TransformersSampler:
    """Samples from a hub id, a local directory, or the embedded model.

    Raises UsageError for a model or option that cannot be used as asked, and BackendError where
    loading fails.
    """

    cache_states = CACHE_STATES
    notes = ()
    interleaves_arms = True

    def __init__(self, spec: RunSpec, *, load_weights: bool = True) -> None:
        self._name = spec.model
        source = str(MODEL_DIRECTORY) if spec.model == "builtin" else spec.model
        self._device = choose_device(spec.device)
        if spec.dtype != "auto" and spec.dtype not in DTYPES:
            raise UsageError(f"--dtype {spec.dtype}: choose from auto, {', '.join(DTYPES)}")
        options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
        transformers.utils.logging.disable_progress_bar()
        with one_line_errors(source):
            config = transformers.AutoConfig.from_pretrained(source, **options)
        self._prompts = load_prompts(source, spec)
        self._text_config = config.get_text_config(decoder=True)
        self._model: Any = None
        self._captured: dict[tuple[Arm, int, int], DecodeSteps] = {}
        if load_weights:
            self._model = load_model(source, config, spec, self._device, options)
            self._stop_ids = _stop_ids(self._model)
            if "invariant" in spec.arms and self._device.type == "cuda":
                from ndcheck_kernels.decoder import join_weights

                join_weights(self._model)

    @property
    def context(self) -> int:
        limit = getattr(self._text_config, "max_position_embeddings", None)
        return int(limit) if limit else 1 << 20

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    def open_batch(self, rows: list[list[int]], max_tokens: int) -> ExactBatch:
        """A batch of these prompts, before its prefill."""
        batch = ExactBatch(self._model, self._device, len(rows), max(map(len, rows)) + max_tokens)
        batch.reset(rows)
        return batch

    def decode(self, token_id: int) -> str:
        """The text of one token."""
        return self._prompts.decode(token_id)

    def count_tokens(self, prompt: str) -> int:
        return len(self._prompts.encode(prompt))

    def rows(self, load: Load, probe: Probe) -> list[list[int]]:
        """Token ids of every row of the batch: probes at their slots, fillers elsewhere."""
        return self._prompts.rows(load, probe)

    def describe(self) -> dict[str, Any]:
        parameter = next(self._model.parameters())
        return {
            "name": self._name,
            "class": type(self._model).__name__,
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "attention": self._model.config._attn_implementation,
            "vocabulary": self._text_config.vocab_size,
            "digest": digest_weights(self._model),
        }

    def changes(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        pass

    @torch.inference_mode()
    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        started = time.perf_counter()
        rows = self.rows(trial.load, probe)
        try:
            streams, witness = self._try_decode(trial, rows, decoding)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(trial.load) from error
        except torch.AcceleratorError as error:
            raise BackendError(f"{self._device} failed: {first_line(error)}") from error
        except RuntimeError as error:
            if re.search(r"out of memory|allocate memory", str(error)):
                raise self._out_of_memory(trial.load) from error
            raise TrialError(f"{type(error).__name__}: {first_line(error)}") from error
        elapsed_s = time.perf_counter() - started
        return [
            Sample.of(
                trial,
                nth,
                witness,
                stream.finish_reason,
                elapsed_s,
                token_ids=tuple(stream.token_ids),
                token_texts=self._prompts.token_texts(tuple(stream.token_ids)),
                logprobs=tuple(stream.logprobs),
                margins=tuple(stream.margins),
                row_digests=tuple(stream.row_digests),
            )
            for nth, stream in enumerate(streams)
        ]

    def _try_decode(
        self, trial: Trial, rows: list[list[int]], decoding: Decoding
    ) -> tuple[list[Stream], Witness]:
        """Decode with the arm's kernels; what was kept of other shapes makes room if it must."""
        while True:
            try:
                with self.arm(trial.arm) as fires:
                    streams, witness = self._decode(trial, rows, decoding)
                return streams, replace(witness, override_fires=fires())
            except torch.OutOfMemoryError:
                if not self._captured:
                    raise
                self._captured.clear()
            torch.cuda.empty_cache()

    @contextmanager
    def arm(self, arm: Arm, *, fuse: bool = True) -> Iterator[Callable[[], int | None]]:
        """Compute with the arm's kernels; yields how many ops its overrides have computed.

        ``fuse`` False keeps the ops of fused decoder layers apart, to be seen one by one.
        Raises BackendError for an op the invariant arm does not cover, or if nothing fired.
        """
        if arm == "stock":
            yield lambda: None
            return
        import ndcheck_kernels

        try:
            with (
                ndcheck_kernels.invariant_model(self._model),
                self._fused_layers(fuse),
                ndcheck_kernels.invariant_kernels() as scope,
            ):
                before = scope.fires.total()
                yield lambda: scope.fires.total() - before
                missing = scope.missing()
        except ndcheck_kernels.UncoveredOpError as error:
            raise BackendError(
                f"invariant arm: {first_line(error)} Without this arm: --kernels stock"
            ) from error
        if missing:
            raise BackendError(
                f"invariant arm: no {' or '.join(missing)} ran in a batch-invariant kernel, so it "
                "would have measured stock: use --kernels stock"
            )

    def _fused_layers(self, fuse: bool) -> AbstractContextManager[object]:
        if not fuse or self._device.type != "cuda":
            return nullcontext()
        from ndcheck_kernels.decoder import fused_layers

        return fused_layers(self._model)

    def _decode(
        self, trial: Trial, rows: list[list[int]], decoding: Decoding
    ) -> tuple[list[Stream], Witness]:
        steps = self._steps_for(trial.arm, rows, decoding)
        batch = steps.batch
        batch.reset(rows)
        logits = batch.prefill(trial.load.cache_state)
        prefill_calls = len(batch.row_counts)
        streams = steps.run(logits, trial.load.slots, self._stop_ids, trial.fault)
        achieved = min(batch.row_counts)
        return streams, Witness(achieved, prefill_calls, len(batch.row_counts) - prefill_calls)

    def _steps_for(self, arm: Arm, rows: list[list[int]], decoding: Decoding) -> DecodeSteps:
        """The decode steps for a batch of this shape: on CUDA those captured before, if kept."""
        width = max(map(len, rows)) + decoding.max_tokens
        key = (arm, len(rows), width)
        steps = self._captured.pop(key, None)
        if steps is None:
            while len(self._captured) >= MOST_CAPTURED:
                del self._captured[next(iter(self._captured))]
            batch = ExactBatch(self._model, self._device, len(rows), width)
            steps = DecodeSteps(batch, decoding)
        if steps.batch.can_be_captured:
            self._captured[key] = steps  # Last in, as the most recently used.
        return steps

    def _out_of_memory(self, load: Load) -> TrialError:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return TrialError(
            f"out of memory at batch size {load.batch_size} on {self._device}: "
            "use smaller --loads or --max-tokens"
        )


def digest_weights(model: Any) -> str:
    """16 hexadecimal digits over every parameter's name, shape, dtype and 4096 of its elements.

    Evenly spaced elements keep this fast at any size; a fine-tune changes some of them.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_model(
    source: str, config: Any, spec: RunSpec, device: torch.device, options: dict[str, Any]
) -> Any:
    if spec.attention != "auto":
        options = {**options, "attn_implementation": spec.attention}
    if spec.random_weights is not None:
        dtype = DTYPES.get(spec.dtype, config.dtype or torch.bfloat16)
        torch.manual_seed(spec.random_weights)
        with one_line_errors(source), device:
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        return made.eval()
    with one_line_errors(source):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES.get(spec.dtype, "auto"),
            use_safetensors=True,
            **options,
        )
    return model.to(device).eval()


def _stop_ids(model: Any) -> set[int]:
    stop = model.generation_config.eos_token_id
    return set(stop if isinstance(stop, list) else [] if stop is None else [stop])
