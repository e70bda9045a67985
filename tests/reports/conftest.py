"""Hand-made runs: what a measurement could have found, small enough to check by eye."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from ndcheck.analysis.summary import (
    AxisFinding,
    Completion,
    ControlFinding,
    FedTokens,
    LoadFinding,
    Metrics,
    ProbeSummary,
    SampleColumns,
    Summary,
)
from ndcheck.analysis.tree import Branch, Fork
from ndcheck.findings import Findings, find
from ndcheck.judging.verdict import judge
from ndcheck.records import (
    AXES,
    Arm,
    Decoding,
    Environment,
    Load,
    Probe,
    Run,
    RunSpec,
    Sample,
    Witness,
)
from ndcheck.request import DEFAULTS

ENVIRONMENT = Environment(
    hardware={"cpu": "AMD EPYC 7763 64-Core Processor", "gpu": None},
    software={"python": "3.12.4", "torch": "2.13.0", "transformers": "5.22.2"},
    numeric_flags={"allow_tf32": False},
    model={"dtype": "bfloat16", "device": "cpu", "digest": "9f86d081884c7d65"},
)
Tokens = tuple[str, ...]
FED = {
    "width": FedTokens(5940, 5300, 12, ((1, ((1, 2, 3, 4), (5, 8), (16,))), (4, ((1,), (4,))))),
    "scoring": FedTokens(300, 0, 0),
}
FED_ALIKE = {axis: replace(fed, n_other_bits=0, n_other_tokens=0) for axis, fed in FED.items()}


def fork(completions: list[Completion], start: int = 0) -> Fork | None:
    """The prefix trie of completions that agree before ``start``."""
    if len(completions) < 2:
        return None
    position = start
    while len({c.token_texts[position : position + 1] for c in completions}) == 1:
        position += 1
    groups: dict[Tokens, list[Completion]] = {}
    for completion in completions:
        groups.setdefault(completion.token_texts[position : position + 1], []).append(completion)
    branches = []
    for token, group in groups.items():
        below = fork(group, position + 1) if token else None
        end = below.position if below else None
        branches.append(
            Branch(
                token_id=hash_id(token[0]) if token else None,
                token_text=token[0] if token else "",
                count=sum(c.count for c in group),
                continuation="".join(group[0].token_texts[position:end]),
                completion_ids=tuple(c.completion_id for c in group),
                fork=below,
            )
        )
    branches.sort(key=lambda branch: -branch.count)
    n_samples = sum(c.count for c in completions)
    return Fork(position, n_samples, 0.0078125, tuple(branches))


def hash_id(token: str) -> int:
    return int.from_bytes(hashlib.sha256(token.encode("utf-8", "replace")).digest()[:2], "big")


def complete(texts: list[tuple[Tokens, int]]) -> tuple[Completion, ...]:
    """Completions from (token texts, count), most frequent first; the first is the reference."""
    reference = texts[0][0] if texts else ()
    total = sum(count for _, count in texts)
    found = []
    for completion_id, (tokens, count) in enumerate(texts, 1):
        longest = range(max(len(tokens), len(reference)) + 1)
        at = next((i for i in longest if tokens[i : i + 1] != reference[i : i + 1]), None)
        found.append(
            Completion(
                completion_id=completion_id,
                count=count,
                n_trials=count,
                share=count / total,
                first_divergence=at,
                divergent_token="".join(tokens[at : at + 1]) if at is not None else None,
                reference_token="".join(reference[at : at + 1]) if at is not None else None,
                margin=0.0078125 if at is not None else None,
                n_tokens=len(tokens),
                finish_reason="length",
                sha256=hashlib.sha256("".join(tokens).encode("utf-8", "replace")).hexdigest(),
                token_ids=np.array([hash_id(token) for token in tokens], np.int32),
                token_texts=tokens,
            )
        )
    return tuple(found)


def probe_summary(
    arm: Arm = "stock",
    texts: list[tuple[Tokens, int]] | None = None,
    probe_id: str = "p1",
    diverged: int = 0,
    n: int = 28,
    latent: int = 0,
    n_errors: int = 0,
    slowdown: float | None = None,
) -> ProbeSummary:
    completions = complete(texts or [])
    n_samples = sum(c.count for c in completions)
    tree = fork(list(completions))
    common = tree.position if tree else (completions[0].n_tokens if completions else 0)
    first = min(
        (c.first_divergence for c in completions if c.first_divergence is not None), default=None
    )
    per_axis = max(n // len(AXES), 1)
    axes, loads = [], []
    for index, axis in enumerate(AXES if n_samples else ()):
        k = min(diverged, per_axis - 1) if index in (1, 3) else 0
        axes.append(
            AxisFinding(
                axis=axis,
                n_trials=per_axis,
                diverged_trials=k,
                latent_trials=latent,
                rate=k / per_axis,
                rate_ci_low=0.0283 if k else 0.0,
                rate_ci_high=0.9949 if k else 1 - 0.025 ** (1 / per_axis),
                first_divergence_min=first if k else None,
                batch_sizes_diverged=(4, 8) if k else (),
                draw="trial" if axis == "run-to-run" else "load",
                n_draws=per_axis,
                diverged_draws=k,
                latent_draws=latent,
                n_confirmed=0,
                told_apart=True if k or (latent and axis != "run-to-run") else None,
                first_latent_min=2 if latent else None,
                batch_sizes_latent=(2, 8) if latent else (),
                tokens=(FED if diverged else FED_ALIKE).get(axis),
            )
        )
        loads += [
            LoadFinding(
                axis=axis,
                batch_size=batch_size,
                slot=batch_size - 1 if axis == "slot" else 0,
                cache_state="chunked" if axis == "cache" else "whole",
                width=4 if axis == "width" else 1,
                scores=axis == "scoring",
                drafts=False,
                n_trials=2,
                n_samples=2 * batch_size,
                n_errors=0,
                n_unique=2 if k and batch_size in (4, 8) else 1,
                n_diverged_trials=1 if k and batch_size in (4, 8) else 0,
                first_divergence_min=first if k and batch_size in (4, 8) else None,
                first_divergence_median=float(first or 0) if k and batch_size in (4, 8) else None,
                latent=latent,
                achieved_batch_size_min=batch_size,
                elapsed_s=0.31,
                tokens_per_s=413.2 * batch_size / (slowdown or 1),
                first_latent_min=2 if latent else None,
                trial_ids=(batch_size, 100 + batch_size),
            )
            for batch_size in (1, 2, 4, 8, 16)
        ]
    measured = n_samples > 0
    return ProbeSummary(
        arm=arm,
        probe_id=probe_id,
        n_trials=n if measured else 0,
        n_samples=n_samples,
        n_errors=n_errors,
        first_error="HTTP 500: no memory\x1b[2J" if n_errors else "",
        n_unique=len(completions),
        modal_count=completions[0].count if completions else 0,
        common_prefix_tokens=common,
        diverged_trials=diverged,
        latent_trials=latent,
        divergence_rate=diverged / n if measured else None,
        rate_ci_low=(0.00346 if diverged else 0.0) if measured else None,
        rate_ci_high=(0.0157 if diverged else 1 - 0.025 ** (1 / n)) if measured else None,
        confidence=0.95,
        unseen_mass=0.0 if measured else None,
        chao1=float(len(completions)) if len(completions) > 1 else None,
        unwitnessed_trials=0,
        elapsed_s=7.25,
        tokens_per_s=1234.5 if measured else None,
        slowdown_vs_stock=slowdown,
        completions=completions,
        axes=tuple(axes),
        loads=tuple(loads),
        control=ControlFinding(3, 3, ("width", "scoring")) if measured else ControlFinding(0, 0),
        find_tree=lambda: tree,
        measure=lambda: Metrics(
            0.0, None, 102.0 if diverged else None, 0.0123, 1.5e-06, 2.0e-07, 1.2e-04
        ),
        draw="load",
        n_draws=n if measured else 0,
        diverged_draws=diverged,
        latent_draws=latent,
        n_unique_bits=len(completions) + latent,
    )


def example(
    *probes: ProbeSummary, spec: RunSpec = DEFAULTS, fisher_p: float | None = None
) -> Findings:
    """Samples that fit the summaries: one for each counted completion, then the failed ones."""
    samples: list[Sample] = []
    columns: list[tuple[int, int, int, float, float]] = []
    for probe in probes:
        outcomes: list[Completion | None] = []
        for completion in probe.completions:
            outcomes += [completion] * completion.count
        outcomes += [None] * probe.n_errors
        for completion in outcomes:
            at = completion.first_divergence if completion else None
            columns.append(
                (
                    completion.completion_id if completion else -1,
                    -1 if at is None else at,
                    -1,
                    np.nan if at is None else 0.1,
                    np.nan if completion is None else 0.015625,
                )
            )
            samples.append(
                Sample(
                    sample_id=len(samples),
                    trial_id=len(samples),
                    arm=probe.arm,
                    probe_id=probe.probe_id,
                    purpose="neighbours",
                    baseline=0,
                    load=Load(3, (1,), (9, 30)),
                    slot=1,
                    witness=Witness(3 if completion else None),
                    token_ids=tuple(completion.token_ids.tolist()) if completion else (),
                    token_texts=completion.token_texts if completion else (),
                    finish_reason="length" if completion else "error",
                    elapsed_s=0.25,
                    error=None if completion else "=cmd(): out of memory\x1b[31m at batch 64",
                )
            )
    values = list(zip(*columns, strict=True)) or [()] * 5
    kinds = (np.int32, np.int32, np.int32, np.float32, np.float32)
    summary = Summary(
        probes=probes,
        samples=SampleColumns(*(np.array(v, k) for v, k in zip(values, kinds, strict=True))),
        fisher_p=fisher_p,
    )
    run = Run(
        run_id="20261124-053329-1f3a",
        ndcheck_version="0.1.0",
        spec=spec,
        environment=ENVIRONMENT,
        started_at="2026-11-24T05:33:29Z",
        status="finished",
        n_trials_planned=28,
        elapsed_s=14.5,
    )
    return Findings(run, samples, summary, judge(run, summary))


PREFIX = (*(f" word{i}" for i in range(96)), " Richard", " Feynman", " was", " born", " in", "")
QUEENS = (*PREFIX, " Queens", ",", " New", " York", ",", " on", " May", " 11", ",", " 1918", ".\n")
CITY = (*PREFIX, " New", " York", " City", ",", " on", " May", " 11", ",", " 1918", ".\n")
FAR = (*QUEENS[:-3], ".", " His", " parents")
HOSTILE = (
    "\x1b[31mred\x1b[0m [red]markup[/red] \u202eabc\u202c 👩‍👩‍👧 日本語\n=cmd()\x00`|`<script>"
)


@pytest.fixture
def failing() -> Findings:
    texts = [(QUEENS, 992), (CITY, 8)]
    spec = replace(DEFAULTS, arms=("stock",), n_samples=1000, batch_sizes=(1, 2, 4, 8, 16, 32))
    return example(probe_summary("stock", texts, diverged=8, n=1000, latent=3), spec=spec)


@pytest.fixture
def two_arms() -> Findings:
    return example(
        probe_summary("stock", [(QUEENS, 190), (CITY, 8), (FAR, 2)], diverged=9),
        probe_summary("invariant", [(QUEENS, 200)], slowdown=1.04),
        fisher_p=0.00123,
    )


@pytest.fixture
def passing() -> Findings:
    spec = replace(DEFAULTS, arms=("invariant",))
    return example(probe_summary("invariant", [(QUEENS, 200)], n=368), spec=spec)


@pytest.fixture
def inconclusive() -> Findings:
    """Half of the samples failed and the planted fault was not caught."""
    probe = probe_summary("stock", [(QUEENS, 100)], n_errors=100)
    return example(replace(probe, control=ControlFinding(1, 0), unwitnessed_trials=3))


@pytest.fixture
def empty() -> Findings:
    return example()


@pytest.fixture
def all_errors() -> Findings:
    return example(probe_summary("stock", n_errors=5), spec=replace(DEFAULTS, arms=("stock",)))


@pytest.fixture
def many() -> Findings:
    """80 completions that part from the first at many positions."""
    texts = [(QUEENS, 500)]
    texts += [((*QUEENS[: 20 + i], f" other{i}", " end"), 80 - i) for i in range(79)]
    return example(probe_summary("stock", texts, diverged=27))


@pytest.fixture
def hostile() -> Findings:
    tokens = (HOSTILE, "=1+1", HOSTILE)
    texts = [(tokens, 3), ((HOSTILE, HOSTILE), 2), ((HOSTILE, "\ud800" + "\u0301" * 500), 1)]
    spec = replace(DEFAULTS, probes=(Probe("=p\x1b[1m", HOSTILE), Probe("-p2", "`" * 5)))
    probes = (
        probe_summary("stock", texts, probe_id="=p\x1b[1m", diverged=3),
        probe_summary("stock", texts, probe_id="-p2", n_errors=1),
    )
    return example(*probes, spec=replace(spec, model="[red]" + HOSTILE))


@pytest.fixture
def latent_only() -> Findings:
    spec = replace(DEFAULTS, arms=("stock",))
    return example(probe_summary("stock", [(QUEENS, 200)], latent=4), spec=spec)


def measured(token_ids: list[list[int]]) -> Findings:
    """A run of one sample for each list, the first the reference, summarised as runs are."""
    spec = replace(
        DEFAULTS,
        arms=("stock",),
        n_samples=len(token_ids),
        decoding=Decoding(max(map(len, token_ids))),
    )
    words = [f" w{i:x}" for i in range(max(map(max, token_ids)) + 1)]
    samples = [
        Sample(
            sample_id=number,
            trial_id=number,
            arm="stock",
            probe_id="p1",
            purpose="neighbours" if number else "reference",
            baseline=0 if number else None,
            load=Load(2, (0,), (9,)) if number else Load(1),
            slot=0,
            witness=Witness(2 if number else 1),
            token_ids=tuple(ids),
            token_texts=tuple(words[i] for i in ids),
            finish_reason="length",
            elapsed_s=0.25,
        )
        for number, ids in enumerate(token_ids)
    ]
    return find(replace(example().run, spec=spec), samples)


@pytest.fixture
def stairs() -> Findings:
    """Each completion leaves the reference one token later than the one before."""
    return measured([[0] * 1000] + [[0] * i + [1] * (1000 - i) for i in range(1, 1000)])


@pytest.fixture(scope="session")
def big() -> Findings:
    """1000 x 1000 tokens that share nothing, out of a vocabulary of 30,000."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 30_000, (1000, 1000))
    ids[:, 0] = np.arange(1000)
    return measured(ids.tolist())
