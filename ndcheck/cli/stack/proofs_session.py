"""`ndcheck kernels prove` from options to exit code: shapes -> proofs -> tables -> the cache."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from ndcheck.cli.console import EXIT_CODES, note
from ndcheck.errors import BackendError, UsageError
from ndcheck.reports.stack import proofs as report
from ndcheck.request import make_spec
from ndcheck.samplers.local.device import choose_device
from ndcheck.samplers.options import DTYPES, short_dtype
from ndcheck.storage.outputs import check_outputs
from ndcheck.storage.reading import parse_json, read_text
from ndcheck.storage.run_directory import replacing, write_failure

if TYPE_CHECKING:
    import torch

    from ndcheck_kernels.cuda.products.proofs import Proofs, Shape
    from ndcheck_kernels.measure.prove import ShapeProof

PROVEN_DTYPES = ("bf16", "fp16")
N_SAMPLED = 4
"""Shapes of an imported proof that are proven again before it is used."""


def prove(
    model: str | None,
    dtype: str,
    device: str,
    export: Path | None,
    *,
    tune: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Prove shapes, keep what was seen, and show it. Returns the exit code."""
    from ndcheck_kernels.measure import prove as proving
    from ndcheck_kernels.measure import tune as tuning

    names = tuple(short_dtype(name.strip()) for name in dtype.split(","))
    if not set(names) <= set(PROVEN_DTYPES):
        raise UsageError(f"--dtype {dtype!r}: give some of {', '.join(PROVEN_DTYPES)}; in fp32 one "
                         "configuration serves every M, and there is nothing to prove")  # fmt: skip
    where = _gpu(device)
    check_outputs(export)
    started_s = time.monotonic()
    sizes = proving.DEFAULT_SHAPES if model is None else _shapes_of(model)
    shapes = [proving.shape_of(n, k, _dtype(name), where) for name in names for n, k in sizes]
    known = _proofs(where)
    note(f"compiling for {len(shapes)} shapes", quiet=quiet)
    untried = proving.compile_ahead(shapes, where)
    results: list[report.Proven] = []
    for shape in shapes:
        note(f"proving {shape}", quiet=quiet)
        proof = proving.prove(shape, where, untried)
        cells = tuple(tuning.tune(proof, where)) if tune and proof.control is None else ()
        results.append(report.Proven(proof, cells))
        _keep(known, proof, [cell.row for cell in cells] if cells else None)
    elapsed_s = time.monotonic() - started_s
    if export is not None:
        _write(export, known)
    if as_json:
        document = report.proof_document(results, known.environment, elapsed_s)
        typer.echo(json.dumps(document, indent=2))
    else:
        console = Console(highlight=False)
        report.print_proofs(console, results, known.environment, elapsed_s, str(known.path))
    return EXIT_CODES[report.judge_proofs(results)]


def take_over(file: Path, device: str, *, quiet: bool) -> int:
    """Use what another machine of this kind has proven, once a sample of it holds here too."""
    from ndcheck_kernels.cuda.products.proofs import Proofs
    from ndcheck_kernels.measure import prove as proving

    where = _gpu(device)
    known = _proofs(where)
    try:
        document = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--import {file}: {reason}") from error
    sent = Proofs(known.path, known.environment)
    if reason := sent.add(document):
        raise UsageError(f"--import {file}: {reason}")
    shapes = [shape for shape in map(_parse_shape, sent.classes) if shape is not None]
    if not shapes:
        raise UsageError(f"--import {file}: it has no shapes; ndcheck kernels prove --export does")
    sample = random.Random(0).sample(shapes, min(N_SAMPLED, len(shapes)))
    untried = proving.compile_ahead(sample, where)
    for shape in sample:
        note(f"proving {shape} again", quiet=quiet)
        proof = proving.prove(shape, where, untried)
        there = sent.classes[str(shape)]
        if proof.control is not None:
            note(f"nothing is taken over: {shape}: {proof.control}")
            return EXIT_CODES["INCONCLUSIVE"]
        for label, why in there.items():
            here = proof.classes.get(label, "it was not tried here")
            if (here is None) != (why is None):
                note(f"nothing is taken over: {shape}, {label}: there {why}, here {here}")
                return EXIT_CODES["FAIL"]
    known.add(document)
    known.write()
    typer.echo(
        f"{len(shapes)} shapes taken over from {file}, {len(sample)} of them proven again here"
    )
    return 0


def _gpu(device: str) -> torch.device:
    """With its number. Raises UsageError for what has no configurations to choose between."""
    import torch

    where = choose_device(device)
    if where.type != "cuda":
        raise UsageError(
            f"--device {device}: on {where.type} each shape is proven when it is first used; "
            "only a GPU has configurations to choose between"
        )
    if torch.version.hip is not None:
        raise UsageError(
            "--device cuda: on AMD GPUs one configuration serves every M; there is nothing to prove"
        )
    return torch.empty(0, device=where).device


def _proofs(where: torch.device) -> Proofs:
    from ndcheck_kernels.cuda.products import cublaslt, proofs

    try:
        return proofs.proofs(where)
    except cublaslt.UnavailableError as error:
        raise BackendError(f"cuBLASLt, whose version is part of a proof: {error}") from error


def _keep(known: Proofs, proof: ShapeProof, table: list[dict[str, object]] | None) -> None:
    """What was shut out is kept even where the control failed: it is never wrong not to use it."""
    shape = str(proof.shape)
    if proof.control is not None:
        return
    known.keep(shape, proof.classes, table)
    for m, reason in proof.borrowed.items():
        if reason is None:
            known.proven.setdefault(shape, set()).add(m)
        else:
            known.failed.setdefault(shape, reason)
    known.write()


def _shapes_of(model: str) -> Sequence[tuple[int, int]]:
    """(N, K) of every product with a weight in a model. Raises UsageError."""
    from ndcheck.samplers.local.checkpoint.sources import find_source
    from ndcheck.samplers.local.loading import build_empty, load_config
    from ndcheck_kernels.models.products import product_shapes

    spec = make_spec(model=model, random_weights=0)  # So that config.json is enough.
    source = find_source(spec).model
    return product_shapes(build_empty(source, load_config(source, spec), spec))


def _parse_shape(text: str) -> Shape | None:
    """What `str` made of a shape; None for what is none, or has an addend."""
    from ndcheck_kernels.cuda.products.proofs import Shape

    match = re.fullmatch(r"(bfloat16|float16) (\d{1,7})x(\d{1,7}) in ([12])", text)
    if match is None:
        return None
    return Shape(int(match[2]), int(match[3]), match[1], int(match[4]))


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def _write(path: Path, known: Proofs) -> None:
    try:
        with replacing(path) as file:
            json.dump(known.document(), file, indent=1)
            file.write("\n")
    except OSError as error:
        raise write_failure(path, error) from error
