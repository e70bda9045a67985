"""Where two completions first differ: in their tokens, and before that in their bits."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndcheck.records import Fault, Sample


@dataclass(frozen=True, slots=True)
class Stream:
    """What a sample recorded per generated token, as arrays of shape [T].

    Arrays that the backend did not give are empty; ``margins`` are logits, ``logprobs`` nats.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    margins: NDArray[np.float32]
    row_digests: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Reference:
    """The completion that the others are compared with: the probe alone in its batch.

    ``number`` is its completion's, by order of arrival.
    """

    trial_id: int
    number: int
    stream: Stream


def read_stream(sample: Sample) -> Stream:
    digests = bytes.fromhex("".join(sample.row_digests))
    return Stream(
        np.frombuffer(array("i", sample.token_ids), np.int32),
        np.frombuffer(array("f", sample.logprobs), np.float32),
        np.frombuffer(array("f", sample.margins), np.float32),
        np.frombuffer(digests, np.uint64),
    )


def first_divergence(
    a: NDArray[Any] | Sequence[int], b: NDArray[Any] | Sequence[int]
) -> int | None:
    """First index at which two sequences differ, or None; a strict prefix differs at its end."""
    a, b = np.asarray(a), np.asarray(b)
    n_shared = min(len(a), len(b))
    if n_shared:
        at = int((a[:n_shared] != b[:n_shared]).argmax())
        if a[at] != b[at]:
            return at
    return None if len(a) == len(b) else n_shared


def id_of_name(name: str, text: str) -> int:
    """31 bits that stand for a token's name and text in every process."""
    piece = name if name == text else f"{name}\0{text}"
    digest = hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def are_cut_otherwise(a: Sample, b: Sample) -> bool:
    """Do both spell the token at one place out, each as another piece of text?"""
    return any(
        text_a != text_b
        and id_a == id_of_name(text_a, text_a)
        and id_b == id_of_name(text_b, text_b)
        for id_a, text_a, id_b, text_b in zip(
            a.token_ids, a.token_texts, b.token_ids, b.token_texts, strict=False
        )
    )


def latent_divergence(a: Stream, b: Stream, n_shared: int) -> int | None:
    """First of the ``n_shared`` equal tokens at which any recorded bit differs, or None.

    Bits are compared, not values: a NaN equals itself and 0.0 differs from -0.0. What only one
    of the two streams recorded is no evidence.
    """
    first = n_shared
    for bits_a, bits_b in (
        (a.logprobs.view(np.int32), b.logprobs.view(np.int32)),
        (a.row_digests, b.row_digests),
    ):
        n = min(first, len(bits_a), len(bits_b))
        if bits_a[:n].tobytes() != bits_b[:n].tobytes():
            at = first_divergence(bits_a[:n], bits_b[:n])
            first = first if at is None else at
    return first if first < n_shared else None


def is_caught(fault: Fault, baseline: Stream, stream: Stream) -> bool:
    """Does the planted fault show exactly where it was planted, and nothing before it?"""
    if first_divergence(baseline.token_ids, stream.token_ids) != fault.fork_at:
        return False
    has_bits = (len(baseline.logprobs) and len(stream.logprobs)) or (
        len(baseline.row_digests) and len(stream.row_digests)
    )
    latent = latent_divergence(baseline, stream, fault.fork_at)
    expected = fault.latent_at if fault.latent_at < fault.fork_at else None
    return latent == expected if has_bits else True
