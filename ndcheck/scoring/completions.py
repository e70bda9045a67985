"""What was recorded: completions with their token ids and log-probabilities, of a run or a file.

A file has one JSON object a line: ``prompt_ids``, ``completion_ids``, ``logprobs`` of the latter in
nats, and optionally their ``ranks`` from 1. Text is never turned into tokens again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from ndcheck.errors import UsageError
from ndcheck.judging.comparison import FP32_DIGITS, rounds
from ndcheck.judging.verdict import count, run_doubts
from ndcheck.records import Arm, Run, RunSpec
from ndcheck.storage.ranges import Count, Positive, Range
from ndcheck.storage.reading import decode, open_file, parse_json, read_lines
from ndcheck.storage.run_directory import SampleReader, read_run

MOST_TOKENS = 10_000_000
"""Tokens of all completions together that are held in memory."""
LOGPROB = Range(-1e9, 1.0)
"""Rounding can leave the logarithm of a probability near 1 above 0."""
TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One recorded completion.

    ``logprobs`` [T] float64, in nats, of ``token_ids`` [T]; ``ranks`` [T] from 1, None where they
    are not known. ``name`` says where it was recorded, ``arm`` in which arm of a run.
    """

    name: str
    arm: Arm | None
    prompt_ids: TokenIds
    token_ids: TokenIds
    logprobs: NDArray[np.float64]
    ranks: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """All completions of a source; ``doubts`` keep what was measured of them from passing.

    ``is_rounded``: the numbers hold fewer digits than fp32, so that their bits say nothing.
    ``spec`` is that of the run, None of a file.
    """

    source: str
    completions: tuple[Completion, ...]
    doubts: tuple[str, ...] = ()
    is_rounded: bool = False
    spec: RunSpec | None = None


def read_recording(path: Path, arms: Sequence[Arm] | None = None) -> Recording:
    """The completions of a run's directory, those of ``arms`` or all, or of a file.

    Raises UsageError where there are none, or ids or log-probabilities are missing.
    """
    if not path.is_dir():
        if arms is not None:
            raise UsageError(f"--arms: {path} is a file, which has none")
        completions = tuple(read_file(path))
        is_rounded = rounded([completion.logprobs for completion in completions])
        return Recording(str(path), completions, is_rounded=is_rounded)
    run = read_run(path)
    for arm in arms or ():
        if arm not in run.spec.arms:
            raise UsageError(f"--arms {arm}: {path} has {', '.join(run.spec.arms)}")
    prompts = _prompt_ids(path, run)
    samples = SampleReader(path, run)
    completions = tuple(_limited(_of_run(samples, run, prompts, arms or run.spec.arms), path))
    if not completions:
        raise UsageError(f"{path}: it holds no completion with log-probabilities to compare")
    n_failed = sum(sample.error is not None for sample in samples)
    doubts = run_doubts(replace(run, flaws=samples.flaws))
    if n_failed:
        doubts += (f"{count(n_failed, 'sample')} of the run ended in an error",)
    return Recording(str(path), completions, doubts, rounds(run), run.spec)


def _prompt_ids(path: Path, run: Run) -> dict[str, TokenIds]:
    """By probe. Raises UsageError where the run does not hold them, or its tokens have no ids."""
    compared = run.environment.model.get("compared")
    if run.spec.endpoint is not None and compared != "token ids":
        raise UsageError(
            f"{path}: its server gave no token ids, and text is not turned into tokens again: "
            "record it from vLLM's server, or in process"
        )
    found = {}
    for i, probe in enumerate(run.spec.probes):
        text = run.prompt_token_ids[i] if i < len(run.prompt_token_ids) else ""
        if not text:
            raise UsageError(
                f"{path}: it holds no token ids of prompt {probe.probe_id} (an older ndcheck, or a "
                "backend that does not give them), and text is not turned into tokens again"
            )
        try:
            ids = [int(each) if each.isdecimal() else each for each in text.split()]
            found[probe.probe_id] = decode(_Ids, {"ids": ids}).ids
        except ValueError as error:
            raise UsageError(f"{path}: token ids of prompt {probe.probe_id}: {error}") from error
    return found


@dataclass(frozen=True, slots=True)
class _Ids:
    ids: tuple[Count, ...]


def _of_run(
    samples: SampleReader, run: Run, prompts: dict[str, TokenIds], arms: Sequence[Arm]
) -> Iterator[Completion]:
    is_greedy = run.spec.decoding.temperature == 0
    for sample in samples:
        is_wanted = sample.arm in arms and sample.error is None and sample.role != "control"
        if not is_wanted or not sample.token_ids:
            continue
        name = f"sample {sample.sample_id}"
        n_tokens = len(sample.token_ids)
        logprobs = np.array(sample.logprobs, dtype=np.float64)
        if len(logprobs) != n_tokens:
            raise UsageError(
                f"{name} has {count(n_tokens, 'token')} and {len(logprobs)} log-probabilities: "
                "its backend gives none, so there is nothing to compare"
            )
        if not all(value in LOGPROB for value in sample.logprobs):
            raise UsageError(f"{name} holds a log-probability that is none")
        ranks = np.ones(n_tokens, dtype=np.int64) if is_greedy else None
        prompt_ids = prompts[sample.probe_id]
        yield Completion(name, sample.arm, prompt_ids, sample.token_ids, logprobs, ranks)


@dataclass(frozen=True, slots=True)
class _Line:
    prompt_ids: tuple[Count, ...]
    completion_ids: tuple[Count, ...]
    logprobs: tuple[Annotated[float, LOGPROB], ...]
    ranks: tuple[Positive, ...] = ()


def read_file(path: Path) -> list[Completion]:
    """The completions of a file. Raises UsageError naming the first line that is wrong."""
    try:
        with open_file(path) as file:
            found = list(_limited(_of_lines(read_lines(file), path), path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not found:
        raise UsageError(f"{path}: it holds no completion")
    return found


def _of_lines(lines: Iterator[bytes | None], path: Path) -> Iterator[Completion]:
    for number, line in enumerate(lines, 1):
        try:
            if line is None:
                raise ValueError("it is too long")
            if not line.strip():
                continue
            yield _of_line(decode(_Line, parse_json(line.decode("utf-8"))), f"line {number}")
        except ValueError as error:
            raise UsageError(f"{path} line {number}: {error}") from error


def _of_line(line: _Line, name: str) -> Completion:
    n_tokens = len(line.completion_ids)
    if not line.prompt_ids or not n_tokens:
        raise ValueError("give at least one id in prompt_ids and in completion_ids")
    for field, values in (("logprobs", line.logprobs), ("ranks", line.ranks)):
        if len(values) != n_tokens and (field == "logprobs" or values):
            raise ValueError(f"{n_tokens} completion_ids and {len(values)} {field}: give as many")
    ranks = np.array(line.ranks, dtype=np.int64) if line.ranks else None
    logprobs = np.array(line.logprobs, dtype=np.float64)
    return Completion(name, None, line.prompt_ids, line.completion_ids, logprobs, ranks)


def _limited(completions: Iterator[Completion], path: Path) -> Iterator[Completion]:
    """With one tuple for equal ids. Raises UsageError where they are too many to hold."""
    known: dict[TokenIds, TokenIds] = {}
    n_tokens = 0
    for completion in completions:
        n_tokens += len(completion.token_ids)
        if n_tokens > MOST_TOKENS:
            raise UsageError(f"{path}: it holds more than {MOST_TOKENS} tokens: give a part of it")
        prompt_ids, token_ids = (
            known.setdefault(ids, ids) for ids in (completion.prompt_ids, completion.token_ids)
        )
        yield replace(completion, prompt_ids=prompt_ids, token_ids=token_ids)


def rounded(parts: Sequence[NDArray[np.float64]]) -> bool:
    """Were these numbers written with fewer digits than give an fp32 number back?

    Numbers that fp32 holds were not; those of a float64 computation have more digits.
    """
    inexact = [part[part != part.astype(np.float32)] for part in parts]
    values = [repr(value) for part in inexact for value in part.tolist()]
    return bool(values) and all(_n_digits(value) < FP32_DIGITS for value in values)


def _n_digits(value: str) -> int:
    return len(value.lstrip("-").partition("e")[0].replace(".", "").strip("0"))
