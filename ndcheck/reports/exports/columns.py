"""The CSV exports as data frames: one contract with users, so columns are only ever appended.

Unknown is empty, never 0; integers stay integers beside it. Text that a spreadsheet would run as
a formula gets an apostrophe in front. New columns hold lists as JSON, and name positions as people
read them, from 1; the older ones count from 0.

Version history:

1. samples.csv, completions.csv, loads.csv, summary.csv.
2. properties.csv; ``run_id`` in every file, so that they join on it, ``arm`` and ``probe_id``;
   positions from 1 (``..._from_1``), lists as JSON (``..._json``, ``trial_ids``).
3. ``width``, ``fed_tokens``, ``fed_other_tokens``, ``fed_other_bits``, ``width_classes_json``.
"""

from __future__ import annotations

Columns = dict[str, str]
"""The dtype that each column has in a data frame."""
TEXT, INT, FLOAT, FLOAT32 = "object", "Int64", "float64", "float32"

SAMPLE_COLUMNS: Columns = {
    "run_id": TEXT,
    "arm": TEXT,
    "probe_id": TEXT,
    "trial_id": INT,
    "sample_id": INT,
    "batch_size": INT,
    "achieved_batch_size": INT,
    "slot": INT,
    "filler_lengths": TEXT,
    "cache_state": TEXT,
    "n_tokens": INT,
    "finish_reason": TEXT,
    "completion_id": INT,
    "first_divergence": INT,
    "margin": FLOAT32,
    "latent_divergence": INT,
    "max_abs_dlogprob": FLOAT32,
    "elapsed_s": FLOAT,
    "error": TEXT,
    "text": TEXT,
    "n_retries": INT,
    "axis": TEXT,
    "baseline_trial_id": INT,
    "first_divergence_from_1": INT,
    "first_latent_from_1": INT,
    "filler_lengths_json": TEXT,
    "width": INT,
    "fed_tokens": INT,
    "fed_other_tokens": INT,
    "fed_other_bits": INT,
}
COMPLETION_COLUMNS: Columns = {
    "arm": TEXT,
    "probe_id": TEXT,
    "completion_id": INT,
    "count": INT,
    "share": FLOAT,
    "first_divergence": INT,
    "divergent_token": TEXT,
    "reference_token": TEXT,
    "n_tokens": INT,
    "sha256": TEXT,
    "text": TEXT,
    "run_id": TEXT,
    "first_divergence_from_1": INT,
    "answer": TEXT,
}
LOAD_COLUMNS: Columns = {
    "arm": TEXT,
    "probe_id": TEXT,
    "axis": TEXT,
    "batch_size": INT,
    "slot": INT,
    "n_trials": INT,
    "n_samples": INT,
    "n_unique": INT,
    "n_diverged_trials": INT,
    "first_divergence_min": INT,
    "first_divergence_median": FLOAT,
    "latent": INT,
    "elapsed_s": FLOAT,
    "tokens_per_s": FLOAT,
    "cache_state": TEXT,
    "run_id": TEXT,
    "trial_ids": TEXT,
    "n_errors": INT,
    "first_divergence_from_1": INT,
    "first_latent_from_1": INT,
    "answer_flips": INT,
    "n_correct": INT,
    "width": INT,
}
PROPERTY_COLUMNS: Columns = {
    "run_id": TEXT,
    "arm": TEXT,
    "probe_id": TEXT,
    "property": TEXT,
    "verdict": TEXT,
    "draw": TEXT,
    "n_draws": INT,
    "diverged_draws": INT,
    "latent_draws": INT,
    "rate": FLOAT,
    "rate_ci_low": FLOAT,
    "rate_ci_high": FLOAT,
    "confidence": FLOAT,
    "n_trials": INT,
    "diverged_trials": INT,
    "latent_trials": INT,
    "first_divergence_from_1": INT,
    "first_latent_from_1": INT,
    "batch_sizes_diverged_json": TEXT,
    "batch_sizes_latent_json": TEXT,
    "reasons_json": TEXT,
    "fed_tokens": INT,
    "fed_other_tokens": INT,
    "fed_other_bits": INT,
    "width_classes_json": TEXT,
}
SUMMARY_COLUMNS: Columns = {
    "arm": TEXT,
    "probe_id": TEXT,
    "n_trials": INT,
    "n_samples": INT,
    "n_unique": INT,
    "modal_count": INT,
    "common_prefix_tokens": INT,
    "diverged_trials": INT,
    "divergence_rate": FLOAT,
    "rate_ci_low": FLOAT,
    "rate_ci_high": FLOAT,
    "confidence": FLOAT,
    "unseen_mass": FLOAT,
    "chao1": FLOAT,
    "tokens_per_s": FLOAT,
    "slowdown_vs_stock": FLOAT,
    "verdict": TEXT,
    "reasons": TEXT,
    "draw": TEXT,
    "n_draws": INT,
    "diverged_draws": INT,
    "run_id": TEXT,
    "latent_draws": INT,
    "latent_trials": INT,
    "reasons_json": TEXT,
    "n_answers": INT,
    "answer_flipped_draws": INT,
    "n_correct": INT,
}
