"""How large a plan may be: what would take days is refused before a model is loaded."""

from __future__ import annotations

from ndcheck.errors import UsageError
from ndcheck.records import RunSpec

MAX_BATCH_SIZE = 2**16
MAX_SAMPLES = 10**6
"""Of all probes and arms together."""
MAX_ROWS = 10**8
"""Of all trials; a plan is held in memory."""


def check_size(spec: RunSpec) -> None:
    """Raise UsageError naming the option that makes the plan too large."""
    largest = max(spec.batch_sizes, default=1)
    if largest > MAX_BATCH_SIZE:
        raise UsageError(f"--loads {largest}: a batch has at most {MAX_BATCH_SIZE} rows")
    n_groups = len(spec.probes) * len(spec.arms)
    n_samples, option = spec.n_samples, f"--samples {spec.n_samples}"
    if spec.target_rate is not None:
        from ndcheck.analysis.statistics import trials_needed

        n_samples = trials_needed(spec.target_rate, spec.confidence)
        shown = n_samples if n_samples < 10**12 else "10^12 or more"
        option = f"--target-rate {spec.target_rate}, which takes {shown} trials"
    if n_samples * n_groups > MAX_SAMPLES:
        raise UsageError(
            f"{option}: of all probes and arms ({n_groups} here) together there are at most "
            f"{MAX_SAMPLES}"
        )
    if n_samples * n_groups * largest > MAX_ROWS:
        raise UsageError(
            f"{option}: in batches of up to {largest} the plan would have more than {MAX_ROWS} "
            "rows; lower one of the two"
        )
