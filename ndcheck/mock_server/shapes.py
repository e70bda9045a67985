"""The JSON that each kind of server sends."""

from __future__ import annotations

import json
from typing import Any

from ndcheck.mock_server.engine import Token

Json = dict[str, Any]
MODEL = "mock"
VERSION = "1.0-mock"
GAUGES = {
    "vllm": 'vllm:num_requests_running{{engine="0",model_name="mock"}} {}.0',
    "sglang": 'sglang:num_running_reqs{{model_name="mock"}} {}.0',
    "llama.cpp": "llamacpp:requests_processing {}",
}


def chunk(flavour: str, chat: bool, token: Token, fields: Json, fingerprint: str) -> Json:
    """One streamed token with the optional fields that were asked for and are known."""
    text = {"delta": {"content": token.text}} if chat else {"text": token.text}
    choice: Json = {"index": 0, **text, "finish_reason": None}
    if fields.get("return_token_ids") and flavour == "vllm":
        choice["token_ids"] = [token.token_id]
    if fields.get("logprobs") and flavour != "text":
        choice["logprobs"] = _logprobs(flavour, chat, token)
    return {"object": "text_completion", "choices": [choice], "system_fingerprint": fingerprint}


def _logprobs(flavour: str, chat: bool, token: Token) -> Json:
    runner_up = token.logprob - token.margin
    if not chat and flavour == "vllm":
        return {
            "tokens": [token.text],
            "token_logprobs": [token.logprob],
            "top_logprobs": [{token.text: token.logprob, "<other>": runner_up}],
        }
    top = [{"token": token.text, "logprob": token.logprob}, {"token": "", "logprob": runner_up}]
    entry: Json = {"token": token.text, "logprob": token.logprob, "top_logprobs": top}
    if flavour == "llama.cpp":
        entry["id"] = token.token_id
    return {"content": [entry]}


def last_chunk(chat: bool, reason: str, fingerprint: str) -> Json:
    text: Json = {"delta": {}} if chat else {"text": ""}
    choice = {"index": 0, **text, "finish_reason": reason}
    return {"object": "text_completion", "choices": [choice], "system_fingerprint": fingerprint}


def usage(n_prompt: int, n_tokens: int, n_cached: int) -> Json:
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_tokens,
        "total_tokens": n_prompt + n_tokens,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def generated(tokens: list[Token], counts: Json) -> Json:
    """SGLang's answer to ``/generate``, and with ``return_logprob``."""
    return {
        "text": "".join(token.text for token in tokens),
        "output_ids": [token.token_id for token in tokens],
        "meta_info": {
            "finish_reason": {"type": "length", "length": len(tokens)},
            "prompt_tokens": counts["prompt_tokens"],
            "completion_tokens": counts["completion_tokens"],
            "cached_tokens": counts["prompt_tokens_details"]["cached_tokens"],
            "output_token_logprobs": [[t.logprob, t.token_id, None] for t in tokens],
            "output_top_logprobs": [
                [[t.logprob, t.token_id, None], [t.logprob - t.margin, 0, None]] for t in tokens
            ],
        },
    }


def page(flavour: str, path: str, n_running: int) -> tuple[str, bytes] | None:
    """Content type and body of what a GET finds; None for 404."""
    if path == "/metrics" and flavour in GAUGES:
        return "text/plain", (GAUGES[flavour].format(n_running) + "\n").encode()
    documents: dict[str, Json] = {"/health": {"status": "ok"}, "/flush_cache": {}}
    entry: Json = {"id": MODEL, "object": "model", "owned_by": flavour}
    if flavour == "vllm":
        entry["max_model_len"] = 4096
        documents["/version"] = {"version": VERSION}
    if flavour == "llama.cpp":
        documents["/props"] = {
            "build_info": VERSION,
            "model_path": MODEL,
            "default_generation_settings": {"n_ctx": 4096},
        }
    if flavour == "sglang":
        documents["/server_info"] = {"version": VERSION, "model_path": MODEL}
    documents["/v1/models"] = {"object": "list", "data": [entry]}
    found = documents.get(path)
    return None if found is None else ("application/json", json.dumps(found).encode())
