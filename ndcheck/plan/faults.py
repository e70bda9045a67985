"""Where the control's fault is planted, and how where logits are out of reach."""

from __future__ import annotations

from ndcheck.records import Fault


def plant_fault(n_tokens: int) -> Fault | None:
    """The control's fault, within its baseline's completion of ``n_tokens``; None if it is empty.

    A completion that is fed again ends where it diverges, and what is planted behind that is lost.
    """
    return Fault(latent_at=n_tokens // 4, fork_at=n_tokens // 2) if n_tokens else None


def plant_in_stream(
    token_ids: tuple[int, ...], logprobs: tuple[float, ...], fault: Fault | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """A stream as it was received, with the fault; log-probabilities may be none."""
    if fault is None:
        return token_ids, logprobs
    ids = list(token_ids)
    if fault.fork_at < len(ids):
        ids[fault.fork_at] ^= 1
    bits = list(logprobs)
    if fault.latent_at < len(bits):
        # A few units in the last place of fp32, whichever way a double is rounded to it.
        bits[fault.latent_at] = bits[fault.latent_at] * (1 + 2**-21) - 2**-40
    return tuple(ids), tuple(bits)
