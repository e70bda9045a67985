"""Secrets that go with requests: from the environment or a file, never into an artifact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.records import Endpoint
from ndcheck.samplers.endpoint.private import parse_extra_body
from ndcheck.samplers.endpoint.redaction import MASK
from ndcheck.samplers.options import recorded_object
from ndcheck.storage.reading import read_text

KEY_VARIABLES = ("NDCHECK_API_KEY", "OPENAI_API_KEY")


def request_headers(endpoint: Endpoint, headers: Mapping[str, str]) -> dict[str, str]:
    """``headers`` as given on the command line, and the API key as a bearer token.

    Raises UsageError if a header that the run was begun with is missing, or the key is unusable.
    """
    missing = [name for name in endpoint.header_names if name not in headers]
    if missing:
        raise UsageError(
            f"this run sends a header {missing[0]!r}, whose value is not recorded: give it again "
            f"with --header '{missing[0]}: VALUE'"
        )
    key = _read_key(endpoint.api_key_file)
    if key is None or any(name.lower() == "authorization" for name in headers):
        return dict(headers)
    if not key.isascii() or not key.isprintable():
        raise UsageError("the API key holds characters that no HTTP header can carry")
    return {**headers, "Authorization": f"Bearer {key}"}


def request_query(endpoint: Endpoint, query: Mapping[str, str]) -> dict[str, str]:
    """What goes into every address: ``query`` as given, else as recorded.

    Raises UsageError where the run was begun with one whose value is not recorded, nor given.
    """
    recorded = dict(item.partition("=")[::2] for item in endpoint.query)
    missing = [name for name, value in recorded.items() if not (value or name in query)]
    if missing:
        raise UsageError(
            f"this run sends a query {missing[0]!r}, whose value is not recorded: give it again "
            f"with --query '{missing[0]}=VALUE'"
        )
    return {**recorded, **query}


def request_body(endpoint: Endpoint, extra_body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that go with every request: as given, else as recorded.

    Raises UsageError where the record has a mask instead of a secret, or is damaged.
    """
    if extra_body or endpoint.extra_body is None:
        return dict(extra_body)
    fields = recorded_object("--extra-body", endpoint.extra_body)
    if MASK in endpoint.extra_body:
        raise UsageError(
            "this run sends a secret in --extra-body, which is not recorded: give it again"
        )
    return parse_extra_body(fields)


def _read_key(file: str | None) -> str | None:
    if file is None:
        # What keeps secrets often ends them with a newline.
        held = (os.environ.get(name, "").strip() for name in KEY_VARIABLES)
        return next(filter(None, held), None)
    try:
        key = read_text(Path(file)).strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--api-key-file {file}: {reason}") from error
    if not key:
        raise UsageError(f"--api-key-file {file}: it is empty")
    return key
