"""OpenAI's Responses API, for a server that offers nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from ndcheck.plan.conversations import as_messages
from ndcheck.probe import Prompt
from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.answers import beside
from ndcheck.samplers.endpoint.answers.dialects import Body
from ndcheck.samplers.endpoint.answers.event_stream import Event
from ndcheck.samplers.endpoint.answers.events import (
    Frame,
    as_count,
    as_dict,
    as_fact,
    as_list,
    as_text,
    read_end,
    read_entries,
    read_served,
)

ENDS = ("completed", "incomplete", "failed", "cancelled")


class Responses:
    """``/responses``: messages, of which each answer is kept apart from the others."""

    path = "/responses"
    least_tokens = 16
    optional: Mapping[str, Body] = {
        "logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    }

    def __init__(self, *, sends_temperature: bool = True) -> None:
        self._sends_temperature = sends_temperature

    def body(
        self,
        model: str,
        prompt: Prompt,
        max_tokens: int,
        decoding: Decoding,
        *,
        streamed: bool = True,
    ) -> Body:
        return {
            "model": model,
            "input": as_messages(prompt),
            "max_output_tokens": max(max_tokens, self.least_tokens),
            **({"temperature": decoding.temperature} if self._sends_temperature else {}),
            "stream": streamed,
        }

    def take_hint(self, message: str) -> bool:
        return False

    def read(self, event: Event) -> Frame:
        """An event of the stream, or a whole response. Raises RequestFailure for a broken one."""
        frame = Frame()
        kind = str(event.get("type"))
        if kind.startswith("response.") and kind.endswith(".delta"):  # Of text, reasoning, calls.
            frame.text = as_text(event.get("delta"))
            if "reasoning" in kind:
                frame.beside["reasoning"] = frame.text
            read_entries(as_list(event.get("logprobs")), frame)
        elif kind == "response.output_item.added":
            frame.text = as_text(as_dict(event.get("item")).get("name"))
        response = as_dict(event.get("response"))
        if event.get("object") == "response":
            response = event
            for item in map(as_dict, as_list(event.get("output"))):
                _read_item(item, frame)
        for item in map(as_dict, as_list(response.get("output"))):
            beside.add(frame.beside, beside.unread(item))
        frame.response_id = as_fact(response.get("id"))
        frame.served = read_served(response)
        usage = as_dict(response.get("usage"))
        frame.n_prompt_tokens = as_count(usage.get("input_tokens")) or None
        frame.n_tokens = as_count(usage.get("output_tokens")) or None
        details = as_dict(usage.get("input_tokens_details"))
        frame.n_cached_tokens = as_count(details.get("cached_tokens"))
        details = as_dict(usage.get("output_tokens_details"))
        frame.n_reasoning_tokens = as_count(details.get("reasoning_tokens"))
        if response.get("status") in ENDS:
            reason = as_dict(response.get("incomplete_details")).get("reason")
            failure = as_dict(response.get("error"))
            read_end({**failure, "type": reason or response["status"]}, frame)
        return frame


def _read_item(item: Event, frame: Frame) -> None:
    frame.text += as_text(item.get("name"))
    for part in map(as_dict, (*as_list(item.get("summary")), *as_list(item.get("content")))):
        frame.text += as_text(part)
        if item.get("type") == "reasoning":
            beside.add(frame.beside, {"reasoning": as_text(part)})
        read_entries(as_list(part.get("logprobs")), frame)
    frame.text += "".join(as_text(item.get(name)) for name in ("arguments", "input", "code"))
