"""vLLM's offline engine as a sampler: a trial is one batch, the engine's scheduler its witness."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import struct
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import transformers

from ndcheck.errors import BackendError, UsageError
from ndcheck.plan.faults import plant_in_stream
from ndcheck.plan.grid import CACHE_STATES, N_PREFILL_CHUNKS
from ndcheck.probe import Prompt
from ndcheck.records import (
    Arm,
    CacheState,
    Decoding,
    Engine,
    Load,
    Probe,
    RunSpec,
    Sample,
    Trial,
    Witness,
)
from ndcheck.samplers.base import NOT_FED, Rendered
from ndcheck.samplers.local.checkpoint.sources import find_source
from ndcheck.samplers.local.loading import load_config
from ndcheck.samplers.local.prompts import load_prompts
from ndcheck.samplers.options import DTYPES
from ndcheck.samplers.vllm.backend import NO_AUTO_LOADS
from ndcheck.samplers.vllm.checkpoint import (
    digest_checkpoint,
    find_checkpoint,
    random_checkpoint,
)
from ndcheck.samplers.vllm.passes import smallest_batch
from ndcheck.samplers.vllm.process import Worker

SHARED_MEMORY = 0.9
"""Share of the GPU's memory that the engines of all arms may take together."""
PYTHON = {"True": True, "False": False, "None": None}
MOST_VISITORS, VISIT_PASSES, FEW_TOKENS = 8, 3, 16
"""In a trial; from one to the next, at least; and the length up to which every other one is."""


class EngineSampler:
    """Runs each arm in a vLLM process of its own, all at once where the memory holds them.

    Raises UsageError for a model or option that cannot be used as asked, BackendError where an
    engine fails; both end its processes, and so does the end of this one.
    """

    refused_axes = NOT_FED

    def __init__(self, spec: RunSpec, engine: Engine, *, load_weights: bool = True) -> None:
        self._spec = spec
        self._engine = engine
        self._source = find_source(spec).model
        if spec.dtype not in ("auto", *DTYPES):
            raise UsageError(f"--dtype {spec.dtype}: choose from auto, {', '.join(DTYPES)}")
        if load_weights and importlib.util.find_spec("vllm") is None:
            raise UsageError("--engine vllm needs vLLM: pip install 'ndcheck[vllm]'")
        config = load_config(self._source, spec)
        text_config = config.get_text_config(decoder=True)
        self._context = int(getattr(text_config, "max_position_embeddings", None) or 1 << 20)
        self._prompts = load_prompts(self._source, spec, text_config)
        self._workers: dict[Arm, Worker] = {}
        self._invariant_by: str | None = None
        self._arms_apart = len(spec.arms) > 1
        self.close = weakref.finalize(self, _close, self._workers)
        if load_weights:
            self._stop_ids = _stop_ids(self._source, text_config)
            self._checkpoint = self._source
            if spec.random_weights is not None:
                self._checkpoint = str(random_checkpoint(self._source, config, spec))
            try:
                self._start()
            except BaseException:
                self.close()
                raise

    @property
    def context(self) -> int:
        return self._context

    @property
    def cache_states(self) -> tuple[CacheState, ...]:
        """A prompt that fits one block of the prefix cache leaves no prefix in it."""
        return CACHE_STATES if self._can_share_prefixes() else ("chunked",)

    @property
    def interleaves_arms(self) -> bool:
        return not self._arms_apart

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [*self._prompts.warnings(self._spec.probes)]
        if len(self._spec.arms) > 1:
            notes.append(f"the arms run {self._how_arms_run}")
        if self._invariant_by is not None:
            notes.append(f"the invariant arm is computed by {self._invariant_by}")
        if "cache" in self._spec.axes and not self._can_share_prefixes():
            notes.append(
                "no prompt is taken from the prefix cache, which holds blocks of "
                f"{self._ready['block_size']} tokens: give longer prompts for that"
            )
        largest = max(self._spec.batch_sizes)
        if "neighbours" in self._spec.axes and largest >= self._most_requests:
            notes.append(f"no request comes and goes beside a batch of {largest}: max_num_seqs")
        return tuple(notes)

    @property
    def _how_arms_run(self) -> str:
        return (
            "one after the other: memory does not hold two engines"
            if self._arms_apart
            else "interleaved, each in an engine of its own"
        )

    def count_tokens(self, prompt: Prompt) -> int:
        return len(self._prompts.encode(prompt))

    def encode(self, prompt: Prompt) -> list[int]:
        return self._prompts.encode(prompt)

    def render(self, prompt: Prompt) -> Rendered | None:
        return self._prompts.render(prompt)

    def describe(self) -> dict[str, Any]:
        ready = self._ready
        directory = find_checkpoint(self._checkpoint)
        return {
            "name": self._spec.model,
            "engine": f"vllm {ready['version']}",
            **{name: ready[name] for name in ("dtype", "device", "attention", "vocabulary")},
            **{name: ready[name] for name in ("graphs", "block_size", "kv_tokens")},
            "tensor_parallel": self._engine.tensor_parallel,
            "pipeline_parallel": self._engine.pipeline_parallel,
            "engine_arguments": " ".join(self._engine.arguments) or None,
            "arms": None if len(self._spec.arms) == 1 else self._how_arms_run,
            "invariant_by": self._invariant_by,
            "digest": None if directory is None else digest_checkpoint(directory),
        }

    def largest_batch_size(self, n_prompt_tokens: int, decoding: Decoding) -> int:
        raise UsageError(NO_AUTO_LOADS)

    def changes(self) -> tuple[str, ...]:
        """Nothing: a worker that went away ends the run."""
        return ()

    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        started = time.perf_counter()
        worker = self._worker(trial.arm)
        load = trial.load
        probe_ids = self._prompts.encode(probe.content)
        answer = worker.ask(
            {
                "rows": self._prompts.rows(load, probe),
                "slots": load.slots,
                "max_tokens": decoding.max_tokens,
                "temperature": decoding.temperature,
                "seed": decoding.seed,
                "chunk": _chunk(probe_ids) if load.cache_state == "chunked" else None,
                "prefix": self._prefix(probe_ids) if load.cache_state == "prefix" else None,
                "visitors": self._visitors(load, len(probe_ids), decoding.max_tokens),
            }
        )
        elapsed_s = time.perf_counter() - started
        shape = tuple(tuple(each) for each in answer["shape"])
        witness = Witness(
            smallest_batch(answer["shape"]),
            answer["prefill_calls"],
            answer["decode_calls"],
            passes=shape,
        )
        return [
            self._make_sample(trial, nth, row, witness, elapsed_s)
            for nth, row in enumerate(answer["answers"])
        ]

    def score(self, arm: Arm, token_ids: list[int], n_prompt_tokens: int) -> dict[str, Any]:
        """``logprobs`` and ``ranks`` of the tokens after the prompt, from one prompt of all."""
        return self._worker(arm).ask({"ids": token_ids, "n_prompt": n_prompt_tokens})

    def _make_sample(
        self, trial: Trial, nth: int, row: dict[str, Any], witness: Witness, elapsed_s: float
    ) -> Sample:
        token_ids = tuple(row["token_ids"])
        stops = [t for t, token_id in enumerate(token_ids) if token_id in self._stop_ids]
        end = stops[0] + 1 if stops else len(token_ids)
        token_ids = token_ids[:end]
        logprobs = struct.unpack(f">{len(row['token_ids'])}f", bytes.fromhex(row["logprob_bits"]))
        token_ids, logprobs = plant_in_stream(token_ids, logprobs[:end], trial.fault)
        return replace(
            Sample.of(trial, nth, witness, "stop" if stops else "length", elapsed_s),
            token_ids=token_ids,
            token_texts=self._prompts.token_texts(token_ids),
            logprobs=logprobs,
            margins=tuple(row["margins"][:end]),
        )

    def _visitors(
        self, load: Load, n_probe_tokens: int, max_tokens: int
    ) -> list[tuple[int, list[int]]]:
        """Requests that come and go beside neighbours of other lengths: when, and their prompts.

        A server computes prompts in the pass of others' tokens, by other kernels at times.
        """
        is_alike = {*load.filler_lengths} <= {n_probe_tokens}
        if is_alike or load.cache_state != "whole" or load.batch_size >= self._most_requests:
            return []
        rng = random.Random(load.filler_seed)
        gap = max(VISIT_PASSES, -(-max_tokens // MOST_VISITORS))
        seeds = itertools.count(load.filler_seed + load.batch_size)
        longest = max(load.filler_lengths)
        limits = itertools.cycle((longest, min(longest, FEW_TOKENS)))
        return [
            (at, self._prompts.filler(next(seeds), rng.randint(2, max(2, next(limits)))))
            for at in range(1, max_tokens - VISIT_PASSES, gap)
        ]

    @property
    def _most_requests(self) -> int:
        """That the engine runs at once."""
        asked = parse_arguments(self._engine.arguments).get("max_num_seqs")
        return asked if isinstance(asked, int) else max(256, max(self._spec.batch_sizes) + 1)

    def _prefix(self, probe_ids: list[int]) -> list[int]:
        """About half of the prompt, in whole blocks of the engine's prefix cache."""
        block_size: int = self._ready["block_size"]
        return probe_ids[: max(block_size, len(probe_ids) // 2 // block_size * block_size)]

    @property
    def _ready(self) -> dict[str, Any]:
        return next(iter(self._workers.values())).ready

    def _start(self) -> None:
        """Start every arm's engine, or the first alone where they do not fit side by side."""
        arms = self._spec.arms
        share = self._arguments().get("gpu_memory_utilization") or 0
        # What is no number the engine refuses, by name.
        if len(arms) > 1 and isinstance(share, int | float) and share * len(arms) <= SHARED_MEMORY:
            try:
                for arm in reversed(arms):  # The invariant one says by whom it is computed.
                    self._begin(arm, gpu_memory_utilization=SHARED_MEMORY / len(arms))
            except BackendError as error:
                if "memory" not in str(error).lower():
                    raise
            fits = self._ready["kv_tokens"] >= self._most_tokens() if self._workers else False
            self._arms_apart = len(self._workers) < len(arms) or not fits
            if self._arms_apart:
                _close(self._workers)
        if not self._workers:
            is_open = "invariant" in arms and self._invariant_by is None
            is_open = is_open and self._engine.invariant_by == "auto"
            self._worker("invariant" if is_open else arms[0])
        self._context = min(self._context, self._ready["context"])

    def _worker(self, arm: Arm) -> Worker:
        if arm not in self._workers:
            _close(self._workers)
            self._begin(arm)
        return self._workers[arm]

    def _begin(self, arm: Arm, **defaults: Any) -> None:
        worker = Worker(arm, self._arguments(**defaults), self._engine.invariant_by)
        self._workers[arm] = worker
        self._invariant_by = worker.ready.get("invariant_by") or self._invariant_by

    def _can_share_prefixes(self) -> bool:
        """Whether every prompt is longer than a block; not known before an engine has started."""
        if not self._workers:
            return True
        lengths = (self.count_tokens(probe.content) for probe in self._spec.probes)
        block_size: int = self._ready["block_size"]
        return min(lengths) > block_size

    def _longest_row(self) -> int:
        """Tokens of the longest prompt in any batch: fillers may be twice the probe's length."""
        return max(2 * self.count_tokens(probe.content) + 16 for probe in self._spec.probes)

    def _most_tokens(self) -> int:
        """Tokens that the KV cache holds at the end of the largest batch, at most."""
        row = self._longest_row() + self._spec.decoding.max_tokens
        return (max(self._spec.batch_sizes) + 1) * row

    def _arguments(self, **defaults: Any) -> dict[str, Any]:
        """The engine's arguments; what the user gives wins over what the loads need."""
        largest = max(self._spec.batch_sizes)
        return {
            **defaults,
            "max_num_seqs": self._most_requests,
            "max_num_batched_tokens": max(8192, largest * self._longest_row()),
            "enable_prefix_caching": True,
            **parse_arguments(self._engine.arguments),
            "model": self._checkpoint,
            "skip_tokenizer_init": True,
            "dtype": DTYPES.get(self._spec.dtype, "auto"),
            "trust_remote_code": self._spec.trust_remote_code,
            "tensor_parallel_size": self._engine.tensor_parallel,
            "pipeline_parallel_size": self._engine.pipeline_parallel,
        }


def parse_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as keyword arguments: a value is JSON, or a word of Python's, or else text."""
    parsed: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = PYTHON.get(value, value)  # As text `False` would be true.
    return parsed


def _chunk(probe_ids: list[int]) -> int:
    return -(-len(probe_ids) // N_PREFILL_CHUNKS)


def _close(workers: dict[Arm, Worker]) -> None:
    while workers:
        workers.popitem()[1].close()


def _stop_ids(source: str, config: Any) -> set[int]:
    """What ends a completion: the engine is told to go on, so that its batch stays as it is."""
    try:
        stop = transformers.GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        stop = getattr(config, "eos_token_id", None)
    return set(stop if isinstance(stop, list) else [] if stop is None else [stop])
