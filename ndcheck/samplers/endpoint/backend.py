"""``--endpoint URL``: a running server, through its OpenAI API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from ndcheck.errors import UsageError
from ndcheck.plan.arrivals import parse_arrivals, with_clock
from ndcheck.records import Arm, Endpoint, Fillers, RunSpec
from ndcheck.samplers.backend import Backend
from ndcheck.samplers.endpoint.private import Private, recorded_body, recorded_query
from ndcheck.samplers.options import (
    ARRIVALS,
    DEFAULTS,
    KERNELS,
    SCHEDULED,
    SCHEDULED_AXES,
    Option,
    choice,
    join,
    parse_arms,
)
from ndcheck.storage.reading import is_unicode

if TYPE_CHECKING:
    from ndcheck.samplers.base import Sampler

BLANK = Endpoint("")
SERVERS_OWN = "with --endpoint this is the server's own to choose"


def parse_served_arms(arms: str | Sequence[str] | None) -> tuple[Arm, ...]:
    """A served model has one arm, whatever it is. Raises UsageError where another is asked for."""
    if parse_arms(arms or ("stock",)) != ("stock",):
        raise UsageError(f"--kernels {join(arms or ())}: {SERVERS_OWN}")
    return ("stock",)


class EndpointBackend(Backend):
    title = "a server"
    chosen_by = "--endpoint URL"
    own = (
        Option("endpoint", ("endpoint.url",), None, has_variable=True, needs_trust=bool),
        Option(
            "api_key_file",
            ("endpoint.api_key_file",),
            BLANK.api_key_file,
            lambda path: None if path is None else str(path),
            needs_trust=bool,
        ),
        # The values are not known: their names show what to fill in.
        Option(
            "header",
            ("endpoint.header_names",),
            None,
            show=lambda name: f"{name}: VALUE",
            repeats=True,
            needs_trust=bool,
        ),
        Option(
            "query",
            ("endpoint.query",),
            (),
            recorded_query,
            lambda item: item if "=" in item else f"{item}=VALUE",
            repeats=True,
            needs_trust=bool,
        ),
        Option("extra_body", ("endpoint.extra_body",), None, recorded_body, needs_trust=bool),
        Option("no_temperature", ("endpoint.omits_temperature",), BLANK.omits_temperature),
        Option(
            "stop",
            ("endpoint.stop",),
            (),
            lambda texts: (texts,) if isinstance(texts, str) else tuple(texts),
            repeats=True,
        ),
        Option("fillers", ("endpoint.fillers",), BLANK.fillers, choice("--fillers", Fillers)),
        Option("timeout", ("endpoint.timeout_s",), BLANK.timeout_s, show=lambda s: f"{s:g}"),
        Option("retries", ("endpoint.n_retries",), BLANK.n_retries),
        replace(
            ARRIVALS,
            fields=("endpoint.arrival",),
            parse=lambda text: (
                BLANK.arrival if text is None else parse_arrivals(text, "s").recorded
            ),
            show=lambda text: with_clock(text, "s"),
        ),
        replace(KERNELS, parse=parse_served_arms),
        SCHEDULED,
    )
    refusal = SERVERS_OWN
    refusals: ClassVar = {
        "engine": "with --endpoint the server has its engine already; give one of the two",
        "chat_template_kwargs": "with --endpoint give --extra-body "
        "'{\"chat_template_kwargs\": {...}}', where the server takes it",
    }
    opening = "probing"
    is_remote = True

    def is_chosen(self, model: str, engine: str, *, is_served: bool) -> bool:
        return is_served

    def blank(self, defaults: RunSpec) -> RunSpec:
        return replace(defaults, endpoint=BLANK, arms=("stock",), axes=SCHEDULED_AXES)

    def check_given(self, typed: Mapping[str, Any]) -> None:
        if typed["no_temperature"] and typed["temperature"]:
            raise UsageError("--no-temperature: it leaves out what --temperature gives: choose one")

    def check(self, spec: RunSpec) -> None:
        endpoint = spec.endpoint or BLANK
        _check_address(endpoint.url)
        parse_arrivals(endpoint.arrival, "s")
        if not 0 < endpoint.timeout_s < float("inf"):
            raise UsageError(f"--timeout {endpoint.timeout_s}: give a positive number of seconds")
        if endpoint.n_retries < 0:
            raise UsageError(f"--retries {endpoint.n_retries}: give 0 or more")
        if not all(text and is_unicode(text) for text in endpoint.stop):
            raise UsageError("--stop: give a text that is valid UTF-8 and not empty")
        if spec.model == DEFAULTS.model:
            raise UsageError("--endpoint: give the name of a served model as --model")
        if not spec.batch_sizes:
            raise UsageError(
                "--loads auto: with --endpoint the memory is the server's: give numbers"
            )

    def open(
        self,
        spec: RunSpec,
        *,
        load_weights: bool,
        private: Private,
        say: Callable[[str], None],
    ) -> Sampler:
        from ndcheck.samplers.endpoint.sampler import EndpointSampler

        return EndpointSampler(spec, spec.endpoint or BLANK, private, say)

    def unseen(self, spec: RunSpec) -> str | None:
        url = (spec.endpoint or BLANK).url
        return f"{spec.model} runs at {url}: no op can be seen there"

    def arrivals(self, spec: RunSpec) -> str | None:
        return with_clock((spec.endpoint or BLANK).arrival, "s")


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        has_secret = bool("@" in url or parts.query or parts.fragment)
        is_address = is_address and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = has_secret = False
    if has_secret:
        raise UsageError(
            "--endpoint: leave out user, password and query, which would be recorded: give a key "
            "in NDCHECK_API_KEY or with --api-key-file, other secrets with --header, a query with "
            "--query"
        )
    if not is_address or not url.isprintable() or " " in url:
        # Not repeated: an address that cannot be read may hold a password anywhere.
        raise UsageError(
            "--endpoint: give the address of an OpenAI API, such as http://127.0.0.1:8000/v1"
        )
