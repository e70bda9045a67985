"""The faults that the mock server can be told to have, and the kinds of server it can imitate."""

from __future__ import annotations

FAULTS: dict[str, str] = {
    "none": "every completion equal, every bit equal",
    "concurrency": "forks where more than one request runs",
    "latent": "one logprob off by one unit in the last place where more than one request runs",
    "cache": "forks where the prompt was in the prefix cache",
    "replica": "1 of 3 replicas forks",
    "never-batches": "runs one request at a time, however many are sent",
    "rate-limit": "answers 429",
    "error": "answers 500",
    "html": "answers 502 with an HTML page",
    "redirect": "redirects to another host",
    "stall": "stops in the middle of a stream and keeps the connection open",
    "slow-loris": "sends a stream byte by byte, a second apart",
    "truncate": "ends the stream before the completion ends",
    "token-count": "usage counts one token more than was sent",
    "short": "ends at the limit with fewer tokens than asked for",
    "huge": "sends a body of 10 MB",
    "utf8": "sends bytes that are not UTF-8",
    "repeat-key": "answers 400 and repeats the Authorization header",
    "fingerprint": "answers under another system_fingerprint",
    "reset": "closes the connection without an answer",
}
"""What happens to a request that the fault strikes."""

STREAM_FAULTS = frozenset({"concurrency", "latent", "cache", "replica", "never-batches", "none"})
"""These follow from what runs together; the others strike by the number of the request."""

FLAVOURS = {
    "vllm": "token ids, logprobs, cache_salt, vllm:num_requests_running",
    "sglang": "/generate with output_ids, flush_cache, sglang:num_running_reqs",
    "llama.cpp": "ids in chat-shaped logprobs, cache_prompt, llamacpp:requests_processing",
    "hosted": "chat alone with max_completion_tokens, logprob tokens without ids, no metrics",
    "text": "text alone, refuses unknown fields, no metrics (like transformers serve)",
}
