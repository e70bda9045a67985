"""Which op gives other bits when nothing changes? In a decoding model, not in a call by itself.

    PYTHONPATH=kernels python -m bench.stack.run_to_run OUT_DIR [SECONDS] [--tiny]

A small model of SmolLM2-135M's layer shape with random weights decodes copies of one prompt, the
same work several times over: by attention backend and batch size, at which step its logits first
differ (decodes.csv). Then every op of one such decode is called twice on the same tensors, in the
stream and without waiting, and the ops whose results differ are named with their shapes (ops.csv).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench.table import Table
from ndcheck_kernels.models.caches.argument import cache_argument

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
RUNS = 3
PROMPT_TOKENS, STEPS = 20, 180


def model_of(device: str, layers: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval()


@torch.inference_mode()
def decode(model: Any, rows: int, steps: int) -> torch.Tensor:
    """Logits [steps, rows, vocabulary] of a greedy decode of copies, with a dynamic cache."""
    ids = torch.arange(PROMPT_TOKENS, device=model.device)[None].expand(rows, -1)
    cache = transformers.DynamicCache(config=model.config)
    seen, name = [], cache_argument(model.forward)
    for _ in range(steps):
        logits = model(ids, use_cache=True, **{name: cache}).logits[:, -1]
        # The first row's choice for all: rows that part stay comparable.
        ids = logits[:1].argmax(-1, keepdim=True).expand(rows, 1)
        seen.append(logits)
    return torch.stack(seen)


def first_step(a: torch.Tensor, b: torch.Tensor) -> int | None:
    """The first step at which any bit differs."""
    where = (a != b).flatten(1).any(1).nonzero()
    return int(where[0]) if len(where) else None


def decodes(table: Table, model: Any, rows: Sequence[int], steps: int, deadline: float) -> None:
    cells = [(b, r) for r in rows for b in BACKENDS if b == "default" or r == rows[0]]
    for backend, n in sorted(cells, key=lambda cell: list(BACKENDS).index(cell[0]) > 1):
        if time.monotonic() > deadline:
            print("out of time")
            return
        chosen = BACKENDS[backend]
        try:
            with nullcontext() if chosen is None else sdpa_kernel(chosen):
                first, *others = [decode(model, n, steps) for _ in range(RUNS)]
        except RuntimeError as error:
            table.add(backend=backend, rows=n, keys_at_first="", keys_apart="",
                      runs=str(error).partition("\n")[0][:80])  # fmt: skip
            continue
        found = [
            step for step in (first_step(first, other) for other in others) if step is not None
        ]
        apart = first_step(first, first[:, :1].expand_as(first))
        table.add(
            backend=backend, rows=n,
            keys_at_first=PROMPT_TOKENS + min(found) if found else "never",
            keys_apart="never" if apart is None else PROMPT_TOKENS + apart, runs=RUNS,
        )  # fmt: skip


class Twice(TorchDispatchMode):
    """Calls each op a second time on the same tensors and compares."""

    def __init__(self, planted: str = "") -> None:
        super().__init__()
        self.planted = planted
        self.seen: dict[tuple[str, str], list[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        is_pure = not schema.is_mutable and not any(r.alias_info for r in schema.returns)
        if is_pure and "empty" not in schema.name:
            name = schema.name.removeprefix("aten::")
            again = func(*args, **kwargs)
            if name == self.planted:
                again = again + 1
            pairs = [
                (a, b)
                for a, b in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True)
                if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()
            ]
            shapes = " ".join(
                "x".join(map(str, t.shape)) for t in tree_flatten(args)[0]
                if isinstance(t, torch.Tensor)
            )  # fmt: skip
            differs = [((a != b) & ~(a.isnan() & b.isnan())).any() for a, b in pairs[:1]]
            self.seen.setdefault((name, shapes), []).extend(differs)
        return result


def ops(table: Table, model: Any, rows: Sequence[int], steps: int, deadline: float) -> None:
    for n in rows:
        if time.monotonic() > deadline:
            print("out of time")
            return
        with Twice() as twice:
            decode(model, n, steps)
        named: dict[str, list[str]] = {}
        for (op, shapes), flags in twice.seen.items():
            differing = sum(bool(flag) for flag in flags)
            table.add(rows=n, op=op, shapes=shapes, calls=len(flags), differing=differing)
            if differing:
                named.setdefault(op, []).append(f"{shapes} ({differing} of {len(flags)})")
        calls = sum(map(len, twice.seen.values()))
        print(f"{n} rows: {calls} calls made twice; ops with other bits: {len(named)}", flush=True)
        for op, shapes in named.items():
            print(f"  {op}: {len(shapes)} shapes, first {shapes[0]}", flush=True)


def control(model: Any) -> None:
    """Plants a difference in one op; ends the script where not that op alone is named."""
    with Twice(planted="silu") as twice:
        decode(model, 2, 2)
    named = {op for (op, _), flags in twice.seen.items() if any(map(bool, flags))}
    print(f"control: silu was planted to differ; seen to differ: {', '.join(sorted(named))}")
    if "silu" not in named:
        raise SystemExit("the planted op was not seen to differ")


def main(out: Path, seconds: float = 60, *, tiny: bool = False) -> None:
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if tiny or not torch.cuda.is_available() else "cuda"
    model = model_of(device, 1 if tiny else 2)
    control(model)
    rows, steps = ((2,), 4) if tiny else ((32, 16, 8, 64, 4, 1), STEPS)
    tables = Table(out / "decodes.csv"), Table(out / "ops.csv", echo=False)
    decodes(tables[0], model, rows, steps, started + 0.6 * seconds)
    ops(tables[1], model, rows[:2], steps, started + 0.9 * seconds)
    print(f"done after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(Path(words[0]), *map(float, words[1:]), tiny="--tiny" in sys.argv)
