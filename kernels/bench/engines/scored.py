"""Completions of an 8B shape, recorded by four computers and scored again by five.

    PYTHONPATH=.:kernels python -m bench.engines.scored OUT_DIR [--tiny] [--parts ndcheck,vllm]

On one GPU of 140 GB, with vLLM installed; about three minutes on an H200, most of it vLLM's two
starts. Qwen3-8B's config with random bf16 weights (seed 0), greedily, alone. Recorded by ndcheck's
arms and by vLLM's modes; scored in one pass by these and by fp32 weights. ``--parts ndcheck``
leaves vLLM out, and ``--tiny`` is that with a tiny shape on a CPU.

Writes scores.csv as it goes, a row for each pair of computers; a recording as JSON lines for each
of the first; difference.png, of ndcheck's arms by fp32; environment.json. Fails where a unit in
the last place, planted at index 97 of every completion, is not found there and nowhere else, where
a scorer passes its control unseen, or where ndcheck's invariant arm does not score its own
completions with equal bits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.models.decode import SHAPES
from bench.table import Table
from ndcheck import environment
from ndcheck.records import ARMS, Decoding, Engine, Load, Probe, RunSpec, Trial
from ndcheck.reports.scoring import figure
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.scoring.comparing import PERCENTILES, Comparison, compare
from ndcheck.scoring.completions import Completion
from ndcheck.scoring.local import LocalScorer
from ndcheck.scoring.scorers import Score, Scored, Scorer, score_all

N_TOKENS, PLANTED_AT = 128, 97
PROMPTS = (
    "class Queue:",
    "Tell me about Richard Feynman.",
    "The order of a sum of floating-point numbers",
    "def attention(q, k, v):",
    "Once upon a time there was a scheduler",
    "import torch",
)
PROBES = tuple(Probe(f"p{i}", prompt) for i, prompt in enumerate(PROMPTS, 1))
ENGINE = Engine(
    invariant_by="vllm",
    arguments=(
        # vLLM would else measure what is free, which others on the card may change meanwhile.
        "gpu_memory_utilization=0.1",
        "kv_cache_memory_bytes=8000000000",
        "max_num_batched_tokens=2048",
        "max_model_len=1024",
        "enforce_eager=true",
    ),
)


def record(sampler: Any, name: str, out: Path) -> dict[str, list[Completion]]:
    """What each arm gives every prompt alone, also as a file."""
    found: dict[str, list[Completion]] = {}
    for arm in ARMS:
        lines = []
        for i, probe in enumerate(PROBES):
            trial = Trial(i, arm, probe.probe_id, "reference", Load(1), i)
            (sample,) = sampler.sample(trial, probe, Decoding(N_TOKENS))
            ids = tuple(sampler.encode(probe.content))
            values, ranks = np.array(sample.logprobs), np.ones(len(sample.token_ids), np.int64)
            found.setdefault(f"{name} {arm}", []).append(
                Completion(probe.probe_id, arm, ids, sample.token_ids, values, ranks)
            )
            line = {
                "prompt_ids": ids,
                "completion_ids": sample.token_ids,
                "logprobs": sample.logprobs,
                "ranks": ranks.tolist(),
            }
            lines.append(json.dumps(line, separators=(",", ":")))
        (out / f"{name}-{arm}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def add_row(
    table: Table, recorded_by: str, scored_by: str, found: Comparison, control: str
) -> None:
    percentiles = zip(PERCENTILES, found.ratio_percentiles, strict=True)
    table.add(
        recorded_by=recorded_by,
        scored_by=scored_by,
        control=control,
        n_completions=len(found.completions),
        n_tokens=found.n_tokens,
        n_differ=found.n_differ,
        first_difference="" if found.first_difference is None else found.first_difference,
        max_difference=f"{found.max_difference:.4g}",
        mean_difference=f"{found.mean_difference:.4g}",
        k1_kl=f"{found.k1_kl:.4g}",
        k3_kl=f"{found.k3_kl:.4g}",
        **{f"ratio_p{percentile}": f"{ratio:.6g}" for percentile, ratio in percentiles},
        n_outside_clip=found.n_outside_clip,
        n_rank_changes=found.n_rank_changes,
        n_parted=found.n_parted,
        first_parting="" if found.first_parting is None else found.first_parting,
    )


def planted(scored: Scored) -> Scored:
    """One unit in the last place, at one index of every completion that reaches it."""
    scores = {}
    for pair, score in scored.scores.items():
        values = score.logprobs.copy()
        if len(values) > PLANTED_AT:
            values[PLANTED_AT] = np.nextafter(np.float32(values[PLANTED_AT]), np.float32(-99))
        scores[pair] = Score(values, score.ranks)
    return replace(scored, scores=scores)


def failures(recorded_by: str, completions: list[Completion], scored: Scored) -> Iterator[str]:
    """What must not be of an arm's own scores, nor of these with the planted fault."""
    (own,) = compare(completions, scored)
    if own.n_differ:
        yield f"{recorded_by} scores {own.n_differ} of its own tokens with other bits"
        return
    (found,) = compare(completions, planted(scored))
    firsts = {x.first_difference for x in found.completions if len(x.difference) > PLANTED_AT}
    if firsts != {PLANTED_AT} or found.n_differ != len(found.completions):
        yield f"{recorded_by}: the fault planted at index {PLANTED_AT} was seen at {firsts}"


def open_engine(spec: RunSpec) -> Any:
    from ndcheck.samplers.vllm.sampler import EngineSampler

    return EngineSampler(replace(spec, engine=ENGINE), ENGINE)


def measure(out: Path, *, is_tiny: bool, with_vllm: bool) -> int:
    started = time.perf_counter()
    spec = replace(
        DEFAULTS,
        model=str(SHAPES / ("tiny" if is_tiny else "qwen3-8b")),
        probes=PROBES,
        decoding=Decoding(N_TOKENS),
        batch_sizes=(1,),
        axes=("run-to-run",),
        device="cpu" if is_tiny else "auto",
        random_weights=0,
    )
    table, wrong = Table(out / "scores.csv"), []
    with ExitStack() as stack:
        sampler = stack.enter_context(closing(TransformersSampler(spec)))
        recorded = record(sampler, "ndcheck", out)
        exact = stack.enter_context(
            closing(TransformersSampler(replace(spec, dtype="fp32", arms=("stock",))))
        )
        scorers: dict[str, Scorer] = {
            **{f"ndcheck {arm}": LocalScorer(sampler, arm) for arm in ARMS},
            "fp32": LocalScorer(exact, "stock"),
        }
        if with_vllm:
            from ndcheck.scoring.engine import EngineScorer

            engine = stack.enter_context(closing(open_engine(spec)))
            recorded |= record(engine, "vllm", out)
            scorers |= {f"vllm {arm}": EngineScorer(engine, arm) for arm in ARMS}
        by_fp32 = []
        for recorded_by, completions in recorded.items():
            for scored_by, scorer in scorers.items():
                scored = score_all(completions, scorer)
                (found,) = compare(completions, scored)
                add_row(table, recorded_by, scored_by, found, scored.control)
                if scored.control != "caught":
                    wrong.append(f"{scored_by} missed the control")
                if recorded_by == scored_by == "ndcheck invariant":
                    wrong += failures(recorded_by, completions, scored)
                if scored_by == "fp32" and recorded_by.startswith("ndcheck"):
                    by_fp32.append(found)
    here = asdict(environment.capture(sampler.describe()))
    about = {**here, "elapsed_s": round(time.perf_counter() - started, 1)}
    (out / "environment.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    try:
        (out / "difference.png").write_bytes(figure.draw(by_fp32, ".png"))
    except ImportError:
        print("no figure: matplotlib is not installed")
    print(f"{about['elapsed_s']} s; {'; '.join(wrong) or 'all controls were caught'}")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", default="ndcheck,vllm")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with_vllm = "vllm" in options.parts.split(",") and not options.tiny
    return measure(options.out, is_tiny=options.tiny, with_vllm=with_vllm)


if __name__ == "__main__":
    sys.exit(main())
