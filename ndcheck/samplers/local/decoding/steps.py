"""The decode steps of an exact batch, and what each of them gave, kept on the device.

On CUDA the second step is captured as a graph and the others replay it, and nothing is read back
until a block of steps is done.

What a batch generated can be fed to it again, in passes of several tokens, of which those that are
alike are captured too: each token is then compared with the step that had generated it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ndcheck.errors import TrialError
from ndcheck.records import Arm, Decoding, Drafted, Fault, Fed, FinishReason, Load
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.decoding.draft import Drafter
from ndcheck.samplers.local.decoding.replaying import Replayed
from ndcheck.samplers.local.decoding.selection import (
    gumbel_noise,
    plant_in_logits,
    read_pass,
    read_step,
)
from ndcheck.samplers.local.memory import is_out_of_memory

log = logging.getLogger(__name__)

STEPS_BETWEEN_CHECKS = 32
"""On CUDA, decode steps between two looks at whether every probe row has finished."""
FEWEST_ALIKE = 4
"""Passes of one size that are worth a capture, which takes as long as a pass or two."""
MOST_DECODED = 32
"""Batches whose completions are kept."""
Logs = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
"""Token ids, margins, log-probabilities and digests, each [T, B], in the order of `Reading`."""
Batch = tuple[Arm, Decoding, tuple[tuple[int, ...], ...], tuple[int, ...]]
"""What decides it: the arm, how tokens are drawn, the token ids of all prompts; and its slots."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What one probe row generated, per token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    row_digests: tuple[str, ...]
    finish_reason: FinishReason
    fed: Fed | None = None
    drafted: Drafted | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """What every row of an exact batch generated, and how many of its tokens are its own [B]."""

    logs: Logs
    lengths: NDArray[np.int64]


class Completions(dict[Batch, Decoded]):
    """What batches generated, to be fed again; what is gone is decoded once more."""

    def keep(self, batch: Batch, decoded: Decoded) -> None:
        self.pop(batch, None)
        while len(self) >= MOST_DECODED:
            del self[next(iter(self))]
        self[batch] = decoded


class DecodeSteps:
    """Decodes one `ExactBatch`, again and again if it is reset in between.

    ``captures`` False leaves its steps uncaptured.
    """

    def __init__(self, batch: ExactBatch, decoding: Decoding, *, captures: bool = True) -> None:
        self.batch = batch
        self._captures = captures and batch.can_be_captured
        # There a launch costs the host more than the reading; a CPU has to keep what it reads.
        self._reads_passes = batch.device.type == "cuda"
        self._decoding = decoding
        n_tokens, n_rows, device = decoding.max_tokens, batch.n_rows, batch.device
        shape = (n_tokens, n_rows)
        self._next_ids = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        # In the order of `Reading`.
        self._log = (
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
        )
        self._n_done = 0
        self._begin(())
        self._noise: Tensor | None = None
        self._replayed = Replayed(batch, lambda: self._step(0))

    @property
    def capture_failure(self) -> str | None:
        """Why a step could not be captured."""
        return self._replayed.failure

    def run(
        self, logits: Tensor, slots: Sequence[int], stop_ids: set[int], fault: Fault | None
    ) -> list[Stream]:
        """Decode on from the prompt's logits [B, V]; one stream for each of the ``slots``.

        Raises TrialError where a probe row's logits hold NaN.
        """
        self._begin(slots)
        self._draw_noise(0, logits.shape[-1])
        self._record(self._plant(logits, 0, fault))
        n_done = 1
        while n_done < self._decoding.max_tokens and not self._is_over(n_done, stop_ids):
            self._draw_noise(n_done, logits.shape[-1])
            has_fault = fault is not None and n_done in (fault.latent_at, fault.fork_at)
            # The first step ever stays uncaptured: it compiles what the capture needs.
            is_first = n_done == 1 and not self._replayed.is_captured
            if has_fault or is_first or not self._captures or not self.replay():
                self._step(n_done, fault)
            n_done += 1
        self._n_done = n_done
        return self._streams(n_done, slots, stop_ids)

    def replay(self) -> bool:
        """Replay the captured step; False where it cannot be captured, and nothing was done."""
        self._captures = self._replayed.replay()
        return self._captures

    def decoded(self, stop_ids: set[int]) -> Decoded:
        """What every row generated in the last `run`, as far as that went.

        On a CPU nothing but token ids is known of rows other than its slots.
        """
        logs = self._read_logs(self._n_done)
        is_stop = np.isin(logs[0], list(stop_ids))
        ends = np.where(is_stop.any(axis=0), is_stop.argmax(axis=0) + 1, self._n_done)
        return Decoded(logs, ends)

    def feed(
        self,
        decoded: Decoded,
        load: Load,
        slots: Sequence[int],
        stop_ids: set[int],
        fault: Fault | None,
        widths: Sequence[int],
    ) -> list[Stream]:
        """Feed the reset batch what it generated; one stream for each of the ``slots``.

        Raises TrialError where a probe row's logits hold NaN.
        """
        self._begin(slots)
        n_done = 0
        token_ids = torch.from_numpy(decoded.logs[0]).to(self.batch.device)  # [T, B]
        passes = self.batch.fed_passes(token_ids[:-1].T, load)
        for _, alike in groupby(passes, lambda each: (each[0].shape[1], each[1])):
            n_done = self._feed_alike(list(alike), n_done, fault)
        logs = self._read_logs(n_done)
        return [
            replace(
                _stream([log[:, slot] for log in logs], _n_kept(decoded, logs[0], slot), stop_ids),
                fed=_compare(decoded, logs, slot, widths),
            )
            for slot in slots
        ]

    def speculate(
        self,
        logits: Tensor,
        draft_model: Any,
        load: Load,
        slots: Sequence[int],
        stop_ids: set[int],
        fault: Fault | None,
    ) -> list[Stream]:
        """Decode on as `run` does, in passes that verify what ``draft_model`` proposes.

        All rows keep step: a pass goes on from the last token that every probe row accepts, and
        fillers take what is proposed. Raises UsageError where the model computes something else
        in such passes, and TrialError where a probe row's logits hold NaN.
        """
        self.batch.require_faithful("chunked")
        draft = Drafter(draft_model, self.batch)
        self._begin(slots)
        self._record(self._plant(logits, 0, fault))
        n_done, most = 1, self._decoding.max_tokens
        proposed, accepted = [], []
        while n_done < most and not self._has_ended(n_done, stop_ids):
            n_columns, n_proposed = self.batch.n_filled, min(load.width, most - n_done) - 1
            fed = torch.stack(draft.propose(self._next_ids, n_proposed), dim=1)
            verified = self.batch.forward(fed, n_proposed + 1)
            self._position.fill_(n_done)
            self._record_pass(verified, n_done, fault)
            chosen = self._log[0][n_done : n_done + n_proposed].T
            agrees = (chosen == fed[:, 1:])[list(slots)].all(dim=0)
            n_accepted = int(agrees.cumprod(dim=0).sum())
            self._next_ids.copy_(self._log[0][n_done + n_accepted])
            for batch in (self.batch, draft.batch):
                batch.rewind(n_columns + 1 + n_accepted)
            n_done += 1 + n_accepted
            proposed.append(n_proposed)
            accepted.append(n_accepted)
        drafted = Drafted(tuple(proposed), tuple(accepted))
        streams = self._streams(n_done, slots, stop_ids)
        return [replace(stream, drafted=drafted) for stream in streams]

    def _begin(self, slots: Sequence[int]) -> None:
        self._position.zero_()
        self._slots, self._n_looked_at = slots, 0
        self._is_stopped = np.zeros(len(slots), dtype=bool)

    def _step(self, position: int, fault: Fault | None = None) -> None:
        self._record(self._plant(self.batch.step(self._next_ids), position, fault))

    def _plant(self, logits: Tensor, position: int, fault: Fault | None) -> Tensor:
        return plant_in_logits(logits, position, fault, self._decoding, self._noise)

    def _record(self, logits: Tensor) -> None:
        reading = read_step(logits, self._decoding, self._noise, self._slots)
        for log, values in zip(self._log, reading, strict=True):
            log.index_copy_(0, self._position, values[None])
        self._next_ids.copy_(reading.token_ids)
        self._position.add_(1)

    def _record_pass(self, logits: Tensor, first: int, fault: Fault | None) -> None:
        """Every position of a pass, [B, n, vocabulary], from the ``first`` on, which is next."""
        end = first + logits.shape[1]
        faults = set() if fault is None else {fault.latent_at, fault.fork_at}
        is_plain = faults.isdisjoint(range(first, end)) and not self._decoding.temperature
        if self._reads_passes and is_plain and logits.is_contiguous():
            self._read_pass(logits)
            return
        for position, of_position in enumerate(logits.unbind(1), first):
            self._draw_noise(position, logits.shape[-1])
            self._record(self._plant(of_position, position, fault))

    def _feed_alike(
        self, passes: list[tuple[Tensor, int]], n_done: int, fault: Fault | None
    ) -> int:
        """Feed passes of one size; how many tokens the logs hold then."""
        token_ids, n_wanted = passes[0]
        is_plain = fault is None and not self._decoding.temperature
        captures = self._captures and is_plain and self.batch.can_capture_passes
        captures = captures and token_ids.shape[1] == n_wanted and len(passes) >= FEWEST_ALIKE
        fed = token_ids.clone()
        replayed = Replayed(self.batch, lambda: self._feed(fed), n_wanted)
        for nth, (token_ids, _) in enumerate(passes):
            # The first pass stays uncaptured: it compiles what the capture needs.
            if captures and nth > 0:
                fed.copy_(token_ids)
                captures = self._replays(replayed)
            if not captures or nth == 0:
                logits = self.batch.forward(token_ids, max(1, n_wanted))
                if n_wanted:
                    self._record_pass(logits, n_done, fault)
            n_done += n_wanted
        return n_done

    def _replays(self, replayed: Replayed) -> bool:
        """A graph has memory of its own: where that is too much, a launched pass may fit."""
        try:
            return replayed.replay()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False

    def _feed(self, token_ids: Tensor) -> None:
        """One pass over token ids [B, n] that all count, written where the device says."""
        self._read_pass(self.batch.advance(token_ids).contiguous())

    def _read_pass(self, logits: Tensor) -> None:
        reading, n_tokens = read_pass(logits, self._decoding, self._slots), logits.shape[1]
        positions = self._position + torch.arange(n_tokens, device=self.batch.device)
        for log, values in zip(self._log, reading, strict=True):
            log.index_copy_(0, positions, values)
        self._position.add_(n_tokens)

    def _draw_noise(self, position: int, n_vocabulary: int) -> None:
        if self._decoding.temperature == 0:
            return
        noise = gumbel_noise(self._decoding.seed, position, n_vocabulary)
        if self._noise is None:
            self._noise = noise.to(self.batch.device)
        else:
            self._noise.copy_(noise)

    def _is_over(self, n_done: int, stop_ids: set[int]) -> bool:
        if self.batch.device.type == "cuda" and n_done % STEPS_BETWEEN_CHECKS:
            return False
        return self._has_ended(n_done, stop_ids)

    def _has_ended(self, n_done: int, stop_ids: set[int]) -> bool:
        if not stop_ids:
            return False
        token_ids = self._log[0][self._n_looked_at : n_done].cpu().numpy()[:, list(self._slots)]
        self._n_looked_at = n_done
        self._is_stopped |= (token_ids[..., None] == list(stop_ids)).any(axis=(0, 2))
        return bool(self._is_stopped.all())

    def _streams(self, n_done: int, slots: Sequence[int], stop_ids: set[int]) -> list[Stream]:
        logs = self._read_logs(n_done)
        return [_stream([log[:, slot] for log in logs], n_done, stop_ids) for slot in slots]

    def _read_logs(self, n_done: int) -> Logs:
        # Copied: on a CPU the array is the log's own memory, and what is fed is logged over it.
        logs = (log[:n_done].cpu().numpy().copy() for log in self._log)
        token_ids, margins, logprobs, digests = logs
        return token_ids, margins, logprobs, digests


def _stream(log: Sequence[NDArray[Any]], n_tokens: int, stop_ids: set[int]) -> Stream:
    """The first ``n_tokens`` of one row's log, up to the first that stops it."""
    token_ids, margins, logprobs, digests = (values[:n_tokens] for values in log)
    stops = np.flatnonzero(np.isin(token_ids, list(stop_ids)))
    end = int(stops[0]) + 1 if stops.size else n_tokens
    if np.isnan(margins[:end]).any():
        position = int(np.isnan(margins[:end]).argmax())
        raise TrialError(f"the probe's logits hold NaN at token {position + 1}")
    return Stream(
        tuple(token_ids[:end].tolist()),
        tuple(logprobs[:end].tolist()),
        tuple(margins[:end].tolist()),
        tuple(f"{digest:016x}" for digest in digests[:end].view(np.uint64).tolist()),
        "stop" if stops.size else "length",
    )


def warn_uncaptured(arm: Arm, failure: object) -> None:
    log.warning(
        "%s: a decode step cannot be captured as a CUDA graph, so every step is launched "
        "by Python, which is slower: %s",
        arm,
        failure,
    )


def n_comparable(n_tokens: int, widths: Sequence[int]) -> int:
    """The positions of ``n_tokens`` that full passes give, whichever of the widths they have."""
    n_fed = n_tokens - 1
    full = [n_fed // width * width for width in widths if width <= n_fed]
    return 1 + min(full, default=n_fed)


def _compare(decoded: Decoded, logs: Logs, slot: int, widths: Sequence[int]) -> Fed:
    """One row's logs against what had generated it."""
    n_tokens = int(decoded.lengths[slot])
    ours, theirs = ([log[:n_tokens, slot] for log in each] for each in (logs, decoded.logs))
    is_other = ours[0] != theirs[0]
    # Bits, not values: a NaN equals itself.
    has_other_bits = (ours[3] != theirs[3]) | (ours[2].view(np.int32) != theirs[2].view(np.int32))
    with np.errstate(invalid="ignore"):
        difference = np.abs(ours[2] - theirs[2])[~is_other]
    end = n_comparable(n_tokens, widths)
    return Fed(
        n_tokens,
        int(has_other_bits.sum()),
        int(is_other.sum()),
        float(np.nanmax(difference, initial=0.0)),
        _digest(ours[3][:end]),
        _digest(theirs[3][:end]),
    )


def _n_kept(decoded: Decoded, token_ids: NDArray[np.int64], slot: int) -> int:
    """The tokens of a row up to the first that is not the one fed, which is among them."""
    n_tokens = int(decoded.lengths[slot])
    is_other = token_ids[:n_tokens, slot] != decoded.logs[0][:n_tokens, slot]
    return int(is_other.argmax()) + 1 if is_other.any() else n_tokens


def _digest(digests: NDArray[Any]) -> str:
    return hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()
