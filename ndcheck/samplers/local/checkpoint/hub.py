"""Whether the hub can be reached, asked once: its client asks again for most of a minute."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

from ndcheck.errors import UsageError
from ndcheck.samplers.local.checkpoint.files import ACCEPTED, CONFIG

WAIT_S = 2.0


def check_hub(model: str) -> None:
    """Before its client is imported: let it be offline where the hub does not answer.

    A model in its cache still loads then. Raises UsageError for another one, for a path where
    nothing is, and for what can be no hub id.
    """
    if Path(model).is_absolute() or model.startswith(("~", ".")) or model.count("/") > 1:
        raise UsageError(f"--model {model}: there is no such file or directory")
    is_silent = "HF_HUB_OFFLINE" not in os.environ and not _answers(_url())
    if is_silent:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, CONFIG)
    except HFValidationError as error:
        raise UsageError(
            f"--model {model}: there is no such file or directory, and it is no hub id {ACCEPTED}"
        ) from error
    if is_silent and not isinstance(cached, str):
        raise UsageError(
            f"--model {model}: there is no such directory, the hub's cache has no such model, "
            f"and {_url()} cannot be reached {ACCEPTED}"
        )


def _url() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@cache
def _answers(url: str) -> bool:
    """Names may take longer to look up than any timeout of a connection."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=WAIT_S).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(WAIT_S)
    return answered.is_set()
