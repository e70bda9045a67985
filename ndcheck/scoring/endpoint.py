"""Scoring by a server: the log-probabilities of a prompt given as token ids.

vLLM answers ``prompt_logprobs`` of ``/v1/completions`` for a list of ids, SGLang ``return_logprob``
with ``logprob_start_len`` 0 of ``/generate`` for ``input_ids``. llama.cpp's server has nothing like
it (its issues 8942 and 27174), nor have hosted APIs.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ndcheck.errors import BackendError, UsageError
from ndcheck.records import Endpoint, RunSpec
from ndcheck.samplers.endpoint.answers.event_stream import Event, RequestFailure
from ndcheck.samplers.endpoint.answers.events import as_dict, as_list
from ndcheck.samplers.endpoint.capabilities import BUSY
from ndcheck.samplers.endpoint.credentials import request_headers, request_query
from ndcheck.samplers.endpoint.identity import identify
from ndcheck.samplers.endpoint.private import Private, query_secrets
from ndcheck.samplers.endpoint.transport import Transport
from ndcheck.samplers.event_loop import EventLoop
from ndcheck.scoring.completions import TokenIds
from ndcheck.scoring.scorers import Score, checked

FIRST_PAUSE_S = 0.5
BYTES_PER_TOKEN = 4096
BYTES_PER_ANSWER = 1 << 20
GIVES_NONE = (
    "it gives no log-probabilities of a prompt of token ids (vLLM's and SGLang's servers do): "
    "score with --model or --engine vllm instead"
)


class EndpointScorer:
    """The server of ``spec.endpoint``, asked for one completion at a time."""

    def __init__(self, spec: RunSpec, endpoint: Endpoint, private: Private) -> None:
        self._model = spec.model
        self._endpoint = endpoint
        self._loop = EventLoop()
        self._run = self._loop.run
        query = request_query(endpoint, private.query)
        self._transport = Transport(
            endpoint.url,
            request_headers(endpoint, private.headers),
            endpoint.timeout_s,
            query,
            tuple(query_secrets(query, endpoint.query)),
        )
        self._where = f"--endpoint {self._transport.base}"
        try:
            identity = self._run(identify(self._transport, spec.model))
        except RequestFailure as failure:
            self.close()
            raise BackendError(f"{self._where}: {failure}") from failure
        self._is_sglang = identity.server == "SGLang"
        version = f" {identity.version}" if identity.version else ""
        self.title = f"{spec.model} in {identity.server}{version} at {self._transport.base}"

    def score(self, prompt_ids: TokenIds, token_ids: TokenIds) -> Score:
        ids = (*prompt_ids, *token_ids)
        try:
            event = self._run(self._ask(ids))
        except RequestFailure as failure:
            is_refusal = failure.status is not None and 400 <= failure.status < 500
            if is_refusal and failure.status not in BUSY:
                raise UsageError(f"{self._where}: {failure}; {GIVES_NONE}") from failure
            raise BackendError(f"{self._where}: {failure}") from failure
        read = _read_sglang if self._is_sglang else _read_vllm
        entries = read(event, ids)
        if entries is None:
            raise UsageError(f"{self._where}: {GIVES_NONE}")
        scored = entries[len(prompt_ids) :]
        ranks = [rank for _, rank in scored]
        known = [] if None in ranks else ranks
        return checked([logprob for logprob, _ in scored], known, token_ids, self._where)

    def close(self) -> None:
        self._run(self._transport.close())
        self._loop.close()

    async def _ask(self, ids: TokenIds) -> Event:
        """The whole answer, after retries of what may succeed later. Raises RequestFailure."""
        url, body = (
            f"{self._transport.base}/completions",
            {
                "model": self._model,
                "prompt": ids,
                "max_tokens": 1,
                "temperature": 0,
                # 1 and not 0, which some versions take for none.
                "prompt_logprobs": 1,
            },
        )
        if self._is_sglang:
            url, body = (
                f"{self._transport.root}/generate",
                {
                    "input_ids": ids,
                    "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                    "return_logprob": True,
                    "logprob_start_len": 0,
                },
            )
        most_bytes = BYTES_PER_ANSWER + BYTES_PER_TOKEN * len(ids)
        events: list[Event] = []
        for n_tried in range(self._endpoint.n_retries + 1):
            events.clear()
            try:
                await self._transport.stream(
                    url, body, most_bytes, lambda event, _: events.append(event)
                )
            except RequestFailure as failure:
                pause_s = FIRST_PAUSE_S * 2**n_tried
                if failure.retry_after_s is not None:
                    pause_s = failure.retry_after_s
                is_last = n_tried == self._endpoint.n_retries
                if is_last or not failure.is_temporary or pause_s > self._endpoint.timeout_s:
                    raise
                await asyncio.sleep(pause_s)
            else:
                break
        return events[0] if events else {}


Entry = tuple[Any, Any]
"""A token's log-probability and its rank or None, as the server says them."""


def _read_vllm(event: Event, ids: TokenIds) -> list[Entry] | None:
    """An entry for each id. None where the answer has none of this kind.

    Raises BackendError where they are of other tokens.
    """
    choice = as_dict(next(iter(as_list(event.get("choices"))), None))
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        return None
    _require(len(entries) == len(ids), "another number of tokens than it was given")
    found: list[Entry] = [(None, None)]
    for token_id, entry in zip(ids[1:], entries[1:], strict=True):
        of_token = as_dict(as_dict(entry).get(str(token_id)))
        _require("logprob" in of_token, f"no log-probability of token id {token_id}")
        found.append((of_token["logprob"], of_token.get("rank")))
    return found


def _read_sglang(event: Event, ids: TokenIds) -> list[Entry] | None:
    """The same of ``[logprob, id, text]``."""
    entries = as_dict(event.get("meta_info")).get("input_token_logprobs")
    if not isinstance(entries, list):
        return None
    _require(len(entries) == len(ids), "another number of tokens than it was given")
    triples = [[*as_list(entry), None, None] for entry in entries]
    for token_id, triple in zip(ids, triples, strict=True):
        _require(triple[1] == token_id, f"other tokens than it was given: no {token_id}")
    return [(triple[0], None) for triple in triples]


def _require(is_fine: bool, words: str) -> None:
    if not is_fine:
        raise BackendError(f"the server scored {words}")
