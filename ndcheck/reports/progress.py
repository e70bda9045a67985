"""The one-line progress of a run under way."""

from __future__ import annotations

from collections.abc import Mapping

from rich.cells import cell_len, set_cell_size


def progress_line(
    done: int,
    total: int,
    unique: Mapping[str, int],
    first_divergence: int | None,
    eta_s: float | None,
    width: int = 80,
    unit: str = "token",
) -> str:
    """Trials, unique completions by arm and the earliest divergence so far, and the time left."""
    parts = [f"{done}/{total} trials"]
    if unique:
        counts = ", ".join(f"{arm} {count}" for arm, count in unique.items())
        parts.append(f"unique: {counts}")
    if first_divergence is not None:
        parts.append(f"diverged at {unit} {first_divergence + 1}")
    if eta_s is not None:
        parts.append(f"{minutes(eta_s)} left")
    line = "  ".join(parts)
    return line if cell_len(line) <= width else set_cell_size(line, width)


def minutes(elapsed_s: float) -> str:
    """As a clock shows it: 1:05 is 65 s."""
    whole, seconds = divmod(round(elapsed_s), 60)
    return f"{whole}:{seconds:02d}"
