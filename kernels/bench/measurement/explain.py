"""Explain an 8B-shaped model's nondeterminism on one GPU: the tables of results/explain.

Writes six files to the directory given; under four minutes on one H100. Weights are random, seed
0, so nothing is downloaded. ``--tiny`` runs the same on small shapes, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ndcheck import environment
from ndcheck.errors import NdcheckError
from ndcheck.explain.alignment import equal_bits
from ndcheck.explain.modules import ModulePath
from ndcheck.explain.order.folding import fold, phrase
from ndcheck.explain.order.orders import sweep
from ndcheck.explain.order.reductions import REDUCTIONS, Shape
from ndcheck.explain.recording import op_name
from ndcheck.explain.tracing import Tracer
from ndcheck.records import Decoding, Load, Probe
from ndcheck.reports.explain.trace import Explanation, trace_document, trace_lines
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.sampler import digest_weights
from ndcheck_kernels.models.caches.argument import cache_argument

QWEN3_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
N_PROMPT = 20
BUDGET_S = 140
PHRASE_LENGTH = 160


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; batch sizes end with the one whose kernel names are shown."""

    config: dict[str, int]
    batch_sizes: tuple[int, ...]
    products: tuple[tuple[int, int], ...]  # (N, K)
    rows: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    heads: int
    attention_batch: int
    n_decode: int


FULL = Sizes(
    QWEN3_8B,
    (2, 4, 8, 16, 128, 32),
    ((4096, 4096), (6144, 4096), (1280, 8192)),
    (1, 2, 3, 4, 8, 16, 17, 32, 64, 65, 128, 129, 256, 512),
    (64, 96, 112, 120, 127, 128, 129, 130, 136, 144, 160, 192, 256, 257),
    32,
    32,
    150,
)
SMALL = Sizes(TINY, (2, 4), ((48, 96), (32, 600)), (1, 2, 4), (8, 16), 4, 4, 12)


class RandomModel:
    """As much of a sampler as a trace needs: a model with random weights and a random prompt."""

    context = 512

    def __init__(self, config: dict[str, int], device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.Qwen3Config(**config), dtype=torch.bfloat16
            )
        self.model = model.to(device).eval()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config["vocab_size"], (N_PROMPT,), generator=generator)
        self.prompt = ids.tolist()

    def count_tokens(self, prompt: str) -> int:
        return len(self.prompt)

    def rows(self, load: Load, probe: Probe) -> list[list[int]]:
        return [self.prompt] * load.batch_size

    def open_batch(self, rows: list[list[int]], max_tokens: int) -> ExactBatch:
        width = max(map(len, rows)) + max_tokens
        batch = ExactBatch(self.model, self.model.device, len(rows), width)
        batch.reset(rows)
        return batch

    def arm(self, arm: str, *, fuse: bool = True) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


class FirstUnevenOp(TorchDispatchMode):
    """Notes the first op that gives other bits to some row, where row 0 has the same inputs."""

    def __init__(self, path: ModulePath, batch_size: int) -> None:
        super().__init__()
        self.path, self.batch_size = path, batch_size
        self.first: tuple[str, str, int, str] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            self.first is None
            and isinstance(result, torch.Tensor)
            and result.is_floating_point()
            and result.dim() > 1
            and result.shape[0] == self.batch_size
            and not equal_bits(result, result[:1].expand_as(result))
        ):
            n_uneven = sum(not equal_bits(row, result[0]) for row in result)
            kernels = launched(lambda: func(*args, **(kwargs or {})))
            self.first = op_name(func), self.path.path, n_uneven, " + ".join(kernels)
        return result


def trace_introducers(sampler: RandomModel, sizes: Sizes, out: Path) -> None:
    """Which ops introduce a difference, at which batch sizes, by which kernels."""
    probe, explanations = Probe("p1", "random"), []
    for step in (0, 1):
        tracer = Tracer(sampler, probe, step, decoding=Decoding(8))
        alone = tracer.record_alone()
        loads = [Load(n, tuple(range(n))) for n in sizes.batch_sizes]
        traces = [tracer.trace(load, load.batch_size - 1, alone) for load in loads]
        explanations.append(Explanation(step, traces, None))
    setting = {"model": "Qwen3 8B shape" if sizes is FULL else "tiny", "kernels": "stock"}
    document = trace_document(setting, explanations)
    for step in document["steps"]:
        for load in step["loads"]:
            del load["ops"]  # 2800 a load; the groups say what matters
    (out / "introducers.json").write_text(json.dumps(document, indent=1) + "\n")
    title = f"{setting['model']}, bfloat16, random weights, stock kernels"
    (out / "introducers.txt").write_text("\n".join(trace_lines(title, explanations, 100)) + "\n")


def read_products(sizes: Sizes, device: torch.device, out: Path, started: float) -> None:
    """The digest of the order of addition by M, for products of several shapes."""
    rows = []
    for n_columns, n_terms in sizes.products:
        shape = Shape(n_terms, n_columns, torch.bfloat16, device)
        for m in sizes.rows:
            if time.perf_counter() - started > BUDGET_S:
                rows.append([n_columns, n_terms, m, "", "", "", "", "not read: out of time"])
                continue
            try:
                (point,) = sweep(REDUCTIONS["mm"], shape, [(m, n_terms)])
            except NdcheckError as error:
                rows.append([n_columns, n_terms, m, "", "", "", "", str(error)])
                continue
            if point.problem is not None:
                rows.append([n_columns, n_terms, m, "", "", "", "", point.problem])
                continue
            tree = point.orders[0].tree
            digests = " ".join(order.tree.digest for order in point.orders)
            form = phrase(fold(tree))[:PHRASE_LENGTH]
            evidence = point.orders[0].evidence
            repeats = point.is_repeatable
            rows.append(
                [n_columns, n_terms, m, digests, tree.largest_fan_in, evidence, repeats, form]
            )
    header = ["n", "k", "m", "digests", "largest_fan_in", "evidence", "is_repeatable", "form"]
    write_csv(out / "order.csv", header, rows)


@torch.inference_mode()
def compare_attention_rows(sizes: Sizes, device: torch.device, out: Path) -> None:
    """Rows of one call with identical contents: does attention give them one result?"""
    generator = torch.Generator().manual_seed(0)
    rows = []
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type == "cuda":
        backends.append(SDPBackend.CUDNN_ATTENTION)
    for length in sizes.kv_lengths:
        query, key, value = (
            torch.randn(1, sizes.heads, n, 128, generator=generator)
            .to(device, torch.bfloat16)
            .expand(sizes.attention_batch, -1, -1, -1)
            .contiguous()
            for n in (1, length, length)
        )
        for backend in backends:
            try:
                with sdpa_kernel(backend):
                    run = torch.nn.functional.scaled_dot_product_attention
                    result = run(query, key, value)
                    alone = run(query[:1], key[:1], value[:1])
                    kernels = launched(lambda run=run, a=(query, key, value): run(*a))
            except RuntimeError as error:
                rows.append([backend.name, length, "", "", "", str(error).splitlines()[0][:80]])
                continue
            n_uneven = sum(not equal_bits(row, result[0]) for row in result)
            n_other = sum(not equal_bits(row, alone[0]) for row in result)
            names = " + ".join(kernels)[:PHRASE_LENGTH]
            rows.append([backend.name, length, sizes.attention_batch, n_uneven, n_other, names])
    header = ["backend", "kv_length", "rows", "rows_unlike_row_0", "rows_unlike_alone", "kernels"]
    write_csv(out / "attention.csv", header, rows)


def launched(call: Callable[[], object]) -> list[str]:
    """Names of the GPU kernels of a call, each once; none on a CPU."""
    if not torch.cuda.is_available():
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    return list(dict.fromkeys(e.name for e in events if str(e.device_type).endswith("CUDA")))


@torch.inference_mode()
def decode_copies(sampler: RandomModel, sizes: Sizes, out: Path) -> None:
    """Copies of one prompt in one batch, growing cache: the first op to tell the rows apart."""
    batch_size, model = sizes.attention_batch, sampler.model
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.tensor([sampler.prompt] * batch_size, device=model.device)
    rows, name = [], cache_argument(model.forward)
    with ModulePath(model) as path:
        for step in range(sizes.n_decode):
            mode = FirstUnevenOp(path, batch_size)
            with mode:
                logits = model(ids, use_cache=True, **{name: cache}).logits[:, -1]
            n_logits = sum(not equal_bits(row, logits[0]) for row in logits)
            rows.append([step, N_PROMPT + step, *(mode.first or ("", "", "", "")), n_logits])
            if mode.first:
                break  # from here on the rows' caches differ
            # Every row takes the token of row 0, so that inputs stay identical.
            ids = logits[:1].argmax(-1, keepdim=True).expand(batch_size, 1).contiguous()
    op_columns = ["first_op", "module", "its_rows_unlike_row_0", "kernels"]
    header = ["step", "kv_length", *op_columns, "logits_rows_unlike_row_0"]
    write_csv(out / "within_batch.csv", header, rows)


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if arguments.tiny else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    sampler = RandomModel(sizes.config, device)
    digest = digest_weights(sampler.model)
    here = dataclasses.asdict(environment.capture({"digest": digest, **sizes.config}))
    here |= {"elapsed_s": {}, "errors": {}}
    for name, part in (
        ("attention", lambda: compare_attention_rows(sizes, device, arguments.out)),
        ("within_batch", lambda: decode_copies(sampler, sizes, arguments.out)),
        ("introducers", lambda: trace_introducers(sampler, sizes, arguments.out)),
        ("order", lambda: read_products(sizes, device, arguments.out, started)),
    ):
        begun = time.perf_counter()
        try:
            part()
        except Exception as error:  # a rented GPU's time is not spent for nothing: the rest goes on
            traceback.print_exc()
            here["errors"][name] = f"{type(error).__name__}: {error}"
        here["elapsed_s"][name] = round(time.perf_counter() - begun, 1)
        print(f"{name}: {here['elapsed_s'][name]} s", flush=True)
        (arguments.out / "environment.json").write_text(json.dumps(here, indent=1) + "\n")
    sys.exit(1 if here["errors"] else 0)


if __name__ == "__main__":
    main()
