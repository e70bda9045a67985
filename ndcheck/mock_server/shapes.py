"""The JSON that each kind of server sends."""

from __future__ import annotations

import json
import zlib
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


def chunk(flavour: str, chat: bool, tokens: list[Token], fields: Json) -> Json:
    """A choice with some tokens and the optional fields that were asked for and are known."""
    text = "".join(token.text for token in tokens)
    part = "delta" if fields.get("stream") else "message"
    choice: Json = {"index": 0, **({part: {"content": text}} if chat else {"text": text})}
    choice["finish_reason"] = None
    if fields.get("return_token_ids") and flavour == "vllm":
        choice["token_ids"] = [token.token_id for token in tokens]
    if fields.get("logprobs") and flavour != "text":
        choice["logprobs"] = _logprobs(flavour, chat, tokens)
    return choice


def prompt_ids(flavour: str, prompt: str, fields: Json) -> Json:
    """What a choice holds besides at its beginning, where the prompt's ids were asked for."""
    if flavour != "vllm" or not fields.get("return_token_ids"):
        return {}
    return {"prompt_token_ids": [zlib.crc32(word.encode()) >> 16 for word in prompt.split()]}


def frame(choices: list[Json], fingerprint: str, counts: Json | None = None) -> Json:
    """An event, or a whole answer."""
    document: Json = {"choices": choices, "system_fingerprint": fingerprint}
    return document if counts is None else {**document, "usage": counts}


def _logprobs(flavour: str, chat: bool, tokens: list[Token]) -> Json:
    if not chat and flavour == "vllm":
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{t.text: t.logprob, "<other>": t.logprob - t.margin} for t in tokens],
        }
    entries: list[Json] = []
    for token in tokens:
        other = {"token": "", "logprob": token.logprob - token.margin}
        top = [{"token": token.text, "logprob": token.logprob}, other]
        entries.append({"token": token.text, "logprob": token.logprob, "top_logprobs": top})
        if flavour == "llama.cpp":
            entries[-1]["id"] = token.token_id
    return {"content": entries}


def usage(n_prompt: int, n_tokens: int, n_cached: int) -> Json:
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_tokens,
        "total_tokens": n_prompt + n_tokens,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def generated(tokens: list[Token], max_tokens: int, counts: Json) -> Json:
    """SGLang's answer to ``/generate``, and with ``return_logprob``; streamed, the one so far."""
    is_end = len(tokens) == max_tokens
    return {
        "text": "".join(token.text for token in tokens),
        "output_ids": [token.token_id for token in tokens],
        "meta_info": {
            "finish_reason": {"type": "length", "length": len(tokens)} if is_end else None,
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
