"""The plain data that flows from plan to report: frozen, slotted, and free of behaviour.

One-way data flow: ``Probe + Decoding + Load -> Trial -> Sample``. Every word follows the
project's vocabulary: a *trial* is one batch and the unit of evidence, a *sample* is one
completion of a probe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a field may hold, both ends included unless ``is_open``.

    `ndcheck.storage.reading.decode` holds files to it; options of the command line have lines of
    their own.
    """

    low: float
    high: float
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        if self.is_open:
            return self.low < value < self.high
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.high == INFINITY:
            return f"of {self.low:g} or more"
        ends = f"{self.low} and {self.high}" if self.is_open else f"{self.low} to {self.high}"
        return f"{'between' if self.is_open else 'from'} {ends}"


INFINITY = float("inf")
Count = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[int, Range(1, 2**31 - 1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
NotNegative = Annotated[float, Range(0, INFINITY)]
RawText = Annotated[str, "may hold half a character, as servers stream them"]
Level = Annotated[float, Range(0, 1, is_open=True)]

Arm = Literal["stock", "invariant"]
Batching = Literal["exact", "continuous"]
Axis = Literal["reference", "run-to-run", "batch-size", "slot", "neighbours", "cache", "control"]
CacheState = Literal["whole", "chunked", "prefix"]
EngineName = Literal["vllm"]
Fillers = Literal["words", "shared-prefix"]
FinishReason = Literal["stop", "length", "error"]
Mode = Literal["copies", "mixed"]
Role = Literal["system", "developer", "user", "assistant"]
RunStatus = Literal["running", "finished", "interrupted", "failed"]

ARMS: tuple[Arm, ...] = ("stock", "invariant")
AXES: tuple[Axis, ...] = ("run-to-run", "batch-size", "slot", "neighbours", "cache")
"""The five invariance properties, each with its own verdict."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Prompt = str | tuple[Message, ...]
"""What a model is asked: a text, or the messages of a conversation."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt being measured.

    ``messages`` are those of a conversation, the user's last; ``prompt`` is then the text of that
    one, to tell the probe by.
    """

    probe_id: str
    prompt: str
    messages: tuple[Message, ...] = ()

    @property
    def content(self) -> Prompt:
        """What the model is asked."""
        return self.messages or self.prompt


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a completion is drawn from logits.

    ``temperature`` 0 is greedy (ties by lowest token id). Above 0, token t is the argmax of
    ``logits / temperature + gumbel(seed, t)``: a function of seed, position and logits only, so
    two samples can differ only where their logits do.
    """

    max_tokens: Positive
    temperature: NotNegative = 0.0
    seed: Seed = 0


@dataclass(frozen=True, slots=True)
class Load:
    """How the probe's rows are batched.

    ``slots`` are the rows that hold the probe (all of them in mode ``copies``); the other rows
    hold fillers of ``filler_lengths`` tokens, in row order, with contents drawn from
    ``filler_seed``. ``cache_state`` says how the prompt enters the KV cache: ``whole`` in one
    forward pass, ``chunked`` in several, or on top of a ``prefix`` computed alone beforehand.
    ``cut`` is how many tokens a chunk has, or follow the prefix; None is the sampler's own choice.
    """

    batch_size: Positive
    slots: tuple[Count, ...] = (0,)
    filler_lengths: tuple[Count, ...] = ()
    filler_seed: Seed = 0
    cache_state: CacheState = "whole"
    cut: Positive | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A planted fault: the control that a sound measurement must catch.

    At generated token ``fork_at`` another token is lifted above the one that was drawn, and at
    ``latent_at`` the drawn token's logit moves by one unit in the last place: before the fork, or
    not at all where both are the only token.
    """

    latent_at: Count
    fork_at: Count


@dataclass(frozen=True, slots=True)
class Trial:
    """One execution of one load: one batch.

    ``baseline`` is the trial that differs from this one along ``axis`` only; None for the
    first trial of the probe alone (batch size 1). ``first_sample_id`` numbers the samples in plan
    order, one per slot.
    """

    trial_id: int
    arm: Arm
    probe_id: str
    axis: Axis
    load: Load
    first_sample_id: int
    baseline: int | None = None
    fault: Fault | None = None

    @property
    def n_samples(self) -> int:
        return len(self.load.slots)


@dataclass(frozen=True, slots=True)
class Witness:
    """Evidence of the batch that really ran; None where the backend gives none.

    ``achieved_batch_size`` is the smallest number of rows any forward pass of the trial had; under
    continuous batching the largest that the sample's own steps had, the least of the trial's
    samples, and ``step_batch_sizes`` is the number at each token of this sample; of a server's
    answer the one that more than half of its tokens had at least, the least of the trial's.
    ``override_fires`` counts the ops that an invariant implementation computed;
    ``out_of_memory_at`` is the last batch size that did not fit, before it was halved.
    ``passes`` is what an engine's scheduler did: in order, how many equal passes, and of each its
    rows, its tokens, and the requests then running, waiting and preempted.

    Of a server's answer: the ``connection`` that it came through, its ``response_id`` where these
    tell answers apart, the server's ``fingerprint``, a digest of the tokens' names, and
    ``is_replayed``: it came sooner than a first token can. Empty where unknown.
    """

    achieved_batch_size: Count | None
    prefill_calls: Count | None = None
    decode_calls: Count | None = None
    override_fires: Seed | None = None
    step_batch_sizes: tuple[Count, ...] = ()
    out_of_memory_at: Count | None = None
    passes: tuple[tuple[Seed, ...], ...] = ()
    connection: str = ""
    response_id: str = ""
    fingerprint: str = ""
    names_digest: str = ""
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of a probe.

    Per generated token t: ``token_ids[t]``; ``token_texts[t]`` (their concatenation is the
    completion's text); ``logprobs[t]``, the chosen token's log-probability, an exact fp32 value
    held as a float; ``margins[t]``, top-1 minus top-2 logit; ``row_digests[t]``, 16 hexadecimal
    digits over the bits of the full logits row. The last three are empty where the backend does
    not give them; where it gives no token ids either, other stable ids stand for the pieces that
    are compared. A sample with ``error`` has no tokens and no part in any count of completions.
    """

    sample_id: Seed
    trial_id: Seed
    arm: Arm
    probe_id: str
    axis: Axis
    baseline: Seed | None
    load: Load
    slot: Count
    witness: Witness
    token_ids: tuple[Count, ...]
    token_texts: tuple[RawText, ...]
    finish_reason: FinishReason
    elapsed_s: NotNegative
    logprobs: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()
    row_digests: tuple[str, ...] = ()
    fault: Fault | None = None
    error: RawText | None = None
    n_retries: Count = 0

    @property
    def text(self) -> str:
        return "".join(self.token_texts)

    @classmethod
    def of(
        cls,
        trial: Trial,
        nth: int,
        witness: Witness,
        finish_reason: FinishReason,
        elapsed_s: float,
        *,
        token_ids: tuple[int, ...] = (),
        token_texts: tuple[str, ...] = (),
        logprobs: tuple[float, ...] = (),
        margins: tuple[float, ...] = (),
        row_digests: tuple[str, ...] = (),
        error: str | None = None,
        n_retries: int = 0,
    ) -> Sample:
        """What came of the ``nth`` of the trial's probe rows, counted in the order of its slots."""
        return cls(
            sample_id=trial.first_sample_id + nth,
            trial_id=trial.trial_id,
            arm=trial.arm,
            probe_id=trial.probe_id,
            axis=trial.axis,
            baseline=trial.baseline,
            load=trial.load,
            slot=trial.load.slots[nth],
            witness=witness,
            token_ids=token_ids,
            token_texts=token_texts,
            finish_reason=finish_reason,
            elapsed_s=elapsed_s,
            logprobs=logprobs,
            margins=margins,
            row_digests=row_digests,
            fault=trial.fault,
            error=error,
            n_retries=n_retries,
        )


@dataclass(frozen=True, slots=True)
class Environment:
    """Hardware, software and numeric flags; two runs are comparable where ``must_match`` agrees.

    Values are JSON scalars; unknown is None, never 0.
    """

    hardware: dict[str, Any] = field(default_factory=dict)
    software: dict[str, Any] = field(default_factory=dict)
    numeric_flags: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Engine:
    """A serving engine that computes in processes of its own; ``arguments`` are ``KEY=VALUE``."""

    name: EngineName = "vllm"
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that speaks the OpenAI API, and how it is loaded. No secret is ever part of it.

    ``header_names`` are sent with values that the command line gives again. ``arrival`` says when
    the requests of a trial are sent: ``together``, ``closed`` (each row's next request when its
    last is answered), or as an open loop, ``poisson:RATE`` or ``bursts:SIZE:SECONDS``. Fillers
    are ``words``, or the probe with words after it (``shared-prefix``).
    """

    url: str
    api_key_file: str | None = None
    header_names: tuple[str, ...] = ()
    arrival: str = "together"
    fillers: Fillers = "words"
    timeout_s: NotNegative = 300.0
    n_retries: Count = 2

    CLOSED_ARRIVALS: ClassVar[tuple[str, ...]] = ("together", "closed")

    @property
    def sets_batch_size(self) -> bool:
        """False in an open loop, where the server's speed decides how many run at a time."""
        return self.arrival in self.CLOSED_ARRIVALS


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Everything needed to repeat a run.

    ``engine`` and ``endpoint`` None: transformers, in this process.
    """

    model: str
    probes: tuple[Probe, ...]
    decoding: Decoding
    batch_sizes: tuple[Positive, ...]
    """Empty until `ndcheck.runner.fit_spec` has found what fits."""
    axes: tuple[Axis, ...]
    mode: Mode
    n_samples: Positive
    """Samples of each probe in each arm, the reference included, controls not. A run holds fewer
    where no other load exists, and more where it confirms a divergence."""
    arms: tuple[Arm, ...] = ("stock",)
    seed: Seed = 0
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    batching: Batching = "exact"
    arrivals: str = "closed"
    """Who comes when under continuous batching; see `ndcheck.plan.queue`."""
    adapter: str | None = None
    """A directory of peft's; None too where ``model`` is one, which names its base."""
    chat: bool = False
    trust_remote_code: bool = False
    random_weights: Seed | None = None
    """Seed of weights made from the model's config alone; None loads the stored ones."""
    target_rate: Level | None = None
    confidence: Level = 0.95
    stop_on_divergence: bool = False
    allow_latent: bool = False
    answer_pattern: str | None = None
    tensor_parallel: Positive = 1
    """Processes that share the model, without an engine; an engine has its own."""
    tp_groups: Positive | None = None
    """Parts of every sum over ranks in the invariant arm, whose bits any divisor then shares."""
    engine: Engine | None = None
    endpoint: Endpoint | None = None

    @property
    def repeats_are_draws(self) -> bool:
        """Is every batch formed anew, so that a load asked for again is another draw?"""
        return bool(self.endpoint or self.engine or self.batching == "continuous")

    @property
    def sets_batch_size(self) -> bool:
        """False in an open loop, where arrivals and speed decide how many run at a time."""
        if self.endpoint is not None:
            return self.endpoint.sets_batch_size
        return self.batching == "exact" or not self.arrivals.startswith("poisson")


@dataclass(frozen=True, slots=True)
class Run:
    """What run.json holds: the spec to repeat it, where it ran, and how it ended.

    ``changes`` says what became of the backend in mid-run: another version, another replica.
    ``trial_digests`` hold each planned trial, 8 hexadecimal digits by trial id (empty in files
    from before they were kept). ``flaws`` say what is wrong with the samples, a sentence each:
    found when they are read, never written.
    """

    run_id: str
    ndcheck_version: str
    spec: RunSpec
    environment: Environment
    started_at: str
    status: RunStatus = "running"
    n_trials_planned: Seed = 0
    elapsed_s: NotNegative = 0.0
    stop_reason: str | None = None
    changes: tuple[str, ...] = ()
    trial_digests: str = ""
    flaws: tuple[str, ...] = ()
