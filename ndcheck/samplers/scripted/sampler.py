"""A fake sampler that replays planted streams: for tests, for `doctor`, and to try ndcheck out."""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ndcheck.errors import BackendError, TrialError
from ndcheck.plan.conversations import as_text
from ndcheck.plan.fillers import FILLER_WORDS
from ndcheck.plan.grid import CACHE_STATES
from ndcheck.probe import Prompt
from ndcheck.records import Decoding, Fed, Load, Probe, Sample, Trial, Witness

VOCABULARY = tuple(dict.fromkeys(FILLER_WORDS))
FORK_AT = 3
LATENT_AT = 2

Plant = Callable[[Load, int, int], bool]
"""(load, slot, number of trials run before) -> does the fault show in this row?"""

_NEVER: Plant = lambda load, slot, n_run: False  # noqa: E731
_FORKS: dict[str, Plant] = {
    "clean": _NEVER,
    "fork": lambda load, slot, n_run: n_run > 0,
    "flaky": lambda load, slot, n_run: n_run % 5 == 4,
    "batch-dependent": lambda load, slot, n_run: load.batch_size > 1,
    "slot-dependent": lambda load, slot, n_run: slot > 0,
    "neighbour-dependent": lambda load, slot, n_run: len(set(load.filler_lengths)) > 1,
    "cache-dependent": lambda load, slot, n_run: load.cache_state != "whole" and not load.scores,
    "width-dependent": lambda load, slot, n_run: load.width > 4,
    "scoring-dependent": lambda load, slot, n_run: load.scores,
}
_LATENTS: dict[str, Plant] = {"latent": lambda load, slot, n_run: load.batch_size > 1}

BEHAVIOURS: dict[str, str] = {
    "clean": "every completion equal, every bit equal",
    "fork": "every trial after the first forks at token 3",
    "flaky": "every fifth trial forks at token 3",
    "batch-dependent": "forks wherever the batch holds more than one row",
    "slot-dependent": "forks in every row but the first",
    "neighbour-dependent": "forks where the fillers' lengths differ",
    "cache-dependent": "forks where the prompt is not prefilled whole",
    "width-dependent": "forks where passes hold more than four tokens of the completion",
    "scoring-dependent": "forks where prompt and completion share a pass",
    "stale": "forks wherever a larger batch ran before",
    "latent": "equal tokens, one logit off by one unit in the last place in batches",
    "never-batches": "claims success but runs every row alone",
    "out-of-memory": "fails at batch sizes of 4 and more",
    "dies": "the backend is gone after five trials",
    "slow": "clean, at 50 ms a trial",
    "hostile": "completions full of markup, escapes, formulas and direction overrides",
}

_HOSTILE_PIECES = (
    "=cmd|'/c calc'!A1",
    "[red]markup[/red]",
    "\x1b[2J\x1b[31m",
    "<script>alert(1)</script>",
    "\u202eright to left",
    "\U0001f9ea",
    "a|b\n\n# heading",
    "\x00\x07",
)


class ScriptedSampler:
    """Replays one of BEHAVIOURS. Tokens are words; token t is a hash of prompt and t."""

    context = 100_000
    cache_states = CACHE_STATES
    refused_axes = ()
    notes = ()
    interleaves_arms = True

    def __init__(self, behaviour: str) -> None:
        self._behaviour = behaviour
        self._forks = _FORKS.get(behaviour, _NEVER)
        self._latents = _LATENTS.get(behaviour, _NEVER)
        self._pieces = _HOSTILE_PIECES if behaviour == "hostile" else VOCABULARY
        self._n_run = 0
        self._largest = 0

    def count_tokens(self, prompt: Prompt) -> int:
        return len(as_text(prompt).split())

    def encode(self, prompt: Prompt) -> None:
        return None

    def render(self, prompt: Prompt) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"name": f"scripted:{self._behaviour}", "digest": self._behaviour}

    def largest_batch_size(self, n_prompt_tokens: int, decoding: Decoding) -> int:
        return 3 if self._behaviour == "out-of-memory" else 16

    def changes(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        pass

    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        started = time.perf_counter()
        if self._behaviour == "slow":
            time.sleep(0.05)
        if self._behaviour == "out-of-memory" and trial.load.batch_size >= 4:
            raise TrialError(f"out of memory at batch size {trial.load.batch_size}")
        if self._behaviour == "dies" and self._n_run >= 5:
            raise BackendError("the scripted backend is gone, as planted")
        # "trials run before" is read off the plan, so that a resumed run goes on as it began.
        n_run = trial.trial_id
        self._n_run += 1
        self._largest = max(self._largest, trial.load.batch_size)
        achieved = 1 if self._behaviour == "never-batches" else trial.load.batch_size
        rows = [self._stream(trial, slot, probe, decoding, n_run) for slot in trial.load.slots]
        elapsed_s = time.perf_counter() - started
        witness = Witness(achieved, 1, decoding.max_tokens - 1)
        return [
            replace(
                Sample.of(trial, nth, witness, "length", elapsed_s),
                token_ids=token_ids,
                token_texts=tuple(self._pieces[t] + " " for t in token_ids),
                logprobs=logprobs,
                margins=margins,
                row_digests=digests,
                fed=fed,
            )
            for nth, (token_ids, logprobs, margins, digests, fed) in enumerate(rows)
        ]

    def _stream(
        self, trial: Trial, slot: int, probe: Probe, decoding: Decoding, n_run: int
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...], tuple[str, ...], Fed | None]:
        is_stale = self._behaviour == "stale" and trial.load.batch_size < self._largest
        load, forks = trial.load, self._forks
        fork_at = FORK_AT if is_stale or forks(load, slot, n_run) else None
        # A completion that was fed ends where it is no longer the one decoded.
        ends_at = fork_at if forks(load, slot, n_run) != forks(load.decoded, slot, n_run) else None
        latent_at = LATENT_AT if self._latents(trial.load, slot, n_run) else None
        if trial.fault:
            fork_at, latent_at = trial.fault.fork_at, trial.fault.latent_at
            ends_at = fork_at
        token_ids, logprobs, margins, digests = [], [], [], []
        forked = False
        for t in range(decoding.max_tokens):
            forked = forked or t == fork_at
            seed = hashlib.sha256(f"{probe.prompt}/{decoding.seed}/{t}".encode()).digest()
            token_ids.append((seed[0] + forked) % len(self._pieces))
            logprob = _as_fp32(-0.01 - seed[1] / 100)
            if forked or t == latent_at:
                logprob = _next_fp32(logprob)
            logprobs.append(logprob)
            margins.append(seed[2] / 64)
            digests.append(hashlib.sha256(seed + struct.pack(">f", logprob)).hexdigest()[:16])
            if load.is_fed and t == ends_at:
                break
        fed = None
        if load.is_fed:
            n_other = int(ends_at is not None)
            fed = Fed(decoding.max_tokens, n_other, n_other, 0.0, f"{n_other:016x}", "0" * 16)
        return tuple(token_ids), tuple(logprobs), tuple(margins), tuple(digests), fed


def _as_fp32(x: float) -> float:
    (rounded,) = struct.unpack(">f", struct.pack(">f", x))
    return float(rounded)


def _next_fp32(x: float) -> float:
    """The neighbouring fp32 value away from zero."""
    (bits,) = struct.unpack(">I", struct.pack(">f", x))
    (moved,) = struct.unpack(">f", struct.pack(">I", bits + 1))
    return math.copysign(float(moved), x)
