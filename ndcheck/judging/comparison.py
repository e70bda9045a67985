"""What differs between two runs: how they were made, and what they gave; pure."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.divergence import (
    are_cut_otherwise,
    first_divergence,
    latent_divergence,
    read_stream,
)
from ndcheck.analysis.statistics import fisher_exact, k1_kl, k3_kl
from ndcheck.analysis.summary import ProbeSummary, Summary
from ndcheck.judging.verdict import Verdict, count, probe_doubts, run_doubts
from ndcheck.plan.conversations import as_text
from ndcheck.records import Arm, Endpoint, Run, Sample

Group = Literal["environment", "model", "kernels", "load"]
Unit = Literal["token", "character"]
DriftKind = Literal["none", "latent", "tokens"]
FailOn = Literal["environment", "model", "kernels", "load", "tokens", "bits", "unique", "rate"]
References = Mapping[tuple[Arm, str], Sample]
Partner = tuple[ProbeSummary, Sample]
"""A probe, and its reference."""

FP32_DIGITS = 9
"""So many significant digits give every fp32 number back."""
NOTHING_SHARED = "the runs share no prompt and arm"
ONE_RUN = "a run is compared with itself, or a copy of it: nothing can drift"
FAIL_ON: tuple[FailOn, ...] = get_args(FailOn)
MODEL_FIELDS = (
    "model",
    "adapter",
    "dtype",
    "device",
    "attention",
    "chat",
    "trust_remote_code",
    "decoding",
)
KERNEL_FIELDS = ("arms",)


@dataclass(frozen=True, slots=True)
class Measured:
    """A run with what it showed; ``references`` are the probes' completions alone, by arm."""

    run: Run
    summary: Summary
    references: References


@dataclass(frozen=True, slots=True)
class Change:
    """A field of the runs' records that differs; None is unknown or absent."""

    group: Group
    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Drift:
    """One probe in B against the same prompt in A, reference against reference.

    ``kind`` is ``latent`` where tokens are equal and bits are not. ``bits_recorded`` is False where
    a run recorded none, or a server rounded them, so that ``none`` speaks of tokens alone.
    ``max_abs_dlogprob`` (nats) and the KL estimates (A's reference against B's, nats per token) are
    over the shared prefix.
    ``fisher_p`` tests that both runs' draws diverge at one rate.
    """

    prompt: str
    a: ProbeSummary
    b: ProbeSummary
    kind: DriftKind
    bits_recorded: bool
    first_divergence: int | None
    tokens: tuple[str, str] | None
    n_shared_tokens: int
    max_abs_dlogprob: float | None
    k1_kl: float | None
    k3_kl: float | None
    n_shared_completions: int
    fisher_p: float
    unit: Unit = "token"
    """What positions count."""
    units: tuple[Unit, Unit] = ("token", "token")
    """What the summaries of A and of B count."""
    doubts: tuple[str, ...] = ()
    """Why little that diverged in B would show less than it seems."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """``only_in_a`` and ``only_in_b`` name probes without a partner, or without a reference."""

    changes: tuple[Change, ...]
    drifts: tuple[Drift, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    flaws: tuple[str, ...] = ()
    """What is wrong with the samples of either."""
    is_of_one_run: bool = False
    """B is A itself, or a copy of it: nothing could have drifted."""


def find_references(samples: Iterable[Sample], summary: Summary) -> dict[tuple[Arm, str], Sample]:
    """By arm and probe id, the sample that ``summary`` compares the others with."""
    return {
        (sample.arm, sample.probe_id): sample
        for sample in samples
        if summary.references.get((sample.arm, sample.probe_id)) == sample.trial_id
        and sample.is_reference
    }


def compare(a: Measured, b: Measured) -> Comparison:
    """Probes are partners if their prompts and arms are equal; two runs of one arm each are too.

    Where one run holds token ids and the other what stands for them, their texts are compared.
    """
    partners_a, partners_b = _by_prompt(a), _by_prompt(b)
    arms_a, arms_b = set(a.run.spec.arms), set(b.run.spec.arms)
    if len(arms_a) == len(arms_b) == 1 and arms_a != arms_b:
        (arm_a,), (arm_b,) = arms_a, arms_b
        partners_b = {(arm_a, *key[1:]): v for key, v in partners_b.items() if key[0] == arm_b}
    by_text = _compared(a.run) != _compared(b.run)
    has_names = "logprob tokens" == _compared(a.run) == _compared(b.run)
    unit_a, unit_b = (unit(measured.run) for measured in (a, b))
    has_bits = not any(rounds(measured.run) for measured in (a, b))
    # A server's digests are of the tokens that it shows, others' of all logits.
    has_rows = (a.run.spec.endpoint is None) == (b.run.spec.endpoint is None)
    shared = [key for key in partners_a if key in partners_b]
    return Comparison(
        changes=tuple(_find_changes(a.run, b.run)),
        drifts=tuple(
            replace(
                _drift(
                    *(key[1], partners_a[key], partners_b[key]),
                    by_text=by_text,
                    has_names=has_names,
                    has_bits=has_bits,
                    has_rows=has_rows,
                ),
                units=(unit_a, unit_b),
                doubts=(*probe_doubts(partners_b[key][0], b.run.spec), *run_doubts(b.run)),
            )
            for key in shared
        ),
        only_in_a=tuple(" ".join(key[:2]) for key in partners_a if key not in shared),
        only_in_b=tuple(" ".join(key[:2]) for key in partners_b if key not in shared),
        flaws=(*a.run.flaws, *b.run.flaws),
        is_of_one_run=a.run.nonce == b.run.nonce != "",
    )


def _compared(run: Run) -> str:
    return str(run.environment.model.get("compared", "token ids"))


def unit(run: Run) -> Unit:
    """What positions in its completions count: characters where a server gave nothing but text."""
    return "character" if _compared(run) == "text" else "token"


def rounds(run: Run) -> bool:
    """Were its log-probabilities sent with fewer digits than give an fp32 number back?"""
    digits = run.environment.model.get("logprob_digits")
    return isinstance(digits, int) and digits < FP32_DIGITS


def judge_comparison(
    comparison: Comparison, fail_on: Iterable[FailOn], confidence: float
) -> dict[FailOn, Verdict]:
    """A verdict on each kind of difference that was asked for.

    It is INCONCLUSIVE where the runs share no prompt, where bits were not recorded, where
    samples are missing or damaged, where both are one run, and where a clean B has fewer trials
    than A, or none that would let it pass by itself, so that a difference had less chance to show.
    """
    verdicts = {name: _judge(name, comparison, confidence) for name in fail_on}
    if not comparison.is_of_one_run:
        return verdicts
    return {
        name: replace(verdict, outcome="INCONCLUSIVE", reasons=(f"{name}: {ONE_RUN}",))
        if verdict.outcome == "PASS"
        else verdict
        for name, verdict in verdicts.items()
    }


def _by_prompt(measured: Measured) -> dict[tuple[Arm, str, int], Partner]:
    """By arm, prompt, and how many of the arm's probes before have the same prompt."""
    prompts = {probe.probe_id: as_text(probe.content) for probe in measured.run.spec.probes}
    n_before: Counter[tuple[Arm, str]] = Counter()
    found = {}
    for probe in measured.summary.probes:
        key = probe.arm, prompts[probe.probe_id]
        reference = measured.references.get((probe.arm, probe.probe_id))
        if reference is not None:
            found[*key, n_before[key]] = probe, reference
        n_before[key] += 1
    return found


def _find_changes(a: Run, b: Run) -> Iterator[Change]:
    found: list[tuple[Group, str, Any, Any]] = [
        ("environment", "ndcheck", a.ndcheck_version, b.ndcheck_version)
    ]
    here, there = dataclasses.asdict(a.environment), dataclasses.asdict(b.environment)
    for part, facts in here.items():
        group: Group = "model" if part == "model" else "environment"
        found += [
            (group, f"{part}.{name}", facts.get(name), there[part].get(name))
            for name in dict.fromkeys((*facts, *there[part]))
        ]
    for field in dataclasses.fields(a.spec):
        if field.name == "probes":
            continue
        group = "kernels" if field.name in KERNEL_FIELDS else "load"
        group = "model" if field.name in MODEL_FIELDS else group
        x, y = (getattr(run.spec, field.name) for run in (a, b))
        if isinstance(x, Endpoint) and isinstance(y, Endpoint):
            # Where it is, the model's facts say; the load is all else.
            x, y = replace(x, url=""), replace(y, url="")
        found.append((group, f"spec.{field.name}", x, y))
    groups = get_args(Group)
    for group, name, x, y in sorted(found, key=lambda change: groups.index(change[0])):
        if x != y:
            yield Change(group, name, _plain(x), _plain(y))


def _plain(value: Any) -> Any:
    """JSON values: dataclasses as dictionaries, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def _drift(
    prompt: str,
    partner_a: Partner,
    partner_b: Partner,
    *,
    by_text: bool,
    has_names: bool,
    has_bits: bool,
    has_rows: bool,
) -> Drift:
    (a, sample_a), (b, sample_b) = partner_a, partner_b
    spells_otherwise = has_names and _spells_otherwise(sample_a, sample_b)
    if spells_otherwise and sample_a.text == sample_b.text:
        # Token for token the same, by other names.
        sample_b = replace(sample_b, token_ids=sample_a.token_ids, token_texts=sample_a.token_texts)
    elif spells_otherwise:
        by_text = True
    if not has_rows:
        sample_b = replace(sample_b, row_digests=())
    if by_text:
        sample_a, sample_b = _by_character(sample_a), _by_character(sample_b)
    stream_a, stream_b = read_stream(sample_a), read_stream(sample_b)
    at = first_divergence(stream_a.token_ids, stream_b.token_ids)
    n_shared = min(len(sample_a.token_ids), len(sample_b.token_ids)) if at is None else at
    latent = latent_divergence(stream_a, stream_b, n_shared)
    n = min(n_shared, len(stream_a.logprobs), len(stream_b.logprobs))
    here, there = stream_a.logprobs[:n], stream_b.logprobs[:n]
    both_digests = bool(len(stream_a.row_digests) and len(stream_b.row_digests))
    kind: DriftKind = "none" if latent is None else "latent"
    return Drift(
        prompt=prompt,
        a=a,
        b=b,
        kind="tokens" if at is not None else kind,
        bits_recorded=has_bits and (bool(n) or both_digests),
        first_divergence=at,
        tokens=None if at is None else (_token(sample_a, at), _token(sample_b, at)),
        n_shared_tokens=n_shared,
        max_abs_dlogprob=_largest(here, there) if n else None,
        k1_kl=k1_kl(here, there) if n else None,
        k3_kl=k3_kl(here, there) if n else None,
        n_shared_completions=len(
            {c.text if by_text or spells_otherwise else c.sha256 for c in a.completions}
            & {c.text if by_text or spells_otherwise else c.sha256 for c in b.completions}
        ),
        fisher_p=fisher_exact(a.diverged_draws, a.n_draws, b.diverged_draws, b.n_draws),
        unit="character" if by_text else "token",
    )


def _spells_otherwise(a: Sample, b: Sample) -> bool:
    """Does B have other names for tokens, where its text is that of A's tokens?

    Servers name one token as its text, as their vocabulary does, or by its number.
    """
    at = first_divergence(a.token_ids, b.token_ids)
    if at is None or len(a.token_ids) != len(b.token_ids):
        return False
    n_characters = len("".join(a.token_texts[: at + 1]))
    is_same_text = a.text[:n_characters] == b.text[:n_characters]
    return is_same_text and not are_cut_otherwise(a, b)


def _by_character(sample: Sample) -> Sample:
    """What is left of a sample that is compared with one of other tokens."""
    text = tuple(sample.text)
    ids = tuple(map(ord, text))
    return replace(sample, token_ids=ids, token_texts=text, logprobs=(), margins=(), row_digests=())


def _token(sample: Sample, at: int) -> str:
    """Its text; empty where the completion had ended."""
    return "".join(sample.token_texts[at : at + 1])


def _largest(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


def _judge(name: FailOn, comparison: Comparison, confidence: float) -> Verdict:
    if name in get_args(Group):
        changed = [change.name for change in comparison.changes if change.group == name]
        if changed:
            return Verdict("FAIL", (f"{name}: {', '.join(changed)} changed",))
        return Verdict("PASS", (f"{name}: unchanged",))
    if not comparison.drifts:
        why = comparison.flaws or (NOTHING_SHARED,)
        return Verdict("INCONCLUSIVE", tuple(f"{name}: {reason}" for reason in why))
    verdicts = [_judge_drift(name, drift, confidence) for drift in comparison.drifts]
    for outcome in ("FAIL", "INCONCLUSIVE"):
        reasons = [r for v in verdicts if v.outcome == outcome for r in v.reasons]
        if reasons:
            return Verdict(outcome, tuple(reasons))
    missing = (*comparison.only_in_a, *comparison.only_in_b)
    if comparison.flaws:
        return Verdict("INCONCLUSIVE", tuple(f"{name}: {flaw}" for flaw in comparison.flaws))
    if missing:
        return Verdict("INCONCLUSIVE", (f"{name}: prompts without a partner: {len(missing)}",))
    accepts = any(v.accepts_divergence for v in verdicts)
    return Verdict("PASS", tuple(r for v in verdicts for r in v.reasons), accepts)


def _judge_drift(name: FailOn, drift: Drift, confidence: float) -> Verdict:
    a, b = drift.a, drift.b
    subject = f"{name}: {b.arm} {b.probe_id}"
    if name in ("tokens", "bits"):
        if drift.first_divergence is not None:
            at = drift.first_divergence + 1
            return Verdict("FAIL", (f"{subject}: another {drift.unit} at {at}",))
        if not drift.n_shared_tokens:
            return Verdict("INCONCLUSIVE", (f"{subject}: no {drift.unit} was there to compare",))
        equal = f"{subject}: {count(drift.n_shared_tokens, drift.unit)} of the probe alone equal"
        if name == "tokens":
            return Verdict("PASS", (equal,), accepts_divergence=b.has_diverged)
        if drift.kind == "latent":
            return Verdict("FAIL", (f"{subject}: equal tokens, other bits",))
        if not drift.bits_recorded:
            return Verdict("INCONCLUSIVE", (f"{subject}: bits were not recorded in both runs",))
        has_diverged = b.has_diverged or b.has_latent
        return Verdict("PASS", (f"{equal} bit for bit",), accepts_divergence=has_diverged)
    if name == "unique":
        counts = (
            f"{subject}: {count(b.n_unique, 'unique completion')}, {a.n_unique} in the baseline"
        )
        is_worse = b.n_unique > a.n_unique
    else:
        counts = (
            f"{subject}: {b.diverged_draws} of {count(b.n_draws, b.draw)} diverged, "
            f"{a.diverged_draws} of {count(a.n_draws, a.draw)} in the baseline "
            f"(p = {drift.fisher_p:.2g}, Fisher's exact test)"
        )
        higher = b.diverged_draws * a.n_draws > a.diverged_draws * b.n_draws
        is_worse = higher and drift.fisher_p < 1 - confidence
    if is_worse:
        return Verdict("FAIL", (counts,))
    has_fewer = b.n_draws < a.n_draws
    if has_fewer:
        counts += f", but only {count(b.n_draws, b.draw)} against {a.n_draws}"
    if has_fewer or drift.doubts:
        return Verdict("INCONCLUSIVE", (counts, *drift.doubts))
    return Verdict("PASS", (counts,), accepts_divergence=b.has_diverged)
