"""In-process sampling with transformers, under exactly the batch that a trial asks for.

`generate()` is not used: it may change the batch's shape as rows finish. Here every row decodes
to the end of the trial, a finished row's further tokens are dropped, and the batch never changes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ndcheck.errors import BackendError, TrialError, UsageError, doing, first_line
from ndcheck.plan.arrivals import parse_arrivals
from ndcheck.plan.grid import CACHE_STATES
from ndcheck.plan.queue import Request, queue_requests
from ndcheck.probe import Prompt
from ndcheck.records import Arm, Decoding, Load, Probe, RunSpec, Sample, Trial, Witness
from ndcheck.samplers.base import Rendered
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.checkpoint.generation import stop_ids
from ndcheck.samplers.local.checkpoint.quantised import has_fp8_layers, stock_notes
from ndcheck.samplers.local.checkpoint.sources import find_source
from ndcheck.samplers.local.decoding.draft import DraftSource
from ndcheck.samplers.local.decoding.selection import read_step
from ndcheck.samplers.local.decoding.steps import Completions, DecodeSteps, Stream, warn_uncaptured
from ndcheck.samplers.local.device import choose_device, fused_layers, own_device, product_tables
from ndcheck.samplers.local.faithful import Examination, examine
from ndcheck.samplers.local.following import Ranks
from ndcheck.samplers.local.loading import digest_weights, load_config, load_model
from ndcheck.samplers.local.memory import is_out_of_memory, largest_batch_size
from ndcheck.samplers.local.prompts import load_prompts
from ndcheck.samplers.local.refusals import find_refusals, longest_rows, paths_of

MOST_CAPTURED = 8
"""Batches whose captured step and KV cache are kept for trials of the same shape."""


class TransformersSampler:
    """Samples from a hub id, a local directory, or the embedded model.

    Raises UsageError for a model or option that cannot be used, BackendError where loading fails.
    """

    interleaves_arms = True

    def __init__(self, spec: RunSpec, *, load_weights: bool = True) -> None:
        self.at_close = ExitStack()
        self._arms, self._device = spec.arms, choose_device(spec.device)
        self._arrivals = spec.arrivals if spec.batching == "continuous" else None
        self._source = source = find_source(spec)
        self._tp_groups, self._cache_dtype = spec.tp_groups, spec.kv_cache_dtype
        self._probes, self._decoding = {p.probe_id: p for p in spec.probes}, spec.decoding
        self._ranks: Ranks | None = None
        if load_weights and spec.tensor_parallel > 1:
            self._device = own_device(self._device)
            self._ranks = Ranks(self._device)
        config = load_config(source.model, spec)
        self._text_config = config.get_text_config(decoder=True)
        self._prompts = load_prompts(source.tokenizer, spec, self._text_config)
        drafts = None if spec.draft is None else DraftSource(spec, source, config)
        self._draft_context = drafts and drafts.context
        lengths = (self.count_tokens(probe.content) for probe in spec.probes)
        beside = [(n, self._longest_neighbour(n, spec.decoding)) for n in lengths]
        self._model: Any = None
        self._draft: Any = None
        self._findings: Examination | None = None
        self._captured: dict[tuple[Arm, Decoding, int, int], DecodeSteps] = {}
        self._feeds, self._widths, self._scores = spec.feeds, spec.widths, "scoring" in spec.axes
        self._completions, self._uncaptured, self._begun = Completions(), set[Arm](), set[Arm]()
        if load_weights:
            with doing("loading the weights"):
                self._model = load_model(source.model, config, spec, self._device, source.adapter)
                self._stop_ids = stop_ids(self._model)
                self._digest = digest_weights(self._model)
                self._draft = drafts and drafts.load(self._model, self._device)
            if self._ranks and has_fp8_layers(self._model):
                self._uncaptured.add("stock")  # It goes through one expert after the other.
            else:
                with doing("comparing its batches with generate()"):
                    own = partial(self.arm, "invariant", fuse=False)
                    arm = own if spec.arms == ("invariant",) else None
                    paths, rows = paths_of(spec), longest_rows(beside, spec.decoding)
                    self._findings = examine(self._model, self._device, paths, arm, rows)
                    if self._arrivals is not None:
                        from ndcheck.samplers.local.serving import require_served

                        served = partial(self.arm, self._arms[0], fuse=False)
                        require_served(self._model, self._device, rows, served)
            if "invariant" in spec.arms and self._device.type == "cuda":
                from ndcheck_kernels.models.decoder import join_weights

                join_weights(self._model)
        refusals = find_refusals(spec, self._text_config, self._findings, beside)
        self.refused_axes = tuple(refusals.axes.items())
        self.cache_states = tuple(state for state in CACHE_STATES if state not in refusals.states)
        self.notes = self._prompts.warnings(spec.probes)
        # Where both are left out the axis is, which says so itself.
        self.notes += tuple(refusals.states.values()) if self.cache_states else ()
        self.notes += stock_notes(self._model, self._arms) if load_weights else ()
        if (tables := product_tables(self._arms, self._device)) is not None:
            self.notes += (f"products of the invariant arm: {tables}",)

    @property
    def context(self) -> int:
        limits = (getattr(self._text_config, "max_position_embeddings", None), self._draft_context)
        return min((int(limit) for limit in limits if limit), default=1 << 20)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    def open_batch(self, rows: list[list[int]], max_tokens: int) -> ExactBatch:
        """A batch of these prompts, before its prefill."""
        width = max(map(len, rows)) + max_tokens
        batch = ExactBatch(self._model, self._device, len(rows), width, self._cache_dtype)
        batch.reset(rows)
        return batch

    def decode(self, token_id: int) -> str:
        """The text of one token."""
        return self._prompts.decode(token_id)

    def count_tokens(self, prompt: Prompt) -> int:
        return len(self._prompts.encode(prompt))

    def encode(self, prompt: Prompt) -> list[int]:
        return self._prompts.encode(prompt)

    def render(self, prompt: Prompt) -> Rendered | None:
        return self._prompts.render(prompt)

    def rows(self, load: Load, probe: Probe) -> list[list[int]]:
        """Token ids of every row of the batch: probes at their slots, fillers elsewhere."""
        return self._prompts.rows(load, probe)

    def describe(self) -> dict[str, Any]:
        parameter = next(self._model.parameters())
        tables = product_tables(self._arms, self._device)
        return {
            **self._source.describe(),
            "class": type(self._model).__name__,
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "attention": self._model.config._attn_implementation,
            "vocabulary": self._text_config.vocab_size,
            "digest": self._digest,
            "decode_check": self._findings and self._findings.describe(),
            **({} if tables is None else {"product_tables": tables}),
            **({} if self._ranks is None else {"ranks": self._ranks.size}),
            **({} if self._draft is None else {"draft": digest_weights(self._draft)}),
        }

    def changes(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        self.at_close.close()
        if self._ranks is not None:
            # NCCL lets no group end before the graphs that use it.
            self._captured.clear()
            gc.collect()
            self._ranks.leave()

    def follow(self) -> None:
        """On a rank other than 0: compute its trials, until it has no more."""
        if self._ranks is None:
            raise RuntimeError("there is no other rank to follow")
        while (trial := self._ranks.next_trial()) is not None:
            with suppress(TrialError):  # All ranks come to the same logits: rank 0 keeps the error.
                self.sample(trial, self._probes[trial.probe_id], self._decoding)

    def _longest_neighbour(self, n_prompt_tokens: int, decoding: Decoding) -> int:
        """The longest row that the plan may put beside a probe, in tokens."""
        return max(1, min(2 * n_prompt_tokens + 16, self.context - decoding.max_tokens))

    @torch.inference_mode()
    def largest_batch_size(self, n_prompt_tokens: int, decoding: Decoding) -> int:
        n_prompt = self._longest_neighbour(n_prompt_tokens, decoding)
        # A paged cache is read into a copy.
        width = (n_prompt + decoding.max_tokens) * (1 if self._arrivals is None else 2)

        def try_rows(n_rows: int) -> None:
            for arm in self._arms:
                with self.arm(arm, fuse=self._arrivals is None):
                    batch = self.open_batch([[0] * n_prompt] * n_rows, width - n_prompt)
                    read_step(batch.compute_prompt("whole"), decoding, None)

        n_scored = decoding.max_tokens if self._scores else 1
        return largest_batch_size(self._model, self._device, n_prompt, width, try_rows, n_scored)

    @torch.inference_mode()
    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        started = time.perf_counter()
        what = doing(f"the first batch of the {trial.arm} arm: kernels are made ready")
        try:
            with nullcontext() if trial.arm in self._begun else what:
                if self._ranks is not None:
                    streams, witnesses = self._run_on_ranks(self._ranks, trial, probe, decoding)
                else:
                    streams, witnesses = self._run_in_halves(trial, probe, decoding)
        except torch.AcceleratorError as error:
            raise BackendError(f"{self._device} failed: {first_line(error)}") from error
        except RuntimeError as error:
            raise TrialError(f"{type(error).__name__}: {first_line(error)}") from error
        self._begun.add(trial.arm)
        elapsed_s = time.perf_counter() - started
        return [
            replace(
                Sample.of(trial, nth, witnesses[nth], stream.finish_reason, elapsed_s),
                token_ids=stream.token_ids,
                token_texts=self._prompts.token_texts(stream.token_ids),
                logprobs=stream.logprobs,
                margins=stream.margins,
                row_digests=stream.row_digests,
                fed=stream.fed,
                drafted=stream.drafted,
            )
            for nth, stream in enumerate(streams)
        ]

    def _run_on_ranks(
        self, ranks: Ranks, trial: Trial, probe: Probe, decoding: Decoding
    ) -> tuple[list[Stream], list[Witness]]:
        """The trial on every rank; what fails on one of them ends the run, not the trial alone."""
        ranks.announce(trial)
        try:
            done = self._decode_rows(trial, probe, decoding, trial.load.batch_size)
            ranks.agree([stream.token_ids for stream in done[0]])
        except (RuntimeError, MemoryError) as error:
            raise ranks.failure(error) from error
        return done

    def _run_in_halves(
        self, trial: Trial, probe: Probe, decoding: Decoding
    ) -> tuple[list[Stream], list[Witness]]:
        """The trial, in batches half as large each time that memory runs out.

        The witness says what ran: a batch that was halved is not the one that was asked for.
        """
        run = self._decode_rows if self._arrivals is None else self._serve
        size, failed_at, has_made_room = trial.load.batch_size, None, False
        while True:
            try:
                streams, witnesses = run(trial, probe, decoding, size)
                return streams, [replace(w, out_of_memory_at=failed_at) for w in witnesses]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # Batches of other shapes that were kept make room first, once.
                if has_made_room or not self._captured:
                    if size == 1:
                        raise TrialError(
                            f"out of memory at batch size {trial.load.batch_size}, and at 1, on "
                            f"{self._device}: use a smaller --max-tokens or a shorter prompt"
                        ) from error
                    failed_at, size = size, -(-size // 2)
                self._captured.clear()
                has_made_room = True
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _decode_rows(
        self, trial: Trial, probe: Probe, decoding: Decoding, size: int
    ) -> tuple[list[Stream], list[Witness]]:
        """Decode the trial's rows in exact batches of ``size``; those without a probe are left."""
        rows, streams, witnesses = self.rows(trial.load, probe), [], []
        for start in range(0, len(rows), size):
            slots = tuple(s - start for s in trial.load.slots if start <= s < start + size)
            if not slots:
                continue
            with self.arm(trial.arm) as fires:
                part, witness = self._decode(trial, rows[start : start + size], slots, decoding)
            streams += part
            witnesses += [replace(witness, override_fires=fires())] * len(part)
        return streams, witnesses

    def _serve(
        self, trial: Trial, probe: Probe, decoding: Decoding, size: int
    ) -> tuple[list[Stream], list[Witness]]:
        """Decode under continuous batching, with ``size`` requests in flight."""
        from ndcheck.samplers.local.continuous import serve_load

        load, prompt = trial.load, self._prompts.encode(probe.content)
        arrivals = parse_arrivals(self._arrivals or "", "step")
        queue = queue_requests(load, arrivals, len(prompt), decoding.max_tokens)
        served, n_fires = serve_load(
            self._model,
            ((request, self._prompt_of(request, prompt)) for request in queue),
            lambda: self.arm(trial.arm, fuse=False),
            trial,
            decoding,
            stop_ids=self._stop_ids,
            size=size,
            prompt=prompt,
        )
        achieved = min(max(row.batch_sizes) for row in served)
        witnesses = [
            Witness(
                achieved,
                row.prefill_calls,
                len(row.batch_sizes) - 1,
                n_fires,
                tuple(row.batch_sizes),
            )
            for row in served
        ]
        return [row.stream(self._stop_ids) for row in served], witnesses

    def _prompt_of(self, request: Request, probe: list[int]) -> list[int]:
        if request.filler_seed is None or request.n_prompt_tokens is None:
            return probe
        return self._prompts.filler(request.filler_seed, request.n_prompt_tokens)

    @contextmanager
    def arm(self, arm: Arm, *, fuse: bool = True) -> Iterator[Callable[[], int | None]]:
        """Compute with the arm's kernels; yields how many ops its overrides have computed.

        ``fuse`` False keeps the ops of decoder layers apart, to be seen one by one or to read
        another cache than a static one.
        Raises UsageError for an op the invariant arm does not cover, or if nothing fired.
        """
        if arm == "stock":
            yield lambda: None
            return
        import ndcheck_kernels as kernels

        try:
            with (
                kernels.invariant_model(self._model, self._tp_groups),
                nullcontext() if self._draft is None else kernels.invariant_model(self._draft),
                fused_layers(self._model, self._device) if fuse else nullcontext(),
                kernels.invariant_kernels() as scope,
            ):
                before = scope.fires.total()
                yield lambda: scope.fires.total() - before
                missing = scope.missing()
                if self._ranks is not None:
                    missing += scope.missing(("rank_sum",))
        except kernels.UncoveredOpError as error:
            raise UsageError(
                f"invariant arm: {first_line(error)} Without this arm: --kernels stock"
            ) from error
        if missing:
            raise UsageError(
                f"invariant arm: no {' or '.join(missing)} ran in a batch-invariant kernel, so it "
                "would have measured stock: use --kernels stock"
            )

    def _decode(
        self, trial: Trial, rows: list[list[int]], slots: tuple[int, ...], decoding: Decoding
    ) -> tuple[list[Stream], Witness]:
        steps = self._steps_for(trial.arm, rows, decoding)
        load, batch = trial.load, steps.batch
        key = (trial.arm, decoding, tuple(map(tuple, rows)), slots)
        if not load.is_fed or key not in self._completions:
            batch.reset(rows)
            logits = batch.prefill(load.decoded.cache_state, load.decoded.cut)
            prefill_calls = len(batch.row_counts)
            fault = None if load.is_fed else trial.fault
            if load.drafts:
                streams = steps.speculate(logits, self._draft, load, slots, self._stop_ids, fault)
            else:
                streams = steps.run(logits, slots, self._stop_ids, fault)
                if load.is_fed or (self._feeds and load.cache_state == "whole" and not fault):
                    self._completions.keep(key, steps.decoded(self._stop_ids))
        if load.is_fed:
            batch.reset(rows)
            decoded = self._completions[key]
            streams = steps.feed(decoded, load, slots, self._stop_ids, trial.fault, self._widths)
            prefill_calls = len(batch.row_counts) if load.scores else 1
        if steps.capture_failure is not None and trial.arm not in self._uncaptured:
            self._uncaptured.add(trial.arm)
            warn_uncaptured(trial.arm, steps.capture_failure)
        achieved = min(batch.row_counts)
        return streams, Witness(achieved, prefill_calls, len(batch.row_counts) - prefill_calls)

    def _steps_for(self, arm: Arm, rows: list[list[int]], decoding: Decoding) -> DecodeSteps:
        """The decode steps for a batch of this shape: on CUDA those captured before, if kept."""
        width = max(map(len, rows)) + decoding.max_tokens
        key = (arm, decoding, len(rows), width)
        steps = self._captured.pop(key, None)
        if steps is None:
            while len(self._captured) >= MOST_CAPTURED:
                del self._captured[next(iter(self._captured))]
            if self._ranks is not None:
                self._ranks.make_room(self._captured, len(rows) * width)
            batch = self.open_batch(rows, decoding.max_tokens)
            steps = DecodeSteps(batch, decoding, captures=arm not in self._uncaptured)
        if steps.batch.can_be_captured:
            self._captured[key] = steps  # Last in, as the most recently used.
        return steps
