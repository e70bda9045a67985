"""The parts of a benchmark, one after the other, as long as time is left."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import torch

Part = tuple[str, Callable[[], None]]
"""Its name, and what measures it, writes what it has and raises where something is wrong."""


def run_parts(parts: list[Part], seconds: float) -> int:
    """Start each part within so many seconds; 1 where one failed, which is named, else 0."""
    failed, started = [], time.monotonic()
    for name, call in parts:
        elapsed_s = time.monotonic() - started
        if elapsed_s > seconds:
            print(f"-- {name}: no time left", flush=True)
            continue
        print(f"-- {name} ({elapsed_s:.0f} s)", flush=True)
        try:
            call()
        except Exception:
            failed.append(name)
            traceback.print_exc(limit=6)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"{time.monotonic() - started:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return int(bool(failed))
