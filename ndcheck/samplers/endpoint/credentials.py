"""Secrets that go with requests: from the environment or a file, never into an artifact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ndcheck.errors import UsageError
from ndcheck.records import Endpoint
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


def _read_key(file: str | None) -> str | None:
    if file is None:
        return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    try:
        key = read_text(Path(file)).strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--api-key-file {file}: {reason}") from error
    if not key:
        raise UsageError(f"--api-key-file {file}: it is empty")
    return key
