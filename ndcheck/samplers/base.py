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

    def count_tokens(self, prompt: str) -> int:
        """Length of the prompt as the model sees it, in tokens; 0 if nothing is left of it."""

    def describe(self) -> dict[str, Any]:
        """The model's identity as JSON scalars, with a ``digest`` of its weights."""

    def largest_batch_size(self, n_prompt_tokens: int, decoding: Decoding) -> int:
        """The most rows of such prompts and completions that fit in memory, within reason."""

    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        """One sample for each slot of the trial's load, in slot order.

        Raises TrialError where this trial failed and others may not (out of memory), and
        BackendError where there is no point in going on.
        """


def open_sampler(spec: RunSpec, *, load_weights: bool = True) -> Sampler:
    """The sampler that ``spec.model`` names: ``builtin``, ``scripted:NAME``, or a model.

    ``load_weights`` False is enough for planning: token counts and the context length.
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
    from ndcheck.samplers.transformers import TransformersSampler

    return TransformersSampler(spec, load_weights=load_weights)
