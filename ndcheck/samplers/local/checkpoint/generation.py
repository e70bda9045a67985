"""What a model's generation_config.json says: where completions end, and what is left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from ndcheck.errors import UsageError

log = logging.getLogger(__name__)

FACTORS = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams")
CHANGES_TOKENS = (
    *FACTORS,
    *("no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "min_length"),
    *("min_new_tokens", "exponential_decay_length_penalty", "watermarking_config"),
    *("penalty_alpha", "dola_layers", "stop_strings"),
)
"""Settings by which `generate()` chooses other tokens than those of the largest logits, or ends.

`FACTORS` change nothing where they are 1, the others where they are empty or 0.
"""


def stop_ids(model: Any) -> set[int]:
    """Ids of the tokens that end a completion. Raises UsageError where they are no token ids.

    Warns of settings that are not followed, since every logit counts as the model gives it.
    """
    stop = model.generation_config.eos_token_id
    ids = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(i, int) for i in ids):
        name = model.config.name_or_path
        raise UsageError(
            f"--model {name}: generation_config.json: eos_token_id is {stop!r}, not token ids"
        )
    settings = {name: getattr(model.generation_config, name, None) for name in CHANGES_TOKENS}
    if unfollowed := [n for n, x in settings.items() if x and not (x == 1 and n in FACTORS)]:
        log.warning(
            "generation_config.json: not followed: %s: completions may differ from generate()'s",
            ", ".join(unfollowed),
        )
    return set(ids)


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Let `generate()` follow its arguments alone: no beams, penalties or caches of a config."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
