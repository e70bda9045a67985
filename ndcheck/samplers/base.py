"""The seam between ndcheck and whatever generates tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ndcheck.probe import Prompt
from ndcheck.records import FED_AXES, Axis, CacheState, Decoding, Probe, RunSpec, Sample, Trial
from ndcheck.samplers.backends import backend_of
from ndcheck.samplers.endpoint.private import Private


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the model sees it: its text, and the id and the text of each token."""

    text: str
    tokens: tuple[tuple[int, str], ...]


WHY_NOT_FED = (
    "only --batching exact, in this process, feeds a completion again in passes that are known"
)
NOT_FED: tuple[tuple[Axis, str], ...] = tuple((axis, WHY_NOT_FED) for axis in FED_AXES)
"""`Sampler.refused_axes` where a scheduler decides what a pass holds."""


class Sampler(Protocol):
    """Runs exactly the batch that a trial asks for, and says what really ran."""

    @property
    def context(self) -> int:
        """The longest prompt plus completion, in tokens."""

    @property
    def cache_states(self) -> tuple[CacheState, ...]:
        """How a prompt can be made to enter the KV cache other than whole."""

    @property
    def refused_axes(self) -> tuple[tuple[Axis, str], ...]:
        """The axes along which this model computes something else by design, each with why."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of this backend before a run, a line each."""

    @property
    def interleaves_arms(self) -> bool:
        """False where only one arm at a time fits the machine: its trials then run together."""

    def count_tokens(self, prompt: Prompt) -> int:
        """Length of the prompt as the model sees it, in tokens; 0 if nothing is left of it."""

    def encode(self, prompt: Prompt) -> Sequence[int] | None:
        """The prompt's token ids as the model sees it; None where the backend does not give them.

        `count_tokens` comes first: a server is asked only once.
        """

    def render(self, prompt: Prompt) -> Rendered | None:
        """The prompt as the model sees it; None where only a server knows."""

    def describe(self) -> dict[str, Any]:
        """The model's identity as JSON scalars, with a ``digest`` of its weights."""

    def largest_batch_size(self, n_prompt_tokens: int, decoding: Decoding) -> int:
        """The most rows of such prompts and completions that fit in memory, within reason."""

    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        """One sample for each slot of the trial's load, in slot order.

        Raises TrialError where this trial failed and others may not (out of memory), and
        BackendError where there is no point in going on.
        """

    def changes(self) -> tuple[str, ...]:
        """What of the backend is no longer as `describe` said, a sentence each."""

    def close(self) -> None:
        """Let go of its connections and processes, if it has any; it samples no more."""


@runtime_checkable
class WorksAhead(Protocol):
    """A sampler that computes one arm while it is asked for a trial of the other."""

    def begin(self, trial: Trial, probe: Probe, decoding: Decoding) -> None:
        """Begin a trial, if its arm is the one: `sample` is asked for it next but one."""


def open_sampler(
    spec: RunSpec,
    *,
    load_weights: bool = True,
    private: Private | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Sampler:
    """The sampler of ``spec``, by its backend.

    ``load_weights`` False is enough for planning: token counts and the context length.
    ``private`` goes with every request to a server; ``say`` is told what takes long.
    Raises UsageError for an unknown model, BackendError where it cannot be loaded or reached.
    """
    return backend_of(spec).open(
        spec, load_weights=load_weights, private=private or Private(), say=say
    )


def open_for_run(
    spec: RunSpec,
    private: Private | None = None,
    say: Callable[[str], None] = lambda line: None,
    n_threads: object = None,
) -> Sampler:
    """`open_sampler` for all trials of a run: it may compute two arms at the same time.

    ``n_threads`` is what a run's record names, with which it goes on where that can be; until the
    sampler is closed this process may compute with fewer than its own.
    """
    return backend_of(spec).open_for_run(
        spec, private=private or Private(), say=say, n_threads=n_threads
    )
