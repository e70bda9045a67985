"""How each kind of API is asked for a completion, and how its events are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from ndcheck.plan.conversations import as_messages
from ndcheck.probe import Prompt
from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.answers.event_stream import Event
from ndcheck.samplers.endpoint.answers.events import Frame, read_generate, read_openai

Body = dict[str, Any]
_UNKNOWN = re.compile(
    r"not (?:supported|permitted|allowed)|unsupported|unknown|unrecogni[sz]ed|unexpected", re.I
)
OUTLASTING_TOKENS = 4
"""A filler is asked for so many tokens more than the probe, and an eighth of its own."""


class Dialect(Protocol):
    """One way to ask a server for a completion."""

    path: str
    least_tokens: int
    """A shorter limit is refused."""

    @property
    def optional(self) -> Mapping[str, Body]:
        """Fields that not every server takes, by what they are for; they are probed one by one."""

    def body(
        self,
        model: str,
        prompt: Prompt,
        max_tokens: int,
        decoding: Decoding,
        *,
        streamed: bool = True,
    ) -> Body:
        """The request, without optional fields.

        Probes are streamed, since only a stream shows when each token came. Fillers need it only
        where streams are all that shows the batch: events cost a server's front end more than the
        rest of a request.
        """

    def take_hint(self, message: str) -> bool:
        """Change the request as a refusal says; True if that is worth another try."""

    def read(self, event: Event) -> Frame:
        """What the event says. Raises RequestFailure for one of another shape."""


class Completions:
    """``/completions``: the prompt as it is."""

    path = "/completions"
    least_tokens = 1
    _logprobs: ClassVar[Body] = {"logprobs": 2}

    def __init__(self, *, sends_temperature: bool = True) -> None:
        self._sends_temperature = sends_temperature
        self._limit = "max_tokens"
        self._can_stream = True

    @property
    def optional(self) -> Mapping[str, Body]:
        usage = {"usage": {"stream_options": {"include_usage": True}}} if self._can_stream else {}
        return {
            "token ids": {"return_token_ids": True},
            "logprobs": self._logprobs,
            **usage,
            "seed": {"seed": 0},
            "ignore_eos": {"ignore_eos": True},
            "min_tokens": {"min_tokens": 1},
            "prompt logprobs": {"prompt_logprobs": 1},
        }

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
            **self._content(prompt),
            self._limit: max_tokens,
            **({"temperature": decoding.temperature} if self._sends_temperature else {}),
            "stream": streamed and self._can_stream,
        }

    def take_hint(self, message: str) -> bool:
        newer = "max_completion_tokens"
        is_meant = newer in message or (self._limit in message and _UNKNOWN.search(message))
        if is_meant and self._limit != newer:
            self._limit = newer
            return True
        # Not "upstream", which is what proxies call a server.
        if re.search(r"\bstream", message, re.IGNORECASE) and self._can_stream:
            self._can_stream = False
            return True
        return False

    def _content(self, prompt: Prompt) -> Body:
        return {"prompt": prompt}

    def read(self, event: Event) -> Frame:
        return read_openai(event)


class Chat(Completions):
    """``/chat/completions``: messages, in the server's chat template; a text is the user's."""

    path = "/chat/completions"
    _logprobs: ClassVar[Body] = {"logprobs": True, "top_logprobs": 2}

    def _content(self, prompt: Prompt) -> Body:
        return {"messages": as_messages(prompt)}


class Generate:
    """SGLang's own ``/generate``, which gives token ids."""

    path = "/generate"
    least_tokens = 1
    optional: Mapping[str, Body] = {
        "logprobs": {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": -1},
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
        parameters: Body = {"max_new_tokens": max_tokens}
        if self._sends_temperature:
            parameters["temperature"] = decoding.temperature
        return {"text": prompt, "sampling_params": parameters, "stream": streamed}

    def take_hint(self, message: str) -> bool:
        return False

    def read(self, event: Event) -> Frame:
        return read_generate(event)


def outlasting(n_tokens: int) -> int:
    """How many tokens a filler is asked for, so that it is there until a probe has all of its."""
    return n_tokens + OUTLASTING_TOKENS + n_tokens // 8
