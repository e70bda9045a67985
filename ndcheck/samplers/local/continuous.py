"""Sampling under transformers' own continuous batching: requests come and go between two steps.

Its manager schedules and owns the paged cache; here its loop is driven step by step instead of in
its thread, so that arrivals keep to the clock of steps and errors come out where they happen. What
a step computed is read off the logits as in exact batches, and the manager is left to take the
token that was chosen.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from ndcheck.errors import NdcheckError, TrialError, UsageError, first_line
from ndcheck.plan.grid import N_PREFILL_CHUNKS, SMALLEST_PAGE_TOKENS
from ndcheck.plan.queue import Request
from ndcheck.records import Decoding, Fault, Trial
from ndcheck.samplers.local.decoding.selection import (
    Reading,
    gumbel_noise,
    plant_in_logits,
    read_step,
)
from ndcheck.samplers.local.decoding.steps import Stream

PAGE_TOKENS = 32
PREFILL_TOKENS = 256
"""Prompt tokens that a step takes in beside the requests that decode, or the longest prompt."""


@dataclass(slots=True)
class Served:
    """What a request of the load got, and who was there: per step, and per token generated."""

    request: Request
    prompt: list[int]
    n_prefilled: int = 0
    prefill_calls: int = 0
    batch_sizes: list[int] = field(default_factory=list)
    readings: list[tuple[int, float, float, int]] = field(default_factory=list)

    def stream(self, stop_ids: set[int]) -> Stream:
        """The completion. Raises TrialError where the logits held NaN."""
        token_ids, margins, logprobs, digests = zip(*self.readings, strict=True)
        if any(map(math.isnan, margins)):
            position = next(i for i, margin in enumerate(margins) if math.isnan(margin))
            raise TrialError(f"the probe's logits hold NaN at token {position + 1}")
        return Stream(
            token_ids,
            logprobs,
            margins,
            tuple(f"{digest % 2**64:016x}" for digest in digests),
            "stop" if token_ids[-1] in stop_ids else "length",
        )


class ContinuousBatch:
    """A manager with room for ``batch_size`` requests at a time, and what it served.

    ``longest`` is the longest prompt in tokens, ``chunk`` how much of a prompt a step takes in
    (None: all of it), ``page_tokens`` the page of a cache that shares equal prefixes (None: nothing
    is shared).
    """

    def __init__(
        self,
        model: Any,
        decoding: Decoding,
        stop_ids: set[int],
        batch_size: int,
        longest: int,
        chunk: int | None = None,
        page_tokens: int | None = None,
    ) -> None:
        self._model = model
        self._decoding = decoding
        self._stop_ids = stop_ids
        self._batch_size = batch_size
        self._prefill_tokens = max(longest, PREFILL_TOKENS)
        self._served: dict[str, Served] = {}
        self._in_flight: set[str] = set()
        self._fault: Fault | None = None
        self._noise: dict[int, Tensor] = {}
        page = page_tokens or PAGE_TOKENS
        pages = math.ceil((longest + decoding.max_tokens) / page) + 1
        config = _config(
            page_tokens=page,
            # One more than fit in flight: the prompt whose pages are shared beforehand.
            num_blocks=(batch_size + 1) * pages,
            max_batch_tokens=batch_size + self._prefill_tokens,
            max_requests_per_batch=batch_size,
            max_blocks_per_request=0,
            allow_block_sharing=page_tokens is not None,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1), config
        )
        self._processor = self._manager._create_batch_processor()
        # All of it is meant to be filled: nothing is kept free for who may come.
        self._processor.scheduler.safety_margin = 0.0
        if chunk is not None:
            _split_prompts(self._processor.scheduler, chunk)

    def serve(
        self, requests: Iterable[tuple[Request, list[int]]], n_rows: int, fault: Fault | None
    ) -> list[Served]:
        """Serve until the ``n_rows`` probes are done; what they got, by slot."""
        self._served.clear()
        self._fault = fault
        queue = deque[tuple[Request, list[int]]]()
        arriving = iter(requests)
        now, rows = 0.0, list[str]()
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        hook = self._model.register_forward_hook(self._read_logits, with_kwargs=True)
        try:
            while len(rows) < n_rows or any(name in self._in_flight for name in rows):
                rows += self._admit(queue, arriving, now)
                if not self._in_flight:
                    now = queue[0][0].arrives_at  # Nobody is there: skip the time till then.
                    continue
                self._step()
                now += 1
        finally:
            hook.remove()
        return sorted(
            (self._served[name] for name in rows), key=lambda served: served.request.slot or 0
        )

    def _admit(
        self,
        queue: deque[tuple[Request, list[int]]],
        arriving: Iterator[tuple[Request, list[int]]],
        now: float,
    ) -> list[str]:
        """Hand the manager who has come and has a place; the names of the probes among them.

        Whole prompts have to fit in the step's share of tokens, or the manager would split them.
        """
        rows, room = [], self._prefill_tokens
        while len(self._in_flight) < self._batch_size:
            if not queue:
                queue.extend(islice(arriving, 1))
            if not queue or queue[0][0].arrives_at > now:
                break
            request, prompt = queue[0]
            room -= len(prompt)
            if room < 0:
                break
            queue.popleft()
            name = f"{len(self._served)}"
            self._served[name] = Served(request, prompt)
            self._in_flight.add(name)
            self._manager.add_request(
                prompt,
                request_id=name,
                max_new_tokens=request.max_tokens,
                # Fillers go when the plan says so; only probes stop by themselves.
                eos_token_id=sorted(self._stop_ids) if request.is_probe else -1,
            )
            if request.is_probe:
                rows.append(name)
        return rows

    def _step(self) -> None:
        scheduler, processor = self._processor.scheduler, self._processor
        # The manager computes on a stream of its own, but writes what goes in on the current one.
        with torch.cuda.stream(processor.inputs_and_outputs.compute_stream):
            if not processor.prepare_next_batch():
                raise TrialError("continuous batching scheduled nothing: its cache is too small")
            try:
                processor._generation_step(self._model)
            except (RuntimeError, MemoryError, NdcheckError):
                raise
            except Exception as error:  # Whatever a model's own code raises, as in exact batches.
                what = f"{type(error).__name__}: {first_line(error)}"
                raise TrialError(f"the model raises {what}") from error
            processor.update_batch()
        there = scheduler.active_requests.keys() | scheduler.waiting_requests.keys()
        self._in_flight &= there

    def _read_logits(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook: keep what the step gave, and let the manager find the tokens chosen."""
        scheduled = self._processor.inputs_and_outputs.requests_in_batch
        ends = kwargs["cu_seq_lens_q"].tolist()
        chosen: list[tuple[int, Served]] = []
        for future, begin, end in zip(scheduled, ends, ends[1:], strict=False):
            served = self._served[future.state.request_id]
            if not served.readings:
                served.n_prefilled += end - begin
                served.prefill_calls += 1
            if future.has_new_token:
                # Some versions compute the logits of these tokens only, in this order.
                row = len(chosen) if "logits_to_keep" in kwargs else end - 1
                chosen.append((row, served))
                served.batch_sizes.append(len(scheduled))
        if not chosen:
            return output
        rows = torch.tensor([row for row, _ in chosen], device=output.logits.device)
        logits = output.logits[0, rows]
        noise = self._draw(chosen, logits)
        for i, (_, served) in enumerate(chosen):
            if self._fault is not None and served.request.is_probe:
                row = slice(i, i + 1)
                logits[row] = plant_in_logits(
                    logits[row],
                    len(served.readings),
                    self._fault,
                    self._decoding,
                    None if noise is None else noise[row],
                )
        reading = read_step(logits, self._decoding, noise)
        for (_, served), values in zip(chosen, zip(*_lists(reading), strict=True), strict=True):
            served.readings.append(values)
        output.logits = torch.zeros_like(output.logits)
        output.logits[0, rows, reading.token_ids] = 1
        return output

    def _draw(self, chosen: Sequence[tuple[int, Served]], logits: Tensor) -> Tensor | None:
        """Gumbel noise [B, V] of every row's own position; None where nothing is drawn."""
        if self._decoding.temperature == 0:
            return None
        positions = [len(served.readings) for _, served in chosen]
        for position in positions:
            if position not in self._noise:
                self._noise[position] = gumbel_noise(
                    self._decoding.seed, position, logits.shape[-1]
                )
        return torch.stack([self._noise[position] for position in positions]).to(logits.device)


def _split_prompts(scheduler: Any, chunk: int) -> None:
    """Let no step take in more than ``chunk`` tokens of a prompt; the rest has to wait."""
    schedule = scheduler._schedule_request

    def schedule_chunk(state: Any, tokens: Any, budget: int, *rest: Any) -> None:
        schedule(state, tokens, min(budget, chunk), *rest)

    scheduler._schedule_request = schedule_chunk


def _lists(reading: Reading) -> list[list[Any]]:
    return [values.tolist() for values in reading]


def _config(page_tokens: int, **options: Any) -> ContinuousBatchingConfig:
    """What this version of transformers knows of these options."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page = "page_size" if "page_size" in known else "block_size"
    accepted = {name: value for name, value in options.items() if name in known}
    return ContinuousBatchingConfig(**{page: page_tokens}, **accepted)


@contextmanager
def _managed(model: Any) -> Iterator[None]:
    """What the manager changes of the model's attention is put back at the end."""
    stock = model.config._attn_implementation
    log = logging.getLogger("ContinuousBatchingLogger")
    level = log.level
    log.setLevel(logging.CRITICAL)  # What matters of it comes as an exception.
    gc.freeze()  # Its end collects garbage: that is not to search all of torch for every trial.
    try:
        yield
    finally:
        gc.unfreeze()
        log.setLevel(level)
        model.set_attn_implementation(stock)


def _keep_attention(model: Any) -> None:
    """Before transformers 5.18 only this name keeps the manager from choosing one itself."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    stock = model.config._attn_implementation
    if "auto_switch_to_flash" not in known and "|" not in stock:
        model.set_attn_implementation(f"paged|{stock}")


Kernels = Callable[[], AbstractContextManager[Callable[[], int | None]]]


def serve_load(
    model: Any,
    requests: Iterable[tuple[Request, list[int]]],
    kernels: Kernels,
    trial: Trial,
    decoding: Decoding,
    *,
    stop_ids: set[int],
    size: int,
    prompt: list[int],
) -> tuple[list[Served], int | None]:
    """Serve a trial's requests; its rows by slot, and how many ops the kernels computed.

    ``size`` requests are in flight; ``prompt`` is the probe's, in tokens. Raises UsageError for an
    attention implementation that has no paged form.
    """
    load = trial.load
    longest = max(len(prompt), *load.filler_lengths, 1)
    chunk = -(-len(prompt) // N_PREFILL_CHUNKS) if load.cache_state == "chunked" else None
    page = _shared_page(len(prompt)) if load.cache_state == "prefix" else None
    if not model._can_set_attn_implementation():
        # The manager would not notice that such a model never reads its cache.
        raise UsageError(
            f"--batching continuous: the attention of {type(model).__name__} has no paged form"
        )
    with _managed(model):
        try:
            _keep_attention(model)
            batch = ContinuousBatch(model, decoding, stop_ids, size, longest, chunk, page)
        except ValueError as error:
            raise UsageError(f"--batching continuous: {str(error).splitlines()[0]}") from error
        with kernels() as fires:
            if page is not None:
                # Alone and beforehand, so that its pages are there to be shared; a request of one
                # token is gone before they are.
                first = Request(0, None, None, 2)
                batch.serve([(first, prompt)], 1, None)
            rows = batch.serve(requests, len(load.slots), trial.fault)
            n_fires = fires()
        del batch
    if page is not None and any(row.n_prefilled == len(prompt) for row in rows):
        raise TrialError(
            "cache state prefix: transformers shared no page of the prompt (it never does with "
            "sliding windows): leave cache out of --axes"
        )
    return rows, n_fires


def _shared_page(n_tokens: int) -> int:
    """The largest page that a prompt of so many tokens fills, with a token to spare."""
    page = PAGE_TOKENS
    while page > max(SMALLEST_PAGE_TOKENS, n_tokens - 1):
        page //= 2
    return page
