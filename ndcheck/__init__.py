"""ndcheck measures, explains, fixes and gates nondeterminism in LLM inference.

From Python: `ndcheck.measure("model", prompt="...")` returns an `ndcheck.Run`;
`ndcheck.testing` has assertions for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndcheck.api import Run, measure

__all__ = ["Run", "__version__", "measure"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the API when it is used: the command line starts without it."""
    if name in ("Run", "measure"):
        from ndcheck import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
