"""A stand-in for vLLM: the parts that ndcheck uses, with planted faults named in FAKE_VLLM.

Tokens are a hash of the prompt and those before, so every row's stream is its own.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

from vllm import envs
from vllm.sampling_params import SamplingParams

__version__ = "0.26.0+fake"
FAULT = os.environ.get("FAKE_VLLM", "clean")
BLOCK_SIZE = 4
VOCABULARY = 4096


@dataclass
class EngineArgs:
    model: str = ""
    dtype: str = "auto"
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 8192
    max_model_len: int = 400
    enable_prefix_caching: bool = False
    enforce_eager: bool = False
    gpu_memory_utilization: float = 0.9

    def create_engine_config(self):
        if self.max_model_len < 1:
            raise ValueError("1 validation error for ModelConfig\n  max_model_len is negative")
        if not isinstance(self.gpu_memory_utilization, float):
            raise ValueError("1 validation error for CacheConfig\n  gpu_memory_utilization")


@dataclass
class Request:
    name: str
    prompt: list[int]
    params: SamplingParams
    n_cached: int
    n_computed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)


class Scheduler:
    def __init__(self, args):
        self.max_num_scheduled_tokens = args.max_num_batched_tokens
        self.config = SimpleNamespace(long_prefill_token_threshold=0)
        self.most_running = 2 if FAULT == "queues" else args.max_num_seqs
        self.running, self.waiting = [], []
        self.n_passes = 0

    def get_request_counts(self):
        return len(self.running), len(self.waiting)

    def schedule(self):
        self.n_passes += 1
        preempted = set()
        if FAULT == "preempts" and self.n_passes % 7 == 0 and len(self.running) > 1:
            self.waiting.insert(0, self.running.pop())
            preempted = {self.waiting[0].name}
        while self.waiting and len(self.running) < self.most_running and not preempted:
            self.running.append(self.waiting.pop(0))
        budget, scheduled = self.max_num_scheduled_tokens, {}
        rows = self.running
        if FAULT == "splits" and len(rows) > 1:
            rows = rows[self.n_passes % 2 :: 2]
        for request in rows:
            n = max(1, len(request.prompt) - request.n_computed)
            limit = self.config.long_prefill_token_threshold
            if limit and FAULT != "ignores-chunks":
                n = min(n, limit)
            n = n if FAULT == "ignores-chunks" else min(n, budget)
            if n > 0:
                scheduled[request.name] = n
                budget -= n
        return SimpleNamespace(num_scheduled_tokens=scheduled, preempted_req_ids=preempted)


class CoverageError(RuntimeError):
    """By the name of what ndcheck's plug-in raises."""


class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        if FAULT == "uncovered" and os.environ["NDCHECK_VLLM"] == "strict":
            raise CoverageError("ndcheck: nothing covers layers.0.mixer (Mixer: nothing)")
        print("a line that the engine prints, which is no JSON")  # noqa: T201
        if FAULT == "no-memory" and args.gpu_memory_utilization < 0.6:
            raise ValueError("No available memory for the cache blocks")
        return cls(args)

    def __init__(self, args):
        self.scheduler = Scheduler(args)
        core = {} if FAULT == "hides-its-scheduler" else {"scheduler": self.scheduler}
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(**core))
        n_tokens = int(
            (2000 if FAULT == "small-cache" else 1_000_000) * args.gpu_memory_utilization
        )
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                dtype="torch.bfloat16",
                max_model_len=args.max_model_len,
                get_vocab_size=lambda: VOCABULARY,
            ),
            device_config=SimpleNamespace(device_type="cpu"),
            cache_config=SimpleNamespace(
                block_size=BLOCK_SIZE, num_gpu_blocks=n_tokens // BLOCK_SIZE
            ),
            scheduler_config=self.scheduler.config,
            compilation_config=SimpleNamespace(cudagraph_mode="CUDAGraphMode.NONE"),
        )
        self.caches = args.enable_prefix_caching
        self.cached = set()
        self.n_trials = 0

    def collective_rpc(self, method):
        """The plug-in's answer, where it is in place: with ``covered`` and ``uncovered``."""
        if FAULT not in ("covered", "uncovered") or os.environ["NDCHECK_VLLM"] == "0":
            raise NotImplementedError(f"Method {method!r} is not implemented.")
        if FAULT == "uncovered":
            return [{"by": "vllm", "reason": "nothing covers layers.0.mixer", "version": "1.2"}]
        return [{"by": "ndcheck", "reason": None, "version": "1.2"}]

    def reset_prefix_cache(self):
        if FAULT != "stays-warm":
            self.cached.clear()
        return True

    def add_request(self, name, prompt, params):
        self.n_trials += name.endswith("-0")
        if FAULT == "dies" and self.n_trials > 9:
            print("the engine says why it dies", flush=True)  # noqa: T201
            os._exit(7)
        if FAULT == "raises" and self.n_trials > 9:
            raise RuntimeError("CUDA error: an illegal memory access")
        prompt = list(prompt["prompt_token_ids"])
        n_cached = 0
        if self.caches and (not params.skip_reading_prefix_cache or FAULT == "stays-warm"):
            while tuple(prompt[: n_cached + BLOCK_SIZE]) in self.cached and (
                n_cached + BLOCK_SIZE < len(prompt)
            ):
                n_cached += BLOCK_SIZE
        self.scheduler.waiting.append(
            Request(f"{name}-internal", prompt, params, n_cached, n_cached)
        )
        return f"{name}-internal"

    def abort_request(self, names):
        self.scheduler.running = [
            r for r in self.scheduler.running if r.name.removesuffix("-internal") not in names
        ]

    def has_unfinished_requests(self):
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self):
        if FAULT == "slow":
            time.sleep(0.01)
        scheduled = self.scheduler.schedule().num_scheduled_tokens
        done = []
        for request in list(self.scheduler.running):
            request.n_computed += scheduled.get(request.name, 0)
            if request.name not in scheduled or request.n_computed < len(request.prompt):
                continue
            beside = [n for name, n in scheduled.items() if name != request.name]
            self._add_token(request, len(scheduled), max(beside, default=0))
            for end in range(BLOCK_SIZE, len(request.prompt) + 1, BLOCK_SIZE):
                self.cached.add(tuple(request.prompt[:end]))
            n_wanted = request.params.max_tokens - (FAULT == "ends-early" and len(scheduled) > 1)
            if len(request.token_ids) == n_wanted:
                self.scheduler.running.remove(request)
                done.append(self._output(request))
        return done

    def _add_token(self, request, n_rows, longest_beside):
        t = len(request.token_ids)
        token_id, logprob = _best_token([*request.prompt, *request.token_ids])
        # As FlashAttention 3's blocks of keys follow the longest query (vllm-project/vllm#51902).
        is_mixed = t > 0 and longest_beside > 1
        if FAULT == "mixed-dependent" and is_mixed and not envs.VLLM_BATCH_INVARIANT:
            logprob -= 1 / 1024
        if FAULT == "batch-dependent" and n_rows > 1 and t >= 3 and not envs.VLLM_BATCH_INVARIANT:
            token_id += 1
        candidates = {token_id: logprob, token_id + 7: -5.0}
        if FAULT == "wrong-ids" and n_rows > 1:
            token_id += 3
        request.token_ids.append(token_id)
        request.logprobs.append({k: SimpleNamespace(logprob=v) for k, v in candidates.items()})

    def _output(self, request):
        prompt = request.prompt[::-1] if FAULT == "wrong-prompt" else request.prompt
        return SimpleNamespace(
            finished=True,
            request_id=request.name.removesuffix("-internal"),
            prompt_token_ids=prompt,
            num_cached_tokens=request.n_cached,
            prompt_logprobs=_score(prompt) if request.params.prompt_logprobs is not None else None,
            outputs=[SimpleNamespace(token_ids=request.token_ids, logprobs=request.logprobs)],
        )


def _best_token(ids):
    """The likeliest token after these, and its log-probability."""
    seed = hashlib.sha256(f"{ids}".encode()).digest()
    return 100 + seed[0], -0.5 - seed[1] / 64


def _score(prompt):
    scored = [None]
    for i in range(1, len(prompt)):
        best, logprob = _best_token(prompt[:i])
        rank = 1
        if prompt[i] != best:
            rank, logprob = 3, -20.0 - prompt[i] / 64
        if FAULT == "scores-nan" and i == len(prompt) - 1:
            logprob = math.nan
        if FAULT == "scores-differ" and not envs.VLLM_BATCH_INVARIANT:
            logprob -= 1 / 1024
        scored.append({prompt[i]: SimpleNamespace(logprob=logprob, rank=rank)})
    return scored[: 1 if FAULT == "scores-none" else None]
