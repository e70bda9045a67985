"""The process that holds an engine: `python -m ndcheck.samplers.vllm.worker`.

It reads a JSON object a line and answers each with one. The first holds the engine's arguments
and is answered with ``ready``; every other is a batch to generate, or tokens to score. Standard
output belongs to this protocol alone: what the engine prints goes to standard error.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from ndcheck.errors import TrialError, UsageError, did_you_mean
from ndcheck.samplers.vllm.passes import Pass, count_prefills, describe_shape

SWITCH = "VLLM_BATCH_INVARIANT"
REFUSAL = "CoverageError"
"""What the plug-in of ndcheck_kernels raises, by name: the engine's process may not have it."""

VISITOR_TOKENS = 2

Message = dict[str, Any]


def main() -> None:
    """Serve until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    try:
        serve(sys.stdin, replies)
    except Exception as error:
        # Whatever else happens inside an engine leaves it in a state that nobody knows.
        traceback.print_exc()
        _send(replies, {"fatal": f"{type(error).__name__}: {_one_line(error)}"})
        sys.exit(1)


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Start an engine as the first request says and generate the batches of the others."""
    engine: SteppedEngine | None = None
    for line in requests:
        message = json.loads(line)
        try:
            if engine is None:
                engine = SteppedEngine(message["arguments"], invariant=message["invariant"])
                by = engine.invariant_by(message["by"]) if message["invariant"] else None
                _send(replies, {"ready": {**engine.describe(), "invariant_by": by}})
            else:
                answer = engine.score if "ids" in message else engine.generate
                _send(replies, answer(message))
        except (UsageError, TrialError) as error:
            _send(replies, {type(error).__name__: str(error)})


class SteppedEngine:
    """vLLM's engine, stepped in this process, so that its scheduler can be watched.

    Raises UsageError for an argument that the engine does not take, and TrialError from
    `generate` where the answer is not what was asked for.
    """

    def __init__(self, arguments: Message, *, invariant: bool) -> None:
        import vllm
        import vllm.envs

        if getattr(vllm.envs, SWITCH, None) is not invariant:
            raise RuntimeError(f"vLLM {vllm.__version__} does not follow {SWITCH}")
        _check_names(arguments, vllm.EngineArgs)
        self._vllm = vllm
        try:
            engine_arguments = vllm.EngineArgs(**arguments)
            engine_arguments.create_engine_config()
        except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
            raise UsageError(f"vLLM refuses these arguments: {_one_line(error)}") from error
        try:
            self._engine = vllm.LLMEngine.from_engine_args(engine_arguments)
        except RuntimeError as error:
            if type(error).__name__ != REFUSAL:
                raise
            raise UsageError(f"--invariant-by ndcheck: {error}; or give vllm") from error
        self._config = self._engine.vllm_config
        try:
            self._scheduler = self._engine.engine_core.engine_core.scheduler
            self._budget = self._scheduler.max_num_scheduled_tokens
        except AttributeError as error:
            from ndcheck_kernels.engines.seams import RELEASES

            raise RuntimeError(
                f"the scheduler of vLLM {vllm.__version__} cannot be watched; "
                f"ndcheck knows vLLM {RELEASES[0]} to {RELEASES[-1]}"
            ) from error
        self._passes: list[Pass] = []
        self._scheduler.schedule = self._watched(self._scheduler.schedule)
        self._n_trials = 0
        # What is compiled at the first request is no part of a trial's time, and fails here.
        self._run([[0, 0]], [0], [2], {"temperature": 0, "seed": 0, "prefix": None})

    def describe(self) -> Message:
        """What was started: versions, limits and settings as JSON scalars."""
        config = self._config
        return {
            "version": self._vllm.__version__,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "device": str(config.device_config.device_type),
            "vocabulary": config.model_config.get_vocab_size(),
            "context": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "kv_tokens": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            "attention": _attention(config),
            "graphs": str(config.compilation_config.cudagraph_mode).rpartition(".")[2],
        }

    def invariant_by(self, asked: str) -> str:
        """Whose kernels compute, and of which version: all workers' answer.

        Raises UsageError where ndcheck's were asked for and are not in place.
        """
        own = f"vllm {self._vllm.__version__}"
        if asked == "vllm":
            return own
        try:
            answers = self._engine.collective_rpc("ndcheck_coverage")
        except (AttributeError, NotImplementedError, RuntimeError):
            answers = [{"by": "vllm", "reason": "vLLM has not loaded its plug-in"}]
        left = [each for each in answers if each["by"] != "ndcheck"]
        if not left:
            return f"ndcheck {answers[0]['version']}"
        if asked == "ndcheck":
            raise UsageError(f"--invariant-by ndcheck: {left[0]['reason']}; give vllm")
        return own

    def generate(self, batch: Message) -> Message:
        """Generate one batch: all of its rows are waiting before the first forward pass.

        ``rows`` are token ids; those in ``slots`` are the probe's and are answered. ``prefix``
        is put into an emptied prefix cache for them first; with None no row reads that cache.
        ``chunk`` is the most tokens of a prompt that a forward pass may take, or None. ``visitors``
        are (pass, prompt): requests beside the batch, for a pass or two from that one on.
        """
        rows, slots, prefix = batch["rows"], batch["slots"], batch["prefix"]
        if prefix is not None:
            self._cool()
            self._run([prefix], [0], [1], batch)
        self._set_chunk(batch["chunk"], len(rows))
        n_tokens = [batch["max_tokens"]] * len(rows)
        if batch["chunk"]:
            # Short fillers leave their chunks earlier: they go on until the probe's rows are done.
            longest = max(-(-len(row) // batch["chunk"]) for row in rows)
            n_tokens = [n + longest * (i not in slots) for i, n in enumerate(n_tokens)]
        try:
            outputs = self._run(rows, slots, n_tokens, batch, batch["visitors"])
        finally:
            self._set_chunk(None, len(rows))
        passes = [each for each in self._passes if each.tokens_of_row]
        if batch["visitors"] and not any(
            each.has_prompt_beside(slots, len(rows)) for each in passes
        ):
            raise TrialError("the engine computed no other prompt beside the probe's tokens")
        answers = [_read(outputs[slot], rows[slot], batch, self._vocabulary) for slot in slots]
        cached = [answer["cached"] for answer in answers]
        for slot, n_cached in zip(slots, cached, strict=True):
            if bool(n_cached) != (prefix is not None):
                raise TrialError(
                    f"{n_cached} tokens of the prompt in row {slot} came from the prefix cache, "
                    f"which was {'cold' if prefix is None else 'warmed'}"
                )
        n_prefill = max(
            count_prefills(passes, slot, len(rows[slot]) - n_cached)
            for slot, n_cached in zip(slots, cached, strict=True)
        )
        if batch["chunk"] and n_prefill < 2:
            raise TrialError("the engine took the prompt whole, though told to cut it in chunks")
        if not batch["chunk"] and n_prefill != 1:
            raise TrialError(
                f"the engine computed the prompt in {n_prefill} passes instead of one: raise "
                "max_num_batched_tokens"
            )
        return {
            "answers": answers,
            "shape": describe_shape(passes),
            "prefill_calls": n_prefill,
            "decode_calls": len(passes) - n_prefill,
        }

    def score(self, message: Message) -> Message:
        """Log-probabilities and ranks of the ``ids`` from ``n_prompt`` on, all of them one prompt.

        It is alone in the engine, and nothing of it comes from the prefix cache.
        """
        from vllm.sampling_params import RequestOutputKind

        ids, n_prompt = message["ids"], message["n_prompt"]
        parameters = self._vllm.SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True,
        )
        self._n_trials += 1
        name = f"{self._n_trials}-0"
        given = self._engine.add_request(name, {"prompt_token_ids": ids}, parameters)
        self._row_of = {name: 0, given or name: 0}
        self._passes.clear()
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += [output for output in self._engine.step() if output.finished]
        if len(outputs) != 1 or list(outputs[0].prompt_token_ids) != ids:
            raise TrialError("the engine answered another prompt than the one it was given")
        scored = outputs[0].prompt_logprobs
        if scored is None or len(scored) != len(ids):
            raise TrialError("the engine gave no log-probabilities of its prompt")
        found = [scored[i].get(ids[i]) for i in range(n_prompt, len(ids))]
        if not all(each is not None and math.isfinite(each.logprob) for each in found):
            raise TrialError("the engine gave a log-probability of a prompt that is no number")
        ranks = [each.rank for each in found]
        return {
            "logprobs": [float(each.logprob) for each in found],
            "ranks": [] if None in ranks else [int(rank) for rank in ranks],
        }

    @property
    def _vocabulary(self) -> int:
        return int(self._config.model_config.get_vocab_size())

    def _run(
        self,
        rows: list[list[int]],
        slots: list[int],
        n_tokens: list[int],
        batch: Message,
        visitors: Sequence[tuple[int, list[int]]] = (),
    ) -> dict[int, Any]:
        """Step until the probe's rows are done; the output of each by its row."""
        self._n_trials += 1
        self._row_of = {}
        for i, row in enumerate(rows):
            self._add(i, row, self._parameters(n_tokens[i], batch, reads_cache=i in slots))
        self._passes.clear()
        outputs: dict[int, Any] = {}
        coming, numbers = deque(visitors), itertools.count(len(rows))
        while not outputs.keys() >= set(slots):
            while coming and coming[0][0] <= len(self._passes):
                _, prompt = coming.popleft()
                parameters = self._parameters(VISITOR_TOKENS, batch, reads_cache=False)
                self._add(next(numbers), prompt, parameters)
            if not self._engine.has_unfinished_requests():
                raise TrialError("the engine finished without an answer to every row")
            for output in self._engine.step():
                if output.finished:
                    outputs[self._row_of[output.request_id]] = output
        n_passes = len(self._passes)
        unfinished = {*self._row_of.values()} - outputs.keys()
        self._engine.abort_request([f"{self._n_trials}-{i}" for i in sorted(unfinished)])
        while self._engine.has_unfinished_requests():
            self._engine.step()
        del self._passes[n_passes:]
        return outputs

    def _add(self, i: int, row: list[int], parameters: Any) -> None:
        request_id = f"{self._n_trials}-{i}"
        given = self._engine.add_request(request_id, {"prompt_token_ids": row}, parameters)
        self._row_of[request_id] = i
        # Newer versions add to the name; it is by this one that the scheduler knows the row.
        self._row_of[given or request_id] = i

    def _parameters(self, n_tokens: int, batch: Message, *, reads_cache: bool) -> Any:
        """Rows never end early (a row that left would change the batch), and never share work."""
        from vllm.sampling_params import RequestOutputKind

        return self._vllm.SamplingParams(
            max_tokens=n_tokens,
            temperature=batch["temperature"],
            seed=batch["seed"] if batch["temperature"] else None,
            logprobs=2,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=not (reads_cache and batch["prefix"] is not None),
        )

    def _cool(self) -> None:
        for _ in range(3):
            if self._engine.reset_prefix_cache():
                return
            self._engine.step()  # With asynchronous scheduling the last pass may be under way.
        raise TrialError("the prefix cache could not be emptied")

    def _set_chunk(self, chunk: int | None, n_rows: int) -> None:
        """The scheduler's own limits: tokens of one request in a pass, and of all together."""
        self._config.scheduler_config.long_prefill_token_threshold = chunk or 0
        self._scheduler.max_num_scheduled_tokens = (
            min(self._budget, chunk * n_rows) if chunk else self._budget
        )

    def _watched(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            scheduled = schedule(*arguments, **keywords)
            running, waiting = self._scheduler.get_request_counts()
            rows = scheduled.num_scheduled_tokens.items()
            self._passes.append(
                Pass(
                    {self._row_of[name]: n for name, n in rows},
                    running,
                    waiting,
                    len(scheduled.preempted_req_ids or ()),
                )
            )
            return scheduled

        return watched


def _check_names(arguments: Message, engine_arguments: Any) -> None:
    accepted = [field.name for field in dataclasses.fields(engine_arguments)]
    for name in arguments:
        if name not in accepted:
            raise UsageError(
                f"--engine-arg {name}: vLLM has no such argument"
                f"{did_you_mean(name, accepted) or '; see `vllm serve --help=all`'}"
            )


def _attention(config: Any) -> str:
    backend = getattr(getattr(config, "attention_config", None), "backend", None)
    return "auto" if backend is None else str(getattr(backend, "name", backend))


def _read(output: Any, row: list[int], batch: Message, n_vocabulary: int) -> Message:
    """One row's answer, checked against what was asked."""
    if list(output.prompt_token_ids) != row:
        raise TrialError("the engine answered another prompt than the one it was given")
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    if len(token_ids) != batch["max_tokens"]:
        raise TrialError(
            f"the engine gave {len(token_ids)} tokens instead of {batch['max_tokens']}"
        )
    logprobs, margins = [], []
    for token_id, candidates in zip(token_ids, completion.logprobs, strict=True):
        if token_id not in candidates or not 0 <= token_id < n_vocabulary:
            raise TrialError(f"the engine gave token {token_id}, which it holds no logprob of")
        logprobs.append(candidates[token_id].logprob)
        largest = sorted((each.logprob for each in candidates.values()), reverse=True)
        if not math.isfinite(logprobs[-1]) or not math.isfinite(largest[1]):
            raise TrialError(f"the engine gave a logprob of token {token_id} that is no number")
        margins.append(largest[0] - largest[1])
        if batch["temperature"] == 0 and logprobs[-1] < largest[0]:
            raise TrialError(f"the engine gave token {token_id}, which is not the likeliest")
    return {
        "token_ids": token_ids,
        "logprob_bits": struct.pack(f">{len(logprobs)}f", *logprobs).hex(),
        "margins": margins,
        "cached": output.num_cached_tokens or 0,
    }


def _send(replies: IO[str], message: Message) -> None:
    replies.write(json.dumps(message, allow_nan=False) + "\n")
    replies.flush()


def _one_line(error: BaseException) -> str:
    lines: Iterator[str] = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line)[:400] or type(error).__name__


if __name__ == "__main__":
    main()
