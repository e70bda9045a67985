"""Under which name models and their layers take the cache: each release has its own."""

import inspect
from collections.abc import Callable
from typing import Any

# Since transformers 5.24; before it with attention, and of Mamba's kind; in some layers of both.
_NAMES = ("cache", "past_key_values", "cache_params", "layer_past")


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name under which ``forward`` takes its cache. Raises ValueError if it takes none."""
    accepted = inspect.signature(forward).parameters
    for name in _NAMES:
        if name in accepted:
            return name
    raise ValueError(f"takes none of {', '.join(_NAMES)}")


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among what a layer was called with; None without one.

    Any name will do: a model that is not of transformers may call its layers as another release.
    """
    return next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)
