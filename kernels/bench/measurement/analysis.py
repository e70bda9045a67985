"""Time and peak memory of `summarise` on generated samples.

    PYTHONPATH=kernels python -m bench.measurement.analysis

Samples come from a generator, as they do from a file, so the memory is that of the analysis; the
time to generate them is measured alone and subtracted. Each case runs in a fresh process. Every
sample carries log-probabilities, margins and row digests.
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.summarising import summarise
from ndcheck.analysis.tree import Fork
from ndcheck.records import AXES, Decoding, Load, Probe, RunSpec, Sample, Witness

VOCABULARY = tuple(f" word{i}" for i in range(50_000))
BATCH_SIZE = 32
CASES = (  # samples, tokens, distinct continuations (0: every sample has its own)
    (1_000, 1_000, 37),
    (1_000, 1_000, 0),
    (1_000_000, 100, 80),
    (1_000_000, 100, 0),
)


class Stopwatch:
    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall_s = time.perf_counter() - self._wall_s
        self.cpu_s = time.process_time() - self._cpu_s


def make_spec(n_samples: int, n_tokens: int) -> RunSpec:
    return RunSpec(
        model="generated",
        probes=(Probe("p1", "prompt"),),
        decoding=Decoding(max_tokens=n_tokens),
        batch_sizes=(1, BATCH_SIZE),
        axes=AXES,
        mode="copies",
        n_samples=n_samples,
    )


def generate(n_samples: int, n_tokens: int, n_distinct: int) -> Iterator[Sample]:
    """A reference, then batches of copies; each row leaves the reference at a random token."""
    rng = np.random.default_rng(0)

    def tokens() -> NDArray[np.int64]:
        # Most tokens of a text are among the few that are frequent.
        return (len(VOCABULARY) * rng.random(n_tokens) ** 4).astype(np.int64)

    def stream() -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
        values = rng.random(n_tokens, np.float32)
        digests = tuple(f"{d:016x}" for d in rng.integers(0, 2**63, n_tokens).tolist())
        return tuple((-values).tolist()), tuple(values.tolist()), digests

    def continuation(i: int) -> tuple[int, ...]:
        # A numbered tail keeps completions distinct wherever they leave the reference.
        tail = tokens()
        tail[-2:] = divmod(i, 1000)
        start = rng.integers(1, n_tokens - 2)
        return (*reference[:start], *tail[start:].tolist())

    reference = tuple(tokens().tolist())
    streams = [stream() for _ in range(64)]
    distinct = [reference, *(continuation(i) for i in range(1, n_distinct))]
    load, alone = Load(BATCH_SIZE, tuple(range(BATCH_SIZE))), Load(1)
    for i in range(n_samples):
        trial_id = 0 if i == 0 else 1 + (i - 1) // BATCH_SIZE
        if n_distinct:
            token_ids = distinct[int(n_distinct * rng.random() ** 4)] if i else reference
        else:
            token_ids = continuation(i) if i else reference
        logprobs, margins, digests = streams[i % len(streams)]
        yield Sample(
            sample_id=i,
            trial_id=trial_id,
            arm="stock",
            probe_id="p1",
            purpose="batch-size" if i else "reference",
            baseline=0 if i else None,
            load=load if i else alone,
            slot=(i - 1) % BATCH_SIZE if i else 0,
            witness=Witness(BATCH_SIZE if i else 1),
            token_ids=token_ids,
            token_texts=tuple(map(VOCABULARY.__getitem__, token_ids)),
            finish_reason="length",
            elapsed_s=1.0,
            logprobs=logprobs,
            margins=margins,
            row_digests=digests,
        )


class Stream:
    """Samples that can be read twice, as those of a run's directory can."""

    def __init__(self, case: tuple[int, int, int]) -> None:
        self._case = case

    def __iter__(self) -> Iterator[Sample]:
        return generate(*self._case)


def count_forks(fork: Fork | None) -> int:
    """Look at the whole tree, as the largest report would."""
    n_forks, open_forks = 0, [fork] if fork else []
    while open_forks:
        n_forks += 1
        open_forks += [b.fork for b in open_forks.pop().branches if b.fork]
    return n_forks


def measure(n_samples: int, n_tokens: int, n_distinct: int) -> None:
    case = n_samples, n_tokens, n_distinct
    generating = Stopwatch()
    for _ in generate(*case):
        pass
    generating.stop()
    page_kib = resource.getpagesize() // 1024
    before_kib = int(Path("/proc/self/statm").read_text().split()[1]) * page_kib
    summarising = Stopwatch()
    summary = summarise(Stream(case), make_spec(n_samples, n_tokens))
    summarising.stop()
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    (probe,) = summary.probes
    line = (
        f"{n_samples:>9} samples x {n_tokens:>4} tokens, {probe.n_unique:>7} unique: "
        f"{summarising.cpu_s - generating.cpu_s:5.2f} s CPU "
        f"({summarising.wall_s - generating.wall_s:5.2f} s wall), +{peak_mib:4.0f} MiB"
    )
    if n_samples <= 1_000:
        walking = Stopwatch()
        n_forks = count_forks(probe.tree)
        walking.stop()
        line += f"; all {n_forks} forks: {walking.cpu_s:.2f} s CPU"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    sys.stdout.write(
        f"{cpu}, one core, Python {platform.python_version()}, NumPy {np.__version__}\n"
    )
    sys.stdout.flush()
    processes = multiprocessing.get_context("spawn")
    for case in CASES:
        process = processes.Process(target=measure, args=case)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"case {case} failed")


if __name__ == "__main__":
    main()
