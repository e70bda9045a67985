"""Which device to run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ndcheck.errors import UsageError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises UsageError for a device that is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UsageError(f"--device {name} is not available: {first_line}") from error
    return device
