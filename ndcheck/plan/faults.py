"""Where in a completion the control's fault is planted."""

from __future__ import annotations

from ndcheck.records import Fault


def plant_fault(n_tokens: int) -> Fault | None:
    """The control's fault, within a reference completion of ``n_tokens``; None if it is empty."""
    return Fault(latent_at=n_tokens // 4, fork_at=n_tokens // 2) if n_tokens else None
