"""The plain data that flows from plan to report: frozen, slotted, and free of behaviour.

It flows one way: ``Probe + Decoding + Load -> Trial -> Sample``. A *trial* is one batch and the
unit of evidence; a *sample* is one completion of a probe. CONTRIBUTING.md explains every word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ndcheck.probe import ALONE as ALONE
from ndcheck.probe import CacheState as CacheState
from ndcheck.probe import Drafted as Drafted
from ndcheck.probe import Fed as Fed
from ndcheck.probe import Load as Load
from ndcheck.probe import Probe as Probe
from ndcheck.storage.ranges import Count, Level, NotNegative, Positive, RawText, Seed

Arm = Literal["stock", "invariant"]
Batching = Literal["exact", "continuous"]
CacheDtype = Literal["auto", "fp8"]
Axis = Literal["run-to-run", "batch-size", "slot", "neighbours", "cache", "width", "scoring"]
Role = Literal["reference", "trial", "control"]
"""A trial is compared with a baseline along an axis; a reference and a control have none."""
Purpose = Literal[
    "reference", "run-to-run", "batch-size", "slot", "neighbours", "cache", "width", "scoring",
    "control",
]  # fmt: skip
"""What a trial is for: its axis, or its role where it has none. Files call it ``axis``."""
Fillers = Literal["words", "shared-prefix"]
FinishReason = Literal["stop", "length", "error"]
Mode = Literal["copies", "mixed"]
AnswerKind = Literal["json", "number", "choice", "code"]
InvariantBy = Literal["auto", "ndcheck", "vllm"]
RunStatus = Literal["running", "finished", "interrupted", "failed"]

ARMS: tuple[Arm, ...] = ("stock", "invariant")
AXES: tuple[Axis, ...] = (
    "run-to-run", "batch-size", "slot", "neighbours", "cache", "width", "scoring",
)  # fmt: skip
"""The seven invariance properties, each with its own verdict."""
FED_AXES: tuple[Axis, ...] = ("width", "scoring")
"""Those along which a completion is fed again; no scheduler can be asked for them."""
WIDTHS = (2, 3, 4, 5, 8, 16)
"""Tokens that a pass verifies where a draft proposes one less."""
CLOSED_ARRIVALS = ("together", "closed")
"""Those of `ndcheck.plan.arrivals` under which the number in flight is as asked."""


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
class Fault:
    """A planted fault: the control that a sound measurement must catch.

    Both fields count generated tokens from 0. At ``latent_at`` the logit of the drawn token moves
    by one unit in the last place, which changes bits and no token. At ``fork_at`` another token is
    lifted above the one that was drawn. ``latent_at`` is less than ``fork_at``; where a completion
    has one token only, both are 0 and the fork alone is planted.
    """

    latent_at: Count
    fork_at: Count


@dataclass(frozen=True, slots=True)
class Trial:
    """One execution of one load: one batch.

    ``baseline`` is the id of the trial that differs from this one along its axis only; None for the
    first trial of the probe alone. Its samples, one a slot, are numbered from ``first_sample_id``.
    """

    trial_id: int
    arm: Arm
    probe_id: str
    purpose: Purpose
    load: Load
    first_sample_id: int
    baseline: int | None = None
    fault: Fault | None = None

    @property
    def role(self) -> Role:
        return role_of(self.purpose)

    @property
    def n_samples(self) -> int:
        return len(self.load.slots)


def role_of(purpose: Purpose) -> Role:
    """What a trial of this purpose is."""
    return purpose if purpose == "reference" or purpose == "control" else "trial"


@dataclass(frozen=True, slots=True)
class Witness:
    """Evidence of the batch that really ran. What a backend does not tell is None or empty."""

    achieved_batch_size: Count | None
    """Rows that the batch is known to have had; the same for all samples of a trial.

    In an exact batch: the fewest rows of any forward pass. Under continuous batching: a sample's
    own number is the most rows that any of its steps had. Of a server's answer: the size that more
    than half of its tokens had at least. The last two are the least over the trial's samples.
    """
    prefill_calls: Count | None = None
    """Forward passes over the prompt."""
    decode_calls: Count | None = None
    """Forward passes over one token, or over several that are fed."""
    override_fires: Seed | None = None
    """Ops that a batch-invariant implementation computed; None in the stock arm."""
    step_batch_sizes: tuple[Count, ...] = ()
    """Rows of the batch at each token of this sample, where requests come and go."""
    out_of_memory_at: Count | None = None
    """The last batch size that did not fit and was halved."""
    passes: tuple[tuple[Seed, ...], ...] = ()
    """What an engine's scheduler did, in order. Equal passes in a row are one entry of six numbers:
    how many passes, the rows of each, its tokens, and the requests running, waiting, preempted."""
    connection: str = ""
    """Which connection a server's answer came through, to tell replicas apart."""
    response_id: str = ""
    """The server's id of the answer, if its ids differ from answer to answer."""
    fingerprint: str = ""
    """The server's ``system_fingerprint``."""
    n_prompt_tokens: Count | None = None
    """Tokens that a server says the prompt has."""
    names_digest: str = ""
    """A digest of the names of the answer's tokens, where a server gives names beside ids."""
    n_counted: Count | None = None
    """Tokens that a server says it generated, hidden ones among them."""
    is_replayed: bool = False
    """Whether a server's answer came out of a cache: by its headers, or too soon for a token."""
    beside: str = ""
    """What a server's answer holds beside what is compared: each field's name and a digest."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of a probe.

    These have one entry for each generated token: ``token_ids``; ``token_texts``, which joined are
    the completion's text; ``logprobs`` of the chosen tokens, exact fp32 values held as floats;
    ``margins``, the best logit minus the second best; ``row_digests``, 16 hexadecimal digits over
    the bits of all the step's logits, or of a server's log-probabilities of all tokens that it
    shows. The last three are empty where the backend does not give
    them. Where it gives no token ids, the pieces of text that are compared get ids of their own,
    the same for equal pieces. A sample with ``error`` has no tokens and counts as no completion.

    Under a load that is fed, token t is the one that the logits after the first t tokens fed
    choose. The first that is not the next one fed is the last: another completion would go on from
    there. What all positions gave is in ``fed``. Under one that drafts, what was proposed is in
    ``drafted``.
    """

    sample_id: Seed
    trial_id: Seed
    arm: Arm
    probe_id: str
    purpose: Purpose
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
    fed: Fed | None = None
    drafted: Drafted | None = None
    error: RawText | None = None
    n_retries: Count = 0

    @property
    def text(self) -> str:
        return "".join(self.token_texts)

    @property
    def role(self) -> Role:
        return role_of(self.purpose)

    @property
    def is_reference(self) -> bool:
        """Did the probe alone give it, so that it may be the reference, the commonest of these?

        Not where it failed or was planted; a batch that is a baseline of others is none either.
        """
        return self.purpose != "control" and self.error is None and self.load == ALONE

    @classmethod
    def of(
        cls,
        trial: Trial,
        nth: int,
        witness: Witness,
        finish_reason: FinishReason,
        elapsed_s: float,
    ) -> Sample:
        """A sample without tokens: the ``nth`` of the trial's, in the order of its slots."""
        return cls(
            sample_id=trial.first_sample_id + nth,
            trial_id=trial.trial_id,
            arm=trial.arm,
            probe_id=trial.probe_id,
            purpose=trial.purpose,
            baseline=trial.baseline,
            load=trial.load,
            slot=trial.load.slots[nth],
            witness=witness,
            token_ids=(),
            token_texts=(),
            finish_reason=finish_reason,
            elapsed_s=elapsed_s,
            fault=trial.fault,
        )


@dataclass(frozen=True, slots=True)
class Environment:
    """Hardware, software, numeric flags and the model: what decides bits, as JSON scalars.

    Unknown is None, never 0.
    """

    hardware: dict[str, Any] = field(default_factory=dict)
    software: dict[str, Any] = field(default_factory=dict)
    numeric_flags: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Engine:
    """A serving engine that computes in processes of its own; ``arguments`` are ``KEY=VALUE``.

    ``invariant_by`` is whose kernels compute the invariant arm: ``auto`` is ndcheck's where they
    cover the model, else the engine's own mode.
    """

    name: str = "vllm"
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    arguments: tuple[str, ...] = ()
    invariant_by: InvariantBy = "auto"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that speaks the OpenAI API, and how it is loaded. No secret is ever part of it.

    ``header_names`` are sent with values that the command line gives again. ``query`` goes into
    every address: ``KEY=VALUE``, or the key alone where the value may be a secret. ``extra_body``
    is JSON of fields that go with every request. ``omits_temperature``: how tokens are drawn is
    the server's. ``stop`` are texts at which a probe's completion ends. ``arrival`` says when
    the requests of a trial are sent: ``together``, ``closed`` (each row's next request when its
    last is answered), or as an open loop, ``poisson:RATE`` or ``bursts:SIZE:GAP`` by the second.
    Fillers are ``words``, or the probe with words after it (``shared-prefix``).
    """

    url: str
    api_key_file: str | None = None
    header_names: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    extra_body: str | None = None
    omits_temperature: bool = False
    stop: tuple[str, ...] = ()
    arrival: str = "together"
    fillers: Fillers = "words"
    timeout_s: NotNegative = 300.0
    n_retries: Count = 2


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
    where no other load exists, and more where it confirms a divergence. Fed completions come on
    top, unless `axes` are theirs alone."""
    arms: tuple[Arm, ...] = ("stock",)
    seed: Seed = 0
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    batching: Batching = "exact"
    arrivals: str = "closed"
    """Who comes when under continuous batching, by the decode step; see `ndcheck.plan.queue`."""
    adapter: str | None = None
    """A directory of peft's; None too where ``model`` is one, which names its base."""
    chat: bool = False
    chat_template_kwargs: str | None = None
    """An object of JSON: what the chat template is given besides."""
    trust_remote_code: bool = False
    random_weights: Seed | None = None
    """Seed of weights made from the model's config alone; None loads the stored ones."""
    dequantise: bool = False
    """Compute with plain weights made of quantised ones."""
    kv_cache_dtype: CacheDtype = "auto"
    """What keys and values are kept as: the model's dtype, or e4m3 numbers."""
    target_rate: Level | None = None
    confidence: Level = 0.95
    stop_on_divergence: bool = False
    allow_latent: bool = False
    answer: AnswerKind | None = None
    answer_pattern: str | None = None
    widths: tuple[Positive, ...] = WIDTHS
    """Tokens of a pass along the axis ``width``; ascending, from 2."""
    draft: str | None = None
    """The model that proposes tokens to passes of these widths: as ``model``, or ``layers:N`` for
    the first N layers of that."""
    tensor_parallel: Positive = 1
    """Processes that share the model in ndcheck's own arms; an `Engine` has a number of its own."""
    tp_groups: Positive | None = None
    """Into how many parts the invariant arm cuts every sum over processes: its bits are then the
    same for every number of processes that divides this one."""
    engine: Engine | None = None
    endpoint: Endpoint | None = None

    @property
    def repeats_are_draws(self) -> bool:
        """Whether each batch is formed anew, so that the same load may give another completion."""
        return bool(self.endpoint or self.engine or self.batching == "continuous")

    @property
    def feeds(self) -> bool:
        """Are completions fed again?"""
        return not set(FED_AXES).isdisjoint(self.axes)

    @property
    def only_feeds(self) -> bool:
        """Is nothing else asked for? Then those are the samples, and do not come on top."""
        return set(FED_AXES).issuperset(self.axes)

    @property
    def sets_batch_size(self) -> bool:
        """False in an open loop, where arrivals and speed decide how many run at a time."""
        if self.endpoint is not None:
            return self.endpoint.arrival in CLOSED_ARRIVALS
        return self.batching == "exact" or self.arrivals in CLOSED_ARRIVALS


@dataclass(frozen=True, slots=True)
class Run:
    """What run.json holds: the spec to repeat it, where it ran, and how it ended.

    ``changes`` says how the backend changed in mid-run: another version, another replica.
    ``trial_digests`` has 8 hexadecimal digits for each planned trial, in the order of their ids;
    ``spec_digest`` is of the spec that the run began with. ``nonce`` is drawn anew for each run and
    stands in every line of its samples, so that none of another run is taken for its own. The three
    are empty in earlier files. ``prompt_token_ids`` are the ids of each probe's prompt, in the
    order of the probes, with spaces between; a text is empty where the backend does not give them,
    and all are left out where they would swell the file. ``stop_reason`` of a failed run is what
    refused to go on. ``flaws`` says what is wrong with the samples, a sentence each; it is filled
    when samples are read and never written.
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
    spec_digest: str = ""
    nonce: str = ""
    prompt_token_ids: tuple[str, ...] = ()
    flaws: tuple[str, ...] = ()
