"""The process of one arm: it opens the model once more, and runs the trials that it is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ndcheck.samplers.local.beside.process import Parent


def main() -> None:
    """Open the model and sample, as the parent says.

    Its first message holds the spec and the number of threads, and is answered by the digest of the
    weights and the token ids of the prompts; the others hold what `Sampler.sample` takes, and are
    answered by its samples.
    """
    parent = Parent()
    try:
        with _silence():
            import torch

            from ndcheck.samplers.local.sampler import TransformersSampler

            spec, n_threads = parent.receive()
            torch.set_num_threads(n_threads)
            sampler = TransformersSampler(spec)
            prompts = [sampler.encode(probe.content) for probe in spec.probes]
            opened = sampler.describe()["digest"], prompts
    except Exception as error:
        parent.send(error)
        return
    parent.send(opened)
    parent.answer(sampler.sample)


@contextmanager
def _silence() -> Iterator[None]:
    """Without stderr: the parent opens the same model and says the same."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


if __name__ == "__main__":
    main()
