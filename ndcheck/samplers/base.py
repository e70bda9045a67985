"""The seam between ndcheck and whatever generates tokens."""

from __future__ import annotations

from typing import Any, Protocol

from ndcheck.errors import UsageError
from ndcheck.records import Decoding, Probe, RunSpec, Sample, Trial


class Sampler(Protocol):
    """Runs exactly the batch that a trial asks for, and says what really ran."""

    @property
    def context(self) -> int:
        """The longest prompt plus completion, in tokens."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of this backend before a run, a line each."""

    @property
    def interleaves_arms(self) -> bool:
        """False where only one arm at a time fits the machine: its trials then run together."""

    def count_tokens(self, prompt: str) -> int:
        """Length of the prompt as the model sees it, in tokens; 0 if nothing is left of it."""

    def describe(self) -> dict[str, Any]:
        """The model's identity as JSON scalars, with a ``digest`` of its weights."""

    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        """One sample for each slot of the trial's load, in slot order.

        Raises TrialError where this trial failed and others may not (out of memory), and
        BackendError where there is no point in going on.
        """


def open_sampler(spec: RunSpec, *, load_weights: bool = True) -> Sampler:
    """The sampler that ``spec.model`` names: ``builtin``, ``scripted:NAME``, or a model.

    With ``spec.engine`` that engine computes the model, in processes of its own. ``load_weights``
    False is enough for planning: token counts and the context length.
    Raises UsageError for an unknown model, BackendError where it cannot be loaded.
    """
    kind, _, name = spec.model.partition(":")
    if kind == "scripted":
        from ndcheck.samplers.scripted import BEHAVIOURS, ScriptedSampler

        if name not in BEHAVIOURS:
            raise UsageError(
                f"no scripted sampler named {name!r}: choose from {', '.join(BEHAVIOURS)}"
            )
        return ScriptedSampler(name)
    if spec.engine is not None:
        from ndcheck.samplers.engine.sampler import EngineSampler

        return EngineSampler(spec, spec.engine, load_weights=load_weights)
    from ndcheck.samplers.transformers import TransformersSampler

    return TransformersSampler(spec, load_weights=load_weights)
