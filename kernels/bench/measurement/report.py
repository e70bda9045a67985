"""CPU time and peak memory of `ndcheck report` on a run of many prompts.

    PYTHONPATH=kernels python -m bench.measurement.report FOLDER [PROMPTS]

Plans, measures and writes a run of PROMPTS (10,000) prompts and 10 samples of each, in one arm and
in both; only the completions are made up. Stock gives other bits at each batch size, and one prompt
in ten another token; the invariant arm gives what the probe gave alone. Each report is made by a
process of its own, three times: the fastest counts, as others use the machine too.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ndcheck.records import Decoding, Probe, Sample, Trial, Witness
from ndcheck.request import make_spec
from ndcheck.runner import begin, fit_spec, new_directory, plan, run_trials
from ndcheck.samplers.scripted.sampler import ScriptedSampler

N_PROMPTS, N_SAMPLES, N_TOKENS = 10_000, 10, 16
VOCABULARY = tuple(f" {word}" for word in ("the", "of", "größer", "\n", "“so”", "=", "1", "apples"))
N_REPEATS = 3
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

Columns = tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...], tuple[str, ...]]


@lru_cache(64)
def stream(key: str) -> Columns:
    """Token ids, log-probabilities, margins and digests, drawn from ``key``."""
    rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(key.encode()).digest()[:8], "big"))
    values = rng.random((2, N_TOKENS), np.float32)
    return (
        tuple(rng.integers(0, 50_000, N_TOKENS).tolist()),
        tuple((-values[0]).tolist()),
        tuple(values[1].tolist()),
        tuple(f"{d:016x}" for d in rng.integers(0, 2**63, N_TOKENS).tolist()),
    )


class PlantedSampler(ScriptedSampler):
    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        name, load = probe.probe_id, trial.load
        forks = int(hashlib.blake2b(name.encode()).hexdigest()[:8], 16) % 10 == 0
        token_ids, *bits = stream(name)
        at, is_other, other_bits = len(token_ids), False, bits
        if trial.fault is not None:
            at, is_other = trial.fault.latent_at, True
            other_bits = list(stream(f"{name} {trial.fault.latent_at}")[1:])
        elif trial.arm == "stock" and load.batch_size > 1:
            at = len(name) % N_TOKENS
            other_bits = list(stream(f"{name} {load.batch_size}")[1:])
            is_other = forks
        found = [(*a[:at], *b[at:]) for a, b in zip(bits, other_bits, strict=True)]
        if is_other:
            fork_at = trial.fault.fork_at if trial.fault else N_TOKENS // 2
            token_ids = (*token_ids[:fork_at], token_ids[fork_at] + 1, *token_ids[fork_at + 1 :])
        elapsed_s = 0.3 + load.batch_size / (997 + trial.trial_id)
        return [
            replace(
                Sample.of(
                    trial, nth, Witness(load.batch_size, 1, N_TOKENS - 1), "length", elapsed_s
                ),
                token_ids=token_ids,
                token_texts=tuple(VOCABULARY[t % len(VOCABULARY)] for t in token_ids),
                logprobs=found[0],
                margins=found[1],
                row_digests=found[2],
            )
            for nth in range(trial.n_samples)
        ]


def write_run(folder: Path, kernels: str, n_prompts: int) -> None:
    prompts = folder.with_suffix(".jsonl")
    lines = ({"id": f"q{i}", "prompt": f"How many are {i} apples?"} for i in range(n_prompts))
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    spec = make_spec(
        model="scripted:clean",
        prompts_file=prompts,
        samples=N_SAMPLES,
        loads="1,2,4",
        max_tokens=N_TOKENS,
        kernels=kernels,
        axes="run-to-run,batch-size,slot",
    )
    sampler = PlantedSampler("clean")
    with closing(new_directory("report", folder)) as new:
        spec = fit_spec(spec, sampler)
        trials = plan(spec, sampler)
        with closing(begin(new, spec, sampler, trials)) as directory:
            run_trials(trials, sampler, directory)


def report(folder: Path) -> tuple[float, float]:
    """CPU seconds and peak memory in MiB of one report."""
    command = [sys.executable, "-m", "ndcheck", "report", str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **ONE_CORE})
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"no report of {folder}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(arguments: Sequence[str]) -> None:
    root, n_prompts = Path(arguments[0]), int(arguments[1]) if arguments[1:] else N_PROMPTS
    root.mkdir(parents=True, exist_ok=True)
    print(f"Python {platform.python_version()}, NumPy {np.__version__}")
    for kernels in ("stock", "stock,invariant"):
        folder = root / kernels.replace(",", "-")
        if not folder.exists():
            write_run(folder, kernels, n_prompts)
        cpu_s, mib = map(min, zip(*(report(folder) for _ in range(N_REPEATS)), strict=True))
        size = (folder / "samples.jsonl").stat().st_size
        print(
            f"{n_prompts} x {N_SAMPLES}, {kernels}: {size >> 20} MiB of samples, "
            f"{cpu_s:.1f} s CPU, {mib:.0f} MiB"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
