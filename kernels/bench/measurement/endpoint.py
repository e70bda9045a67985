"""What a request costs the client.

    PYTHONPATH=kernels python -m bench.measurement.endpoint

A mock server in another process answers 16 trials of 64 requests in flight, three times over; the
CPU time is this process's own, polling of metrics included, and the memory is what it gained after
the first trial. ``text`` is streamed, an event a token, since its streams are the witness.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ndcheck.records import Decoding, Endpoint, Load, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.endpoint.sampler import EndpointSampler

IN_FLIGHT, N_TRIALS, N_ROUNDS = 64, 16, 3
CASES = (("vllm", 1), ("vllm", 16), ("vllm", 64), ("text", 1), ("text", 16))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(flavour: str, n_tokens: int) -> None:
    """Print the figures of one kind of server and completion length."""
    command = [sys.executable, "-m", "ndcheck", "mock-server", "--flavour", flavour]
    with subprocess.Popen([*command, "--step-ms", "10"], stdout=subprocess.PIPE, text=True) as mock:
        url = mock.stdout.readline().strip()
        endpoint = Endpoint(url)
        decoding = Decoding(n_tokens)
        spec = replace(DEFAULTS, model="mock", decoding=decoding, batch_sizes=(IN_FLIGHT,))
        load = Load(IN_FLIGHT, tuple(range(IN_FLIGHT)))
        try:
            with closing(EndpointSampler(spec, endpoint, {})) as sampler:

                def run_trial(number: int) -> None:
                    trial = Trial(number, "stock", "p1", "batch-size", load, 0)
                    samples = sampler.sample(trial, spec.probes[0], decoding)
                    assert not any(sample.error for sample in samples)

                run_trial(0)
                before_mib, costs_ms = resident_mib(), []
                for _ in range(N_ROUNDS):
                    started = time.process_time()
                    for number in range(N_TRIALS):
                        run_trial(number)
                    cpu_s = time.process_time() - started
                    costs_ms.append(1000 * cpu_s / (N_TRIALS * IN_FLIGHT))
                gained_mib = resident_mib() - before_mib
        finally:
            mock.kill()
    shown = ", ".join(f"{cost:.2f}" for cost in costs_ms)
    sys.stdout.write(
        f"{flavour:5} {n_tokens:3} tokens: {shown} ms of CPU a request, +{gained_mib:.1f} MiB\n"
    )


if __name__ == "__main__":
    for case in CASES:
        measure(*case)
