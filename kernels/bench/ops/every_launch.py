"""Compiles every kernel in every configuration that the tables can select, without a GPU.

    PYTHONPATH=kernels python -m bench.ops.every_launch ARCHITECTURE [kinds|all [SOURCE]]

ARCHITECTURE is a compute capability, such as 90, or AMD's name, such as gfx942; SOURCE a function
of `launches`, such as attentions, whose launches alone are compiled.

Prints JSON: what each compiled kernel uses, and one line for each launch that does not compile.
Alone, the shapes of the README's figures in bfloat16, in minutes; with `kinds` every kernel once, a
product in the largest configuration of each kind; with `all` every dtype, head dimension and width
that the launchers accept, which takes many minutes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator

import torch

from bench.fp8.launches import Extent, Launch, fp8
from bench.ops.matmul_cells import SHAPES
from ndcheck_kernels.cuda import configs, device, routing
from ndcheck_kernels.cuda.attention import causal, qkv
from ndcheck_kernels.cuda.compiler import compile_failure
from ndcheck_kernels.cuda.products import grouped_matmul, matmul, mxfp4, weight_only
from ndcheck_kernels.cuda.recurrent import gated_delta, selective_scan, short_convolution
from ndcheck_kernels.cuda.rows import (
    add_parts,
    composed_norm,
    layer_norm,
    logits,
    reductions,
    rms_norm,
    silu_mul,
    softmax,
)
from ndcheck_kernels.measure import resources
from ndcheck_kernels.ops.weight_only import Packed, pack

Schedule = tuple[configs.MatmulConfig, int]  # and into how many groups it cuts K
FP8_CAPABILITY = 89
"""From which Triton has e4m3 numbers."""
HEAD_DIMS = (
    *((dim, dim) for dim in (16, 32, 64, 80, 96, 128, 192, 256)),
    *((64, 128), (128, 64), (192, 128), (64, 256), (128, 256)),
)
"""Of keys and of values."""
WIDTHS = (100, 128, 4096, 16384, 65536, 151936)


def launches(capability: int, extent: Extent, only: str | None = None) -> Iterator[Launch]:
    """A name and a call for each; tensors are allocated and never read."""
    for dtype in device.FLOATS if extent == "all" else device.FLOATS[:1]:
        for source in (
            *(products, experts, fp8, integers, attentions, rows, decoder, recurrences),
        ):
            if only in (None, source.__name__):
                yield from source(capability, dtype, extent)


def largest_of_each_kind(choices: Iterable[Schedule]) -> list[Schedule]:
    """Of those that run the same code the one that needs the most registers and shared memory."""
    found = {}
    for config, groups in sorted(choices, key=lambda choice: _size(choice[0])):
        kind = (config.kind, config.swap, config.extra_n > 0, config.parallel, groups)
        found[kind] = (config, groups)
    return list(found.values())


def _size(config: configs.MatmulConfig) -> tuple[int, int]:
    return config.block_m * (config.block_n + config.extra_n), config.block_k * config.stages


def products(capability: int, dtype: torch.dtype, extent: Extent) -> Iterator[Launch]:
    shapes: dict[Schedule, tuple[int, int]] = {}
    for n, k in (*SHAPES.values(), (1000, 1000)):
        groups = configs.k_groups(n, k, dtype.itemsize, capability)
        for config in configs.selectable_configs(n, k, dtype.itemsize, capability):
            shapes.setdefault((config, groups), (n, k))
    for config, groups in largest_of_each_kind(shapes) if extent == "kinds" else shapes:
        n, k = shapes[config, groups]
        x, w = torch.empty(600, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
        bias, rows = torch.empty(n, dtype=dtype), torch.empty(600, n, dtype=dtype)
        for c in {"kinds": (bias,), "figures": (None, bias), "all": (None, bias, rows)}[extent]:
            yield (
                f"matmul {config} in {groups}",
                lambda c=c, x=x, w=w, config=config, groups=groups: matmul._launch(
                    x, w.t(), c, 1.0, 1.0, None, config, groups
                ),
            )


def experts(capability: int, dtype: torch.dtype, extent: Extent) -> Iterator[Launch]:
    x, b = torch.empty(600, 2048, dtype=dtype), torch.empty(128, 2048, 1536, dtype=dtype)
    ends = torch.empty(128, dtype=torch.int32)
    groups = configs.k_groups(1536, 2048, dtype.itemsize, capability)
    choices = [
        (config, groups)
        for config in configs.selectable_grouped_configs(dtype.itemsize, capability)
    ]
    for config, _ in largest_of_each_kind(choices) if extent == "kinds" else choices:
        for weights in (b, b.view(128, 1536, 2048).mT):
            yield (
                f"grouped_matmul {config}",
                lambda weights=weights, config=config: grouped_matmul._launch(
                    x, weights, ends, None, config, groups
                ),
            )
    source = torch.empty(600, dtype=torch.int64)
    gates = [(c, groups) for c in configs.selectable_gate_configs(dtype.itemsize, capability)]
    for config, _ in largest_of_each_kind(gates) if extent == "kinds" else gates:
        yield (
            f"grouped_gate {config}",
            lambda config=config: grouped_matmul._launch(
                x, b.view(128, 1536, 2048).mT, ends, None, config, groups, source
            ),
        )
    index, weights = torch.empty(75, 8, dtype=torch.int64), torch.empty(75, 8, dtype=dtype)
    yield "route", lambda: routing.route(index, weights, 128)
    yield "combine", lambda: grouped_matmul.combine(x, index, weights)
    yield "combine with a residual", lambda: grouped_matmul.combine(x, index, weights, x[:75])
    chosen = torch.empty(75, 128, dtype=dtype)
    yield "choose", lambda: routing.choose(chosen, 8, True)
    yield "choose for one token", lambda: routing.choose_routes(chosen[:1], 8, True)


def integers(capability: int, dtype: torch.dtype, extent: Extent) -> Iterator[Launch]:
    """Weights of 4 and 8 bits; groups of 32 columns need a layout of scales of their own."""
    x, addend = torch.empty(128, 4096, dtype=dtype), torch.empty(128, 6144, dtype=dtype)
    blocks, ends = torch.empty(8, 64, 128, 16, dtype=torch.uint8), torch.empty(8, dtype=torch.int32)
    yield "mxfp4", lambda: mxfp4.mxfp4_matmul(x, blocks, blocks[..., 0].contiguous(), ends)
    for bits, group, has_zeros in ((4, 128, False), (4, 32, True), (8, 4096, True), (8, 64, False)):
        scales = torch.empty(4096 // group, 6144, dtype=dtype)
        packed = Packed(
            pack(torch.empty(6144, 4096, dtype=torch.uint8), bits), scales,
            scales.to(torch.int16) if has_zeros else None, None, bits, 4096,
        )  # fmt: skip
        yield (
            f"unpacked {bits} bits",
            lambda packed=packed: weight_only.unpacked(packed, dtype),
        )
        if capability not in configs.PROVEN or dtype.itemsize != 2:
            continue
        selectable = weight_only.selectable_configs(bits, group)
        if extent == "kinds":  # Beside the smallest the one that needs the most.
            selectable = tuple(dict.fromkeys((selectable[0], selectable[-1])))
        for config in selectable:
            if not weight_only.is_for(config, x, packed):
                continue
            yield (
                f"weight_only {bits} bits in groups of {group} {config}",
                lambda packed=packed, config=config: weight_only._launch(x, packed, addend, config),
            )


def attentions(capability: int, dtype: torch.dtype, extent: Extent) -> Iterator[Launch]:
    """Four query heads to a key head: with 16, 32 and 64 rows of queries all tiles of a decode step
    are met, with one row of a batch or a hundred both schedules.
    """
    cache_dtypes = (dtype, torch.float8_e4m3fn)[: 2 if capability >= FP8_CAPABILITY else 1]
    pairs = {  # Any two of these three are met; and so is the one that spills most.
        (dtype, True, "with padding"),
        (dtype, True, "in chunks"),
        (dtype, False, "with padding"),
        (dtype, False, "with a window"),
        (torch.float8_e4m3fn, True, "with a window"),
        (torch.float8_e4m3fn, True, "in chunks"),
        (torch.float8_e4m3fn, False, "with padding"),
        (torch.float8_e4m3fn, False, "in chunks"),
    }
    dims = {"kinds": ((128, 128),), "figures": ((64, 64), (128, 128)), "all": HEAD_DIMS}[extent]
    turn = itertools.cycle(("with padding", "with a window", "in chunks"))
    for dim, dim_v in dims:
        config = configs.attention_config(max(dim, dim_v), dtype.itemsize, capability)
        most = config.max_rows // 4
        sizes = {  # batch, queries, context
            "kinds": ((1, 8192, 512), (1, most, 512), (100, 4, 512)),
            "figures": (
                *((1, 512, 512), (1, 8192, 512), (1, 1, 512), (1, most, 512)),
                *((100, 1, 512), (100, 4, 512)),
            ),
            "all": (
                *((1, 512, 512), (1, 8192, 512)),
                *itertools.product((1, 100), {1, most // 2, most}, (128, 512)),
            ),
        }[extent]
        for cache_dtype, (batch, queries, context) in itertools.product(cache_dtypes, sizes):
            q = torch.empty(batch, 8, queries, dim, dtype=dtype)
            k, v = (torch.empty(batch, 2, context, n, dtype=cache_dtype) for n in (dim, dim_v))
            sinks, bounds = torch.empty(8, dtype=dtype), torch.empty(batch, dtype=torch.int64)
            kinds = {
                "with padding": {"starts": bounds, "lengths": bounds, "sinks": sinks},
                "with a window": {"window": 128, "softcap": 50.0, "starts": bounds, "sinks": sinks},
                "in chunks": {
                    "window": 128, "chunked": True, "slopes": torch.empty(8),
                    "bias_dtype": torch.bfloat16,
                },
            }  # fmt: skip
            in_turn = next(turn)  # Options change what fits by little: each shape meets one.
            for kind, options in kinds.items():
                if extent == "kinds" and (cache_dtype, queries > most, kind) not in pairs:
                    continue
                if extent == "all" and kind != in_turn:
                    continue
                shapes = f"{tuple(q.shape)} over {tuple(k.shape)}, {dim_v} {cache_dtype}"
                yield (
                    f"attention {kind}: {shapes}",
                    lambda q=q, k=k, v=v, options=options: causal.attention(q, k, v, **options),
                )


def rows(capability: int, dtype: torch.dtype, extent: Extent) -> Iterator[Launch]:
    everything = extent == "all"
    for n_parts in (1, 2, 8):
        parts = torch.empty(n_parts, 5, 4096)
        addend = torch.empty(5, 4096, dtype=dtype)
        yield f"add_parts {n_parts}", lambda p=parts, a=addend: add_parts.add_parts(p, a)
        yield (
            f"add_parts {n_parts} alone",
            lambda p=parts, t=dtype: add_parts.add_parts(p.to(t)),
        )
    for n in {"kinds": (16384, 151936), "figures": (128, 4096, 16384, 151936), "all": WIDTHS}[
        extent
    ]:
        x, w = torch.empty(5, n, dtype=dtype), torch.empty(n, dtype=dtype)
        if n <= (65536 if everything else 16384):
            yield f"rms_norm {n}", lambda x=x, w=w: rms_norm.rms_norm(x, w)
            yield f"rms_norm {n} alone", lambda x=x: rms_norm.rms_norm(x)
            yield f"add_rms_norm {n}", lambda x=x, w=w: rms_norm.add_rms_norm(x, x, w)
            yield f"layer_norm {n}", lambda x=x, w=w: layer_norm.layer_norm(x, w, w)
            yield f"layer_norm {n} alone", lambda x=x: layer_norm.layer_norm(x)
        if n <= reductions.CHUNK:
            for way in composed_norm.Weighting:
                yield (
                    f"composed_norm {n} {way.name}",
                    lambda x=x, w=w, way=way: composed_norm.composed_norm(x, w, 1e-6, way),
                )
        for op in (softmax.softmax, softmax.log_softmax, softmax.logsumexp):
            yield f"{op.__name__} {n}", lambda op=op, x=x: op(x)
        yield f"sum {n}", lambda x=x: reductions.sum(x, -1)
        yield f"cumsum {n}", lambda x=x: reductions.cumsum(x, -1)
        yield f"silu_mul {n}", lambda x=x: silu_mul.silu_mul(x, x)
        yield f"read_logits {n}", lambda x=x: logits.read_logits(x)


def decoder(capability: int, dtype: torch.dtype, extent: Extent) -> Iterator[Launch]:
    heads_of_models = ((32, 8),) if extent == "kinds" else ((4, 2), (3, 1), (32, 8))
    for dim in {"kinds": (128,), "figures": (32, 64, 128), "all": qkv.HEAD_DIMS}[extent]:
        for heads, kv_heads in heads_of_models:
            x = torch.empty(2, 3, (heads + 2 * kv_heads) * dim, dtype=dtype)
            angles = torch.empty(2, 3, dim, dtype=dtype)
            keys = torch.empty(2, kv_heads, 8, dim, dtype=dtype)
            if capability >= FP8_CAPABILITY:
                narrow = keys.to(torch.float8_e4m3fn)
                yield (
                    f"qkv {heads}/{kv_heads}x{dim} to FP8",
                    lambda x=x, angles=angles, keys=narrow: qkv.qkv(
                        x, angles, angles, keys, keys, torch.tensor(0)
                    ),
                )
            for norm in (None, torch.empty(dim, dtype=dtype)):
                yield (
                    f"qkv {heads}/{kv_heads}x{dim}{'' if norm is None else ' with norms'}",
                    lambda x=x, angles=angles, keys=keys, norm=norm: qkv.qkv(
                        x, angles, angles, keys, keys, torch.tensor(0), q_weight=norm, k_weight=norm
                    ),
                )


def recurrences(capability: int, dtype: torch.dtype, extent: Extent) -> Iterator[Launch]:
    x, weight = torch.empty(2, 5, 8192, dtype=dtype), torch.empty(8192, 4, dtype=dtype)
    x_by_channel, window = x.transpose(1, 2), torch.empty(2, 8192, 4, dtype=dtype)
    for bias in (None, weight[:, 0]):
        yield (
            f"short_convolution{'' if bias is None else ' with a bias'}",
            lambda bias=bias: short_convolution.short_convolution(
                x_by_channel, weight, bias, "silu"
            ),
        )
        yield (
            f"short_convolution_step{'' if bias is None else ' with a bias'}",
            lambda bias=bias: short_convolution.short_convolution_step(
                x_by_channel[..., :1], window, weight, bias, "silu"
            ),
        )
    for dim in {"kinds": (128,), "figures": (128,), "all": (16, 64, 96, 128, 256)}[extent]:
        keys, values = (torch.empty(2, 5, h, dim, dtype=dtype) for h in (16, 32))
        state, beta = torch.empty(2, 32, dim, dim), torch.empty(2, 5, 32, dtype=dtype)
        for decay in (torch.empty(2, 5, 32), torch.empty(2, 5, 32, dim)):
            yield (
                f"gated_delta_rule {dim}{' by channel' if decay.dim() == 4 else ''}",
                lambda keys=keys, values=values, decay=decay, beta=beta, state=state: (
                    gated_delta.gated_delta_rule(keys, keys, values, decay, beta, state, True)
                ),
            )
    # Nemotron-H 8B, Falcon-H1 34B and Mamba 2.8B.
    for heads, width, states, groups in ((128, 64, 128, 8), (32, 128, 256, 2), (5120, 1, 16, 1)):
        rows = torch.empty(2, 5, heads, width, dtype=dtype)
        b, scanned = (
            torch.empty(2, 5, groups, states, dtype=dtype),
            torch.empty(2, heads, width, states),
        )
        decays = torch.empty(heads, states) if width == 1 else torch.empty(heads)
        yield (
            f"selective_scan {heads}x{width}x{states}",
            lambda rows=rows, b=b, decays=decays, scanned=scanned: selective_scan.selective_scan(
                rows, torch.empty(rows.shape[:3]), decays, b, b, rows[0, 0, :, 0], scanned
            ),
        )


def compile_all(
    architecture: int | str, extent: Extent = "figures", only: str | None = None
) -> dict[str, object]:
    """What every kernel uses, and what does not compile and why."""
    failures, used = [], []
    capability = architecture if isinstance(architecture, int) else 0
    with resources.compiling(architecture) as kernels:
        for name, launch in launches(capability, extent, only):
            try:
                launch()
            except Exception as error:
                reason = compile_failure(error)
                if reason is None:
                    raise
                failures.append(f"{name}: {reason}")
        compiled = list(kernels)
    read: dict[object, frozenset[str]] = {}
    for kernel in compiled:
        # To disassemble one takes as long as to compile it: beyond the figures' shapes one kernel
        # stands for those of its name whose PTX asks for the same.
        kind = kernel.metadata.name, resources.matrix_instructions(kernel)
        is_known = extent != "figures" and kind in read
        used_by_it = resources.resources(
            kernel, resources.multiplies_matrices(kernel) and not is_known
        )
        instructions = used_by_it.instructions or read.get(kind, frozenset())
        read.setdefault(kind, instructions)
        entry = dataclasses.asdict(used_by_it)
        used.append(entry | {"instructions": sorted(instructions)})
    return {"kernels": used, "failures": failures}


if __name__ == "__main__":
    chip = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
    print(json.dumps(compile_all(chip, *sys.argv[2:])))
