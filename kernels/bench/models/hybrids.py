"""A hybrid of attention and recurrent layers: verdicts, decode step and prefill of both arms.

    PYTHONPATH=kernels python -m bench.models.hybrids OUT_DIR [--shape nemotron-h-8b]
        [--whole | --profile]

First the times of the recurrence alone; then with four layers of each kind the verdict on every
property, over a few loads of short prompts, in both arms (the stock arm is the control), and the
times of a captured decode step and of a prefill. With `--whole` both of all layers too. What
OUT_DIR holds already is not measured again, so a run cut short goes on.

With `--profile` only where the host spends a prefill of 1 x 512 (`host_profile`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.models.decode import SHAPES, step_ms
from bench.models.host_profile import write_host_profile
from bench.models.support import QUICK, run_loads
from bench.table import Table, rows_of
from ndcheck.records import AXES, Arm, Decoding, Probe, RunSpec
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck_kernels.cuda.recurrent.gated_delta import gated_delta_rule
from ndcheck_kernels.cuda.recurrent.selective_scan import selective_scan
from ndcheck_kernels.measure.timing import elapsed_us, medians_us
from ndcheck_kernels.models.rows.norms import composed_norms

ARMS: tuple[Arm, ...] = ("invariant", "stock")
BATCHES = (1, 8, 64)
PREFILLS = ((1, 512), (1, 2048), (8, 512), (8, 2048))
LAYERS_OF_A_KIND = 4
REPEATS = 3


@contextmanager
def few_layers(shape: Path) -> Iterator[Path]:
    """A directory with the shape's config, of LAYERS_OF_A_KIND layers of each kind."""
    config = json.loads((shape / "config.json").read_text())
    if "hybrid_override_pattern" in config:  # Nemotron-H: a scan, attention or an MLP.
        pattern = config["hybrid_override_pattern"] = "M*-" * LAYERS_OF_A_KIND
        config["num_hidden_layers"] = len(pattern)
    else:
        del config["full_attention_interval"]
        config["layer_types"] = ["linear_attention", "full_attention"] * LAYERS_OF_A_KIND
        config["num_hidden_layers"] = len(config["layer_types"])
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        yield Path(directory)


def open_spec(model: Path) -> RunSpec:
    return replace(
        DEFAULTS,
        model=str(model),
        random_weights=0,
        probes=(Probe("p1", QUICK.prompt),),
        decoding=Decoding(QUICK.max_tokens),
        batch_sizes=(1, 3, 8),
        axes=AXES,
        mode="mixed",
        n_samples=QUICK.n_samples,
        arms=ARMS,
    )


def prefill_ms(sampler: TransformersSampler, arm: Arm, n_rows: int, n_tokens: int) -> float:
    """Median of REPEATS, after one that compiles."""
    rows = [[(7 * i + j) % 4096 for j in range(n_tokens)] for i in range(n_rows)]
    with torch.inference_mode(), sampler.arm(arm):
        batch = ExactBatch(sampler.model, sampler._device, n_rows, n_tokens + 1)
        times = []
        for _ in range(REPEATS + 1):
            batch.reset(rows)
            times.append(elapsed_us(lambda: batch.compute_prompt("whole"), sampler._device.type))
    return statistics.median(times[1:]) / 1000


def scan_us(config: Any, n_rows: int, n_tokens: int) -> float:
    """Of the selective scan alone, over a projection that x, B and C are views of."""
    heads, features = config.mamba_num_heads, config.mamba_head_dim
    groups, states = config.n_groups, config.ssm_state_size

    def launch() -> Callable[[], object]:
        joined = torch.randn(
            n_rows, n_tokens, heads * features + 2 * groups * states, device="cuda"
        ).bfloat16()
        x, b, c = joined.split([heads * features, groups * states, groups * states], -1)
        b, c = (v.unflatten(-1, (groups, states)) for v in (b, c))
        dt = torch.rand(n_rows, n_tokens, heads, device="cuda")
        state = torch.zeros(n_rows, heads, features, states, device="cuda")
        x, decays = x.unflatten(-1, (heads, features)), -dt[0, 0]
        return lambda: selective_scan(x, dt, decays, b, c, decays, state)

    return medians_us({"": [launch()]})[""]


def recurrence_us(config: object, n_rows: int, n_tokens: int) -> float:
    """Of the gated delta rule alone, over a projection that q, k and v are views of."""
    key_heads, heads, d, d_v = (
        getattr(config, f"linear_{name}")
        for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    )
    here = {"device": "cuda", "dtype": torch.bfloat16}

    def launch() -> Callable[[], object]:
        joined = torch.randn(n_rows, n_tokens, 2 * key_heads * d + heads * d_v, **here)
        q, k, v = joined.split([key_heads * d, key_heads * d, heads * d_v], -1)
        decay = -torch.rand(n_rows, n_tokens, heads, device="cuda")
        state = torch.zeros(n_rows, heads, d, d_v, device="cuda")
        shaped = [x.unflatten(-1, (-1, size)) for x, size in ((q, d), (k, d), (v, d_v))]
        return lambda: gated_delta_rule(*shaped, decay, decay.exp(), state, True)

    return medians_us({"": [launch()]})[""]


def arm_ms(
    sampler: TransformersSampler, arm: Arm, what: str, n_rows: int, n_tokens: int
) -> tuple[float | None, str]:
    """The time, or None and why there is none: the other arm's tells by itself."""
    try:
        if what == "decode":
            return step_ms(sampler, arm, n_rows), ""
        return prefill_ms(sampler, arm, n_rows, n_tokens), ""
    except RuntimeError as error:  # Out of memory, or not captured.
        return None, f"{arm}: {str(error).splitlines()[0]}"


def measure_times(open_sampler: Callable[[], TransformersSampler], name: str, table: Table) -> None:
    cells = [("decode", n, 1) for n in BATCHES] + [("prefill", *sizes) for sizes in PREFILLS]
    known = {(row["model"], row["what"], int(str(row["rows"])), int(str(row["tokens"])))
             for row in table.rows}  # fmt: skip
    wanted = [cell for cell in cells if (name, *cell) not in known]
    if not wanted:
        return
    sampler = open_sampler()
    for cell in wanted:
        ms, notes = {}, []
        for arm in ARMS:
            ms[arm], note = arm_ms(sampler, arm, *cell)
            notes += [note] if note else []
            if sampler._device.type == "cuda":
                torch.cuda.empty_cache()
        ours, stock = (ms[arm] for arm in ARMS)
        what, n_rows, n_tokens = cell
        table.add(
            model=name, what=what, rows=n_rows, tokens=n_tokens, invariant_ms=ours, stock_ms=stock,
            slowdown=None if ours is None or stock is None else ours / stock,
            note="; ".join(notes),
        )  # fmt: skip


def measure_recurrences(config: Any, table: Table) -> None:
    has_scan = hasattr(config, "mamba_num_heads")
    for n_rows, n_tokens in (*((n, 1) for n in BATCHES), *PREFILLS):
        us = (scan_us if has_scan else recurrence_us)(config, n_rows, n_tokens)
        what = "selective scan" if has_scan else "gated delta rule"
        table.add(what=what, rows=n_rows, tokens=n_tokens, us=us)


def measure_verdicts(sampler: TransformersSampler, spec: RunSpec, name: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        verdicts = run_loads(sampler, spec, Path(scratch) / "run")
    path.write_text(json.dumps(verdicts, indent=1))
    for arm, outcome in verdicts.items():
        print(name, arm, json.dumps(outcome), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="qwen3.5-9b")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    out, shape = options.out, SHAPES / options.shape
    out.mkdir(parents=True, exist_ok=True)
    name = f"{options.shape}, {LAYERS_OF_A_KIND} layers of each kind"
    with few_layers(shape) as directory:
        spec = open_spec(directory)

        @cache
        def few() -> TransformersSampler:
            return TransformersSampler(spec)

        if options.profile:
            if torch.cuda.is_available():
                with composed_norms(few().model) as n_norms:
                    print(f"{n_norms} RMSNorm modules are one launch each", flush=True)
            for arm in ARMS:
                print(
                    write_host_profile(out / f"host-{arm}.txt", few(), arm, *PREFILLS[0]),
                    flush=True,
                )
            return
        earlier = rows_of(out / "times.csv")
        times = Table(out / "times.csv", echo=True)
        for row in earlier:
            times.add(**{**row, "note": row.get("note", "")})
        if torch.cuda.is_available() and len(rows_of(out / "recurrence.csv")) < len(
            BATCHES + PREFILLS
        ):
            measure_recurrences(few().model.config, Table(out / "recurrence.csv", echo=True))
        if not (out / "verdicts.json").exists():
            measure_verdicts(few(), spec, name, out / "verdicts.json")
        measure_times(few, name, times)
        few.cache_clear()
    if options.whole:
        spec = open_spec(shape)
        whole = cache(lambda: TransformersSampler(spec))
        if not (out / "verdicts-whole.json").exists():
            measure_verdicts(whole(), spec, options.shape, out / "verdicts-whole.json")
        measure_times(whole, options.shape, times)


if __name__ == "__main__":
    sys.exit(main())
