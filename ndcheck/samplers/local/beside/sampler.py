"""Two arms at the same time: a small model's step keeps one core busy, whatever the others do.

The second arm runs in a process of its own, with as many threads as the first, so both give the
bits that they give one after the other with so many. It gets its next trial while the first arm
computes; what it answers is taken in the order of the plan, by the one process that writes the run.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import torch

from ndcheck.errors import BackendError, doing
from ndcheck.records import Arm, Decoding, Probe, RunSpec, Sample, Trial
from ndcheck.samplers.local.beside.process import WorkerProcess
from ndcheck.samplers.local.device import choose_device
from ndcheck.samplers.local.memory import free_bytes
from ndcheck.samplers.local.sampler import TransformersSampler

SHARE = 1 / 16
"""Of the free memory, for the weights: two processes hold them, in float32 too, and batches."""


def has_room(spec: RunSpec, n_bytes: int) -> bool:
    """Whether a model of ``n_bytes`` runs on a CPU, with memory for two."""
    device = choose_device(spec.device)
    return device.type == "cpu" and n_bytes <= SHARE * free_bytes(device)


class SideBySideSampler(TransformersSampler):
    """A `TransformersSampler` whose second arm is computed in a process of its own.

    Where that process cannot open the model, both arms are computed here, and a note says so.
    `sample` raises BackendError where the process dies later.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._worker = _Worker(spec)
        try:
            super().__init__(spec)
            with doing(f"waiting for the process of the {self._worker.arm} arm"):
                prompts = [self.encode(probe.content) for probe in spec.probes]
                why_not = self._worker.why_unusable(self._digest, prompts)
        except BaseException:
            self._worker.close()
            raise
        how = "side by side, each in a process of its own"
        if why_not is not None:
            self._worker.close()
            how = f"one after the other: {why_not}"
        self._has_worker = why_not is None
        self.notes += (f"the arms run {how}",)

    def begin(self, trial: Trial, probe: Probe, decoding: Decoding) -> None:
        """Let the other process begin with a trial of its arm, for which `sample` will come."""
        if self._has_worker and trial.arm == self._worker.arm:
            self._worker.begin(trial, probe, decoding)

    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        if not self._has_worker or trial.arm != self._worker.arm:
            return super().sample(trial, probe, decoding)
        what = doing(f"the first batch of the {trial.arm} arm: kernels are made ready")
        with nullcontext() if trial.arm in self._begun else what:
            self._worker.begin(trial, probe, decoding)
            samples: list[Sample] = self._worker.receive()
        self._begun.add(trial.arm)
        return samples

    def close(self) -> None:
        self._worker.close()
        super().close()


class _Worker(WorkerProcess):
    """The process of a run's second arm."""

    def __init__(self, spec: RunSpec) -> None:
        self.arm: Arm = spec.arms[1]
        self._begun: Trial | None = None
        super().__init__(
            "ndcheck.samplers.local.beside.worker", f"the process of the {self.arm} arm"
        )
        with suppress(BackendError):  # If it is dead, nothing will come back either.
            self.send((spec, torch.get_num_threads()))

    def why_unusable(self, digest: str, prompts: list[list[int]]) -> str | None:
        """Wait until the model is open there; why it cannot be used, or None."""
        try:
            digest_there, prompts_there = self.receive()
        except Exception as error:
            return str(error)
        if digest_there != digest:
            return "the weights were written to meanwhile"
        return None if prompts_there == prompts else "prompts have other tokens there"

    def begin(self, trial: Trial, probe: Probe, decoding: Decoding) -> None:
        """Send a trial, unless it is the one that was sent before."""
        if self._begun == trial:
            return
        if self._begun is not None:
            raise RuntimeError(f"trial {self._begun.trial_id} has begun, and nobody took it")
        self._begun = trial
        self.send((trial, probe, decoding))

    def receive(self) -> Any:
        self._begun = None
        return super().receive()
