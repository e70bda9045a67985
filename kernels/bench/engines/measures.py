"""The process of one engine that `bench.engines.plugin` starts: it measures what it is told to.

Each line of standard input names a measure; one line answers it. Rows go to STAGE-MODEL-MODE.csv.
"""

from __future__ import annotations

import cProfile
import pstats
import random
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engines.in_process import N_REQUESTS, PROMPT, REQUEST_TOKENS, bits
from bench.table import Table

SHAPES = Path(__file__).parents[1] / "shapes"
GRAPHS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
CACHE_BYTES = {
    "qwen3-8b": 20 * 10**9,
    "qwen3-8b-fp8": 10 * 10**9,
    "qwen3-30b-a3b": 3 * 10**9,
    "smollm2": 4 * 10**9,
}
FEWER_ROWS = {"qwen3-30b-a3b": 256}
"""Where two engines' weights leave no room for a step of 1024 rows."""
STEPS, FEW_STEPS = (1, 8, 32, 64, 128, 256, 512), (1, 8, 64, 256)
LARGE_STEPS = (576, 768, 1000)
N_STEPS, N_REPEATS = 32, 3
SUMS = 73
"""Over ranks, in a step of 36 layers."""
COPIES, N_COPY_TOKENS = (1, 1, 2, 4, 8, 16, 32, 64, 128, 256), 150
PREFILL_ROWS, PREFILL_TOKENS = 16, 1800
IN_FLIGHT, CLOSED_TOKENS = (1, 16, 64, 256), 64
N_NEEDLES, NEEDLE_BATCHES, N_NEEDLE_TOKENS = 1000, (8, 32, 64, 128), 48
COLUMNS = (
    "batch", "nth", "value", "n", "unique", "modal", "diverges_from", "differ", "p50", "p99",
    "retries",
)  # fmt: skip


class Measures:
    """One engine and its measures, each a method of its name."""

    def __init__(
        self, model: str, mode: str, stage: str, out: Path, largest_graph: int, n_ranks: int
    ) -> None:
        import vllm

        self.vllm, self.model, self.mode, self.out = vllm, model, mode, out
        self.table = Table(out / f"{stage}-{model}-{mode}.csv", echo=False)
        self.audit = out / f"audit-{model}.txt"
        is_random = (SHAPES / model).is_dir()
        rows = FEWER_ROWS.get(model, 1024)
        graphs = [n for n in (*GRAPHS, *range(576, largest_graph + 1, 64)) if n <= rows]
        self.llm = vllm.LLM(
            str(SHAPES / model) if is_random else trained(model),
            load_format="dummy" if is_random else "auto",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=rows,
            max_model_len=2048,
            max_num_batched_tokens=8 * rows,
            gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=CACHE_BYTES[model],
            tensor_parallel_size=n_ranks,
            compilation_config={"cudagraph_capture_sizes": graphs},
        )
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
            prompts = [PROMPT] * batch
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
        draw = random.Random(0)
        prompts = [
            [draw.randrange(100, 10000) for _ in range(PREFILL_TOKENS)] for _ in range(PREFILL_ROWS)
        ]
        times = [self.timed(prompts, [1] * PREFILL_ROWS) for _ in range(5)][1:]
        self.add("prefill_s", batch=PREFILL_ROWS, value=statistics.median(times))
        return f"{statistics.median(times):.3f} s"

    def closed(self) -> str:
        """Requests of CLOSED_TOKENS, each sent when one has ended: tokens/s and latencies."""
        found = []
        for n in IN_FLIGHT:
            latencies, elapsed_s = self.closed_loop(n, 4 * n + 4)
            rate = len(latencies) * CLOSED_TOKENS / elapsed_s
            p50, p99 = (statistics.quantiles(latencies, n=100)[i] for i in (49, 98))
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
            places = draw.sample(range(batch), min(batch // 4, N_NEEDLES - len(found)))
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
        message = [{"role": "user", "content": "Tell me about Richard Feynman"}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def long(self) -> str:
        started = time.perf_counter()
        completions = self.generate([PROMPT] * N_REQUESTS, [1000] * N_REQUESTS)
        elapsed_s = time.perf_counter() - started
        found = bits(completions)
        self.add("long_s", batch=N_REQUESTS, value=elapsed_s, **found)
        return f"{elapsed_s:.1f} s, {found['unique']} unique"


def trained(model: str) -> str:
    """The directory of the trained model, converted from its package once."""
    from ndcheck.samplers.local.checkpoint.smollm2 import NAME, find_model

    assert model == NAME
    return str(find_model())


def fill(model: Any) -> None:
    """Random weights that follow each parameter's name and rank, so that every mode has the same.

    Ranks hold different ones: the sum of equal halves would be exact.
    """
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank

    rank = get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
            continue
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()) + rank)
        if "scale" in name:  # Of FP8 codes, which are drawn wider by as much.
            parameter.data.uniform_(1e-4, 3e-4, generator=generator)
            continue
        is_fp8 = parameter.dtype == torch.float8_e4m3fn
        values = parameter.data.to(torch.bfloat16) if is_fp8 else parameter.data
        values.normal_(0, 100 if is_fp8 else 0.02, generator=generator)
        if is_fp8:
            parameter.data.copy_(values)


def allocation_retries() -> int:
    """How often torch has freed all that it held because the GPU's memory was full."""
    import torch

    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def all_reduce_us(model: Any) -> dict[int, float]:
    """By rows: what a sum over all ranks takes, among SUMS in a row as vLLM captures them."""
    import torch
    from vllm.distributed import tensor_model_parallel_all_reduce
    from vllm.distributed.parallel_state import graph_capture

    where, found = next(model.parameters()).device, {}
    for rows in STEPS:
        x = torch.randn(rows, 4096, device=where, dtype=torch.bfloat16)
        tensor_model_parallel_all_reduce(x)
        graph = torch.cuda.CUDAGraph()
        with graph_capture(where) as context, torch.cuda.graph(graph, stream=context.stream):
            for _ in range(SUMS):
                tensor_model_parallel_all_reduce(x)
        times = []
        for _ in range(N_REPEATS + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / SUMS)
        found[rows] = statistics.median(times[2:])
    return found


def host_us(model: Any) -> dict[str, float]:
    """By N x K, what starting the product takes as vLLM starts it; the GPU is not waited for."""
    import torch

    found = {}
    for layer in model.model.layers[0].modules():
        if not hasattr(layer, "quant_method") or getattr(layer, "weight", None) is None:
            continue
        x = layer.weight.new_zeros(N_REQUESTS, layer.weight.shape[1])
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(20):
                layer.quant_method.apply(layer, x)
            times.append((time.perf_counter() - started) / 20)
        found["x".join(map(str, layer.weight.shape))] = min(times) * 1e6
    return found


def main() -> int:
    import os

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What vLLM prints goes to the log.
    model, mode, stage, out, largest_graph, n_ranks = sys.argv[1:]
    started = time.perf_counter()
    measures = Measures(model, mode, stage, Path(out), int(largest_graph), int(n_ranks))
    print(f"started in {time.perf_counter() - started:.0f} s", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = getattr(measures, line.strip())()
        except Exception as error:  # The other measures may still work.
            import traceback

            traceback.print_exc()
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
        measures.leave_room()
        print(answer, file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
