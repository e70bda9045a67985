"""Which op gives a probe's row other bits in a batch than alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndcheck.errors import UsageError
from ndcheck.explain.alignment import Geometry, equal_bits
from ndcheck.explain.modules import ModulePath, without_numbers
from ndcheck.explain.recording import (
    Call,
    Cause,
    Key,
    LoadedRecorder,
    OpFinding,
    Place,
    SoloOp,
    SoloRecorder,
    weight_storages,
)
from ndcheck.records import Arm, Decoding, Load, Probe
from ndcheck.samplers.batch import ExactBatch
from ndcheck.samplers.selection import choose_tokens, digest_row, gumbel_noise
from ndcheck.samplers.transformers import TransformersSampler


@dataclass(frozen=True, slots=True)
class LoadTrace:
    """One forward pass under a load, op by op, against the same pass of the probe alone.

    ``step`` 0 is the prefill, step t the pass whose logits give generated token t.
    ``tracing_changed_bits`` is the control: the same pass untraced must give the same logits.
    ``is_padded``: longer rows beside it put padding before the probe's first token.
    """

    load: Load
    slot: int
    step: int
    findings: tuple[OpFinding, ...]
    logits_differ: bool
    tracing_changed_bits: bool
    is_padded: bool
    logits_digest: str
    calls: dict[Place, Call]

    @property
    def introducers(self) -> list[OpFinding]:
        return [finding for finding in self.findings if finding.status == "introduces"]

    @property
    def first_difference(self) -> OpFinding | None:
        """The first op, in order of execution, whose output differs from the pass alone."""
        differing = (f for f in self.findings if f.status in ("introduces", "inherits"))
        return next(differing, None)

    @property
    def doubt(self) -> str | None:
        """Why this trace proves nothing, if it does not."""
        compared = [f for f in self.findings if f.status != "not compared"]
        if not compared:
            return "no op could be compared"
        if self.tracing_changed_bits:
            return "tracing itself changed the logits"
        unfaithful = [f for f in compared if not f.is_faithful]
        if unfaithful:
            return (
                f"{unfaithful[0].op} in {unfaithful[0].module or 'the model'} gave other bits when "
                f"replayed with the same inputs ({len(unfaithful)} of {len(compared)} ops)"
            )
        if self.logits_differ and not self.introducers:
            return None if self.step else "the logits differ, but no op was seen to introduce it"
        return None


@dataclass(frozen=True, slots=True)
class OpGroup:
    """The ops of one kind in layers of one form, over all traced loads.

    ``bit_classes`` are the batch sizes (1: alone) that give the row the same bits in every layer;
    ``counts`` is how often each status was found, over layers and loads.
    """

    op: str
    module: str
    n_ops: int
    counts: dict[str, int]
    cause: Cause | None
    max_ulp: int
    bit_classes: tuple[tuple[int, ...], ...]
    shapes: tuple[str, str]
    dtype: str
    location: str

    @property
    def introduces(self) -> bool:
        return "introduces" in self.counts


class Tracer:
    """Traces one probe's pass at one step; the pass alone is recorded once.

    Raises UsageError where a load has no pass that corresponds to the one alone.
    """

    def __init__(
        self,
        sampler: TransformersSampler,
        probe: Probe,
        step: int,
        arm: Arm = "stock",
        decoding: Decoding | None = None,
        kernels: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._sampler = sampler
        self._probe = probe
        self._step = step
        self._decoding = decoding or Decoding(step + 1)
        # The static cache is as long as the run's: attention runs over all of it.
        self._max_tokens = max(self._decoding.max_tokens, step + 1)
        self._kernels = kernels or (lambda: sampler.arm(arm, fuse=False))
        self._weights = weight_storages(sampler.model)
        self._n_prompt = sampler.count_tokens(probe.prompt)
        if self._n_prompt + self._max_tokens > sampler.context:
            raise UsageError(
                f"--step {step}: with a prompt of {self._n_prompt} tokens it exceeds the model's "
                f"context of {sampler.context}"
            )
        self.token_ids: list[int] = []

    @torch.inference_mode()
    def record_alone(self) -> dict[Key, SoloOp]:
        """The pass alone: its ops, and on the way the tokens that every load is fed."""
        with self._kernels():
            batch, argument = self._advance(Load(1), None)
            with ModulePath(self._sampler.model) as path:
                recorder = SoloRecorder(path, self._weights)
                with recorder:
                    logits = self._forward(batch, argument, Load(1))
        self._logits_alone = logits[0]
        return recorder.ops

    @torch.inference_mode()
    def trace(self, load: Load, slot: int, alone: dict[Key, SoloOp]) -> LoadTrace:
        """The same pass under ``load``, compared with and replayed against the one alone."""
        if load.cache_state != "whole" and self._step == 0:
            raise UsageError(
                f"--step 0: a {load.cache_state} prefill has no pass that is comparable with the "
                "prefill alone: give --step 1 or more"
            )
        with self._kernels():
            batch, argument = self._advance(load, slot)
            with ModulePath(self._sampler.model) as path:
                recorder = LoadedRecorder(
                    path, self._weights, alone, self._geometry(load, slot), slot
                )
                with recorder:
                    traced = self._forward(batch, argument, load)
        with self._kernels():
            batch, argument = self._advance(load, slot)
            untraced = self._forward(batch, argument, load)
        return LoadTrace(
            load,
            slot,
            self._step,
            tuple(recorder.findings),
            not equal_bits(traced[slot], self._logits_alone),
            not equal_bits(traced[slot], untraced[slot]),
            max(load.filler_lengths, default=0) > self._n_prompt,
            f"{digest_row(traced[slot]) & 2**64 - 1:016x}",  # as samples are recorded
            recorder.calls,
        )

    @torch.inference_mode()
    def logits(self, load: Load, slot: int) -> list[Tensor]:
        """The probe's logits [vocabulary] at every step so far, each kept apart."""
        rows = []
        with self._kernels():
            batch = self._open(load)
            logits = batch.prefill(load.cache_state, load.cut)
            for position in range(self._step + 1):
                if position:
                    logits = batch.step(self._next_tokens(logits, position - 1, load, slot))
                rows.append(logits[slot].clone())
        return rows

    def _advance(self, load: Load, slot: int | None) -> tuple[ExactBatch, Tensor | None]:
        """A batch just before the traced pass, and the tokens [rows] that pass takes in."""
        batch = self._open(load)
        if self._step == 0:
            return batch, None
        logits = batch.prefill(load.cache_state, load.cut)
        for position in range(self._step - 1):
            logits = batch.step(self._next_tokens(logits, position, load, slot))
        return batch, self._next_tokens(logits, self._step - 1, load, slot)

    def _open(self, load: Load) -> ExactBatch:
        rows = self._sampler.rows(load, self._probe)
        return self._sampler.open_batch(rows, self._max_tokens)

    @staticmethod
    def _forward(batch: ExactBatch, token_ids: Tensor | None, load: Load) -> Tensor:
        return (
            batch.prefill(load.cache_state, load.cut)
            if token_ids is None
            else batch.step(token_ids)
        )

    def _next_tokens(self, logits: Tensor, position: int, load: Load, slot: int | None) -> Tensor:
        """Every row's own next token, but the probe's is the one it takes alone."""
        temperature, noise = self._decoding.temperature, None
        if temperature:
            noise = gumbel_noise(self._decoding.seed, position, logits.shape[-1]).to(logits.device)
        token_ids = choose_tokens(logits, temperature, noise)
        if slot is None:
            if len(self.token_ids) == position:
                self.token_ids.append(int(token_ids[0]))
        else:
            token_ids[list(load.slots)] = self.token_ids[position]
        return token_ids

    def _geometry(self, load: Load, slot: int) -> Geometry:
        n_columns = max(self._n_prompt, *load.filler_lengths, 0)
        pad = n_columns - self._n_prompt
        queries = (1, 1) if self._step else (self._n_prompt, n_columns)
        width = (self._n_prompt + self._max_tokens, n_columns + self._max_tokens)
        return Geometry(load.batch_size, pad, queries, width)


def group_findings(traces: Sequence[LoadTrace]) -> list[OpGroup]:
    """Ops of every trace, grouped by op and form of module, in order of first execution."""
    groups: dict[Place, list[tuple[int, OpFinding]]] = {}
    for trace in traces:
        for finding in trace.findings:
            key = (finding.op, without_numbers(finding.module))
            groups.setdefault(key, []).append((trace.load.batch_size, finding))
    return [_group(op, module, found) for (op, module), found in groups.items()]


def _group(op: str, module: str, found: list[tuple[int, OpFinding]]) -> OpGroup:
    counts: dict[str, int] = {}
    digests: dict[int, list[tuple[Key, str | None]]] = {}
    for batch_size, finding in found:
        counts[finding.status] = counts.get(finding.status, 0) + 1
        key = (finding.module, finding.op, finding.nth)
        digests.setdefault(batch_size, []).append((key, finding.digest))
        alone = digests.setdefault(1, []) if batch_size != 1 else []
        if (key, finding.digest_alone) not in alone and finding.digest_alone:
            alone.append((key, finding.digest_alone))
    classes: dict[tuple[tuple[Key, str | None], ...], list[int]] = {}
    for batch_size in sorted(digests):
        bits = tuple(dict.fromkeys(digests[batch_size]))
        classes.setdefault(bits, []).append(batch_size)
    causes = [f.cause for _, f in found if f.cause]
    _, example = next(((b, f) for b, f in found if f.status == "introduces"), found[0])
    return OpGroup(
        op,
        module,
        len({(f.module, f.nth) for _, f in found}),
        counts,
        # The gravest: "chance" over "neighbours" over "shape".
        min(causes, default=None),
        max((f.max_ulp or 0 for _, f in found), default=0),
        tuple(tuple(sizes) for sizes in classes.values()),
        example.shapes,
        example.dtype,
        example.location,
    )
