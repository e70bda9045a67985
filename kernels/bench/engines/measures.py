"""The process of one engine that `bench.engines.plugin` starts: it measures what it is told to.

Its argument is a JSON object. One line says that the engine has started, or why it has not. Each
line of standard input then names a measure; one line answers it. Rows go to STAGE-MODEL-MODE.csv.
"""

from __future__ import annotations

import cProfile
import hashlib
import json
import os
import pstats
import random
import statistics
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engines.in_model import (
    N_REPEATS,
    STEPS,
    all_reduce_us,
    allocation_retries,
    fill,
    host_us,
)
from bench.engines.in_process import N_REQUESTS, PROMPT, REQUEST_TOKENS, bits
from bench.engines.planted import plant
from bench.engines.stages import LONG_PROMPT
from bench.engines.step_kernels import kernel_us
from bench.table import Table

SHAPES = Path(__file__).parents[1] / "shapes"
CACHE_BYTES = {
    "qwen3-8b": 20 * 10**9,
    "qwen3-8b-fp8": 7 * 10**9,
    "qwen3-30b-a3b": 3 * 10**9,
    "qwen3-1.4b": 10**9,
    "smollm2": 4 * 10**9,
}
FEWER_ROWS = {"qwen3-30b-a3b": 256, "qwen3-1.4b": 128, "smollm2": 256}
"""Where engines beside it leave no room for a step of 1024 rows."""
N_LAYERS = {"qwen3-1.4b": 4}
"""Of a shape that is cut."""
FEW_STEPS, LARGE_STEPS = (1, 8, 64, 256), (576, 768, 1000)
N_STEPS = 32
COPIES, N_COPY_TOKENS = (1, 1, 2, 4, 8, 16, 32, 64, 128, 256), 150
PREFILL_ROWS, PREFILL_TOKENS = 16, 1800
IN_FLIGHT, CLOSED_TOKENS = (1, 16, 64, 256), 64
N_NEEDLES, NEEDLE_BATCHES, N_NEEDLE_TOKENS = 1000, (8, 32, 64, 128), 48
DIGEST_BATCHES = (1, 8, 32)
COLUMNS = (
    "batch", "nth", "value", "n", "unique", "modal", "diverges_from", "differ", "p50", "p99",
    "retries",
)  # fmt: skip


class Measures:
    """One engine and its measures, each a method of its name."""

    def __init__(
        self, model: str, mode: str, stage: str, out: str, graphs: Sequence[int], n_ranks: int
    ) -> None:
        import vllm

        self.vllm, self.model, self.mode, self.out = vllm, model, mode, Path(out)
        self.table = Table(self.out / f"{stage}-{model}-{mode}.csv", echo=False)
        self.audit = self.out / f"audit-{model}.txt"
        is_random = (SHAPES / model).is_dir()
        rows = FEWER_ROWS.get(model, 1024)
        captured = {"cudagraph_capture_sizes": [n for n in graphs if n <= rows]}
        started = time.perf_counter()
        try:
            self.llm = vllm.LLM(
                shape(model) if is_random else trained(model),
                load_format="dummy" if is_random else "auto",
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                max_num_seqs=rows,
                max_model_len=2048,
                max_num_batched_tokens=8 * rows,
                gpu_memory_utilization=0.05,
                kv_cache_memory_bytes=CACHE_BYTES[model],
                tensor_parallel_size=n_ranks,
                enforce_eager=not graphs,
                **({"compilation_config": captured} if graphs else {}),
            )
        except BaseException as error:
            self.add("refusal", value=one_line(error))
            raise
        self.add("start_s", value=time.perf_counter() - started)
        if is_random:
            self.llm.apply_model(fill)
        self.generate([PROMPT] * 8, [8] * 8)
        self.leave_room()

    def leave_room(self) -> None:
        """Give back what torch keeps for later: the other engines of the card measure next."""
        import torch

        torch.cuda.empty_cache()

    def generate(
        self, prompts: Sequence[list[int]], n_tokens: Sequence[int]
    ) -> list[tuple[int, ...]]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [self.parameters(n) for n in n_tokens],
            use_tqdm=False,
        )
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def parameters(self, n_tokens: int) -> Any:
        return self.vllm.SamplingParams(
            temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False
        )

    def add(self, measure: str, **found: object) -> None:
        row = {**dict.fromkeys(COLUMNS, ""), **{k: v for k, v in found.items() if k in COLUMNS}}
        self.table.add(model=self.model, mode=self.mode, measure=measure, **row)

    def timed(self, prompts: Sequence[list[int]], n_tokens: Sequence[int]) -> float:
        started = time.perf_counter()
        self.generate(prompts, n_tokens)
        return time.perf_counter() - started

    def coverage(self) -> str:
        """The plug-in's table of layers, and what it counted, on the first rank."""
        answer, *_ = self.llm.collective_rpc("ndcheck_coverage")
        about = f"{answer['by']} {answer['version']}, calls {answer['fires']}"
        text = f"{about}\nreason {answer['reason']}\n{answer['table']}\n"
        self.audit.write_text(text, encoding="utf-8")
        return about

    def step(self, batches: Sequence[int] = STEPS) -> str:
        """A decode step: what N_STEPS tokens more take, by their number."""
        found = []
        for batch in batches:
            prompts = different_prompts(batch, len(PROMPT))
            self.timed(prompts, [1 + N_STEPS] * batch)
            times = [
                self.timed(prompts, [1 + N_STEPS] * batch) - self.timed(prompts, [1] * batch)
                for _ in range(N_REPEATS)
            ]
            found.append(statistics.median(times) / N_STEPS * 1000)
            self.add("step_ms", batch=batch, value=found[-1])
        return " ".join(f"{b}: {ms:.2f}" for b, ms in zip(batches, found, strict=True))

    def few_steps(self) -> str:
        return self.step(FEW_STEPS)

    def large_steps(self) -> str:
        return self.step(LARGE_STEPS)

    def requests(self) -> str:
        """The whole load twice: seconds, and how often the GPU's memory had to be freed for it."""
        found = []
        for nth in range(2):
            retries = allocation_retries()
            elapsed_s = self.timed([PROMPT] * N_REQUESTS, REQUEST_TOKENS)
            retries = allocation_retries() - retries
            self.add("requests_s", batch=N_REQUESTS, nth=nth, value=elapsed_s, retries=retries)
            found.append(f"{elapsed_s:.2f} s, {retries} retries")
        return "; ".join(found)

    def profile(self) -> str:
        """Where the host's time goes in that load: the functions that took most of it."""
        watched = cProfile.Profile()
        watched.runcall(self.generate, [PROMPT] * N_REQUESTS, REQUEST_TOKENS)
        path = self.out / f"profile-{self.model}-{self.mode}.txt"
        with path.open("w", encoding="utf-8") as file:
            pstats.Stats(watched, stream=file).sort_stats("tottime").print_stats(60)
        return path.name

    def kernels(self) -> str:
        """What each CUDA kernel takes of the largest step that is timed, in a table of its own."""
        batch = min(max(STEPS), FEWER_ROWS.get(self.model, max(STEPS)))
        prompts = different_prompts(batch, len(PROMPT))
        table = Table(self.out / f"kernels-{self.model}-{self.mode}-{batch}.csv", echo=False)
        found = kernel_us(lambda n_tokens: self.generate(prompts, [n_tokens] * batch))
        for name, us in found.items():
            table.add(kernel=name, us_a_step=us)
        return f"{sum(found.values()) / 1000:.2f} ms of {batch} rows"

    def host(self) -> str:
        """Microseconds that the host takes to start each product of a layer at N_REQUESTS rows."""
        (found,) = self.llm.apply_model(host_us)
        for shape, us in found.items():
            self.add("host_us", batch=shape, value=us)
        return " ".join(f"{shape}: {us:.1f}" for shape, us in found.items())

    def copies(self) -> str:
        completions = []
        for batch in COPIES:
            completions += self.generate([PROMPT] * batch, [N_COPY_TOKENS] * batch)
        found = bits(completions, completions[0])
        differ = sum(each != completions[0] for each in completions)
        self.add("copies", differ=differ, **found)
        return f"{found['unique']} unique of {found['n']}"

    def prefill(self) -> str:
        prompts = different_prompts(PREFILL_ROWS, PREFILL_TOKENS)
        times = [self.timed(prompts, [1] * PREFILL_ROWS) for _ in range(5)][1:]
        self.add("prefill_s", batch=PREFILL_ROWS, value=statistics.median(times))
        return f"{statistics.median(times):.3f} s"

    def closed(self) -> str:
        """Requests of CLOSED_TOKENS, each sent when one has ended: tokens/s and latencies."""
        found = []
        for n in IN_FLIGHT:
            latencies, elapsed_s = self.closed_loop(n, 4 * n + 20)
            rate = len(latencies) * CLOSED_TOKENS / elapsed_s
            cuts = statistics.quantiles(latencies, n=100, method="inclusive")
            p50, p99 = cuts[49], cuts[98]
            self.add("closed_tokens_per_s", batch=n, value=rate, p50=p50, p99=p99)
            found.append(f"{n}: {rate:.0f}/s {p50:.3f} {p99:.3f}")
        return " ".join(found)

    def closed_loop(self, in_flight: int, n_requests: int) -> tuple[list[float], float]:
        engine = self.llm.llm_engine
        sent: dict[str, float] = {}
        latencies: list[float] = []
        draw = random.Random(in_flight)

        def send() -> None:
            name = f"closed-{in_flight}-{len(sent)}"
            prompt = [draw.randrange(100, 10000) for _ in range(draw.randrange(16, 256))]
            sent[name] = time.perf_counter()
            engine.add_request(name, {"prompt_token_ids": prompt}, self.parameters(CLOSED_TOKENS))

        started = time.perf_counter()
        for _ in range(in_flight):
            send()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    latencies.append(time.perf_counter() - sent[output.request_id])
                    if len(sent) < n_requests:
                        send()
        return latencies, time.perf_counter() - started

    def collectives(self) -> str:
        """Microseconds of a sum over all ranks in a CUDA graph, by rows of 4096 numbers."""
        found, *_ = self.llm.apply_model(all_reduce_us)
        for rows, us in found.items():
            self.add("all_reduce_us", batch=rows, value=us)
        return " ".join(f"{rows}: {us:.1f}" for rows, us in found.items())

    def needle(self) -> str:
        """One prompt at random places of batches of random others, as vLLM's own test does.

        Told apart by token ids, and by the bits of their logprobs: a model that is sure of its
        words says the same ones whatever rounds otherwise.
        """
        prompt = PROMPT if (SHAPES / self.model).is_dir() else self.needle_prompt()
        draw = random.Random(0)
        ((reference, sure),) = self.with_logprobs([prompt])
        found: list[tuple[tuple[int, ...], tuple[float, ...]]] = []
        while len(found) < N_NEEDLES:
            batch = draw.choice(NEEDLE_BATCHES)
            rows = [
                [draw.randrange(100, 40000) for _ in range(draw.randrange(8, 200))]
                for _ in range(batch)
            ]
            places = draw.sample(range(batch), min(batch // 2, N_NEEDLES - len(found)))
            for place in places:
                rows[place] = prompt
            outputs = self.with_logprobs(rows)
            found += [outputs[place] for place in places]
        completions = [tokens for tokens, _ in found]
        differ = sum(tokens != reference for tokens in completions)
        logprobs_differ = sum(logprobs != sure for _, logprobs in found)
        self.add("needle", differ=differ, **bits([reference, *completions], reference))
        self.add("needle_logprobs", n=len(found), differ=logprobs_differ)
        return f"{differ} of {len(found)} differ, {logprobs_differ} in their logprobs"

    def digest(self) -> str:
        """Of tokens and logprobs of batches alike in every mode, and whether the plug-in acted."""
        from vllm.v1.worker.gpu_worker import Worker

        draw, digest = random.Random(0), hashlib.sha256()
        for batch in DIGEST_BATCHES:
            rows = [
                [draw.randrange(4096) for _ in range(draw.randrange(8, 99))] for _ in range(batch)
            ]
            for tokens, logprobs in self.with_logprobs(rows):
                digest.update(struct.pack(f"{len(tokens)}q{len(logprobs)}d", *tokens, *logprobs))
        is_ours = hasattr(Worker, "ndcheck_coverage")
        self.add("digest", value=digest.hexdigest()[:16], n=int(is_ours))
        return f"{digest.hexdigest()[:16]}, {'with' if is_ours else 'without'} the plug-in"

    def with_logprobs(
        self, prompts: Sequence[list[int]]
    ) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """N_NEEDLE_TOKENS of each, and the logprob of each token."""
        parameters = self.parameters(N_NEEDLE_TOKENS)
        parameters.logprobs = 0
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )
        first = [output.outputs[0] for output in outputs]
        return [
            (
                tuple(each.token_ids),
                tuple(
                    step[token].logprob
                    for token, step in zip(each.token_ids, each.logprobs, strict=True)
                ),
            )
            for each in first
        ]

    def needle_prompt(self) -> list[int]:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(trained(self.model))
        message = [{"role": "user", "content": LONG_PROMPT}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def long(self) -> str:
        started = time.perf_counter()
        completions = self.generate([PROMPT] * N_REQUESTS, [1000] * N_REQUESTS)
        elapsed_s = time.perf_counter() - started
        found = bits(completions)
        ((_, commonest),) = Counter(completions).most_common(1)
        differ = N_REQUESTS - commonest
        self.add("long_s", batch=N_REQUESTS, value=elapsed_s, differ=differ, **found)
        return f"{elapsed_s:.1f} s, {found['unique']} unique"


def different_prompts(n: int, n_tokens: int) -> list[list[int]]:
    """In a mixture equal rows would all go to the same few experts."""
    draw = random.Random(0)
    return [[draw.randrange(100, 10000) for _ in range(n_tokens)] for _ in range(n)]


def shape(model: str) -> str:
    """A directory with a shape's config."""
    if model not in N_LAYERS:
        return str(SHAPES / model)
    config = json.loads((SHAPES / model / "config.json").read_text(encoding="utf-8"))
    folder = Path(tempfile.mkdtemp())
    text = json.dumps({**config, "num_hidden_layers": N_LAYERS[model]})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return str(folder)


def trained(model: str) -> str:
    """The directory of the trained model, converted from its package once."""
    from ndcheck.samplers.local.checkpoint.smollm2 import NAME, find_model

    assert model == NAME
    return str(find_model())


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What vLLM prints goes to the log.
    start = json.loads(sys.argv[1])
    started = time.perf_counter()
    try:
        if fault := start.pop("fault"):
            plant(fault)
        measures = Measures(**start)
    except BaseException as error:
        print(one_line(error), file=answers, flush=True)
        raise
    print(f"started in {time.perf_counter() - started:.0f} s", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = getattr(measures, line.strip())()
        except Exception as error:  # The other measures may still work.
            traceback.print_exc()
            answer = one_line(error)
        measures.leave_room()
        print(answer, file=answers, flush=True)
    return 0


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    sys.exit(main())
