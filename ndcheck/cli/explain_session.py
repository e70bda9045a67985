"""From what a user typed to an explanation on the screen: order, demo, trace, shrink."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ndcheck import request
from ndcheck.cli.console import note, prints_apart
from ndcheck.cli.trust import Given, confirm
from ndcheck.errors import UsageError, did_you_mean
from ndcheck.records import ARMS, Arm, Load, Run, RunSpec
from ndcheck.runner import refuse_other_prompts
from ndcheck.samplers.backends import backend_of
from ndcheck.samplers.options import short_dtype
from ndcheck.storage.explanation import save_explanation
from ndcheck.storage.outputs import check_outputs
from ndcheck.storage.run_directory import replacing, write_failure

if TYPE_CHECKING:
    from ndcheck.reports.explain import trace as trace_report
    from ndcheck.samplers.local.sampler import TransformersSampler

MAX_DRAWN_TERMS = 1024
MAX_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Sums:
    """Which op or function sums what, as typed."""

    op: str | None
    fn: str | None
    rows: str
    terms: str
    columns: int
    dtype: str
    device: str
    kernels: str


def order(sums: Sums, drawings: dict[str, Path | None], *, as_json: bool, quiet: bool) -> int:
    """Read the orders and show them. Returns the exit code."""
    op, fn, columns, dtype = sums.op, sums.fn, sums.columns, sums.dtype
    if not 1 <= columns < 10**MAX_DIGITS:
        raise UsageError(f"--columns {columns}: give 1 to {10**MAX_DIGITS - 1}")
    row_counts, lengths = numbers("--rows", sums.rows), numbers("--terms", sums.terms)
    if lengths[0] < 2:
        raise UsageError("--terms: a sum has 2 terms or more")
    if any(drawings.values()) and lengths[-1] > MAX_DRAWN_TERMS:
        raise UsageError(f"--dot and --svg draw up to {MAX_DRAWN_TERMS} terms: lower --terms")
    arm = one_arm(sums.kernels)
    check_outputs(*drawings.values())

    from ndcheck.explain.order import orders
    from ndcheck.explain.order.reductions import REDUCTIONS, Shape, load_function
    from ndcheck.reports.explain import order as order_report
    from ndcheck.samplers.local.device import choose_device
    from ndcheck.samplers.local.loading import DTYPES

    if (op is None) == (fn is None):
        raise UsageError(f"give one OP ({', '.join(REDUCTIONS)}) or --fn module:function")
    if op is not None and op not in REDUCTIONS:
        raise UsageError(
            f"OP {op!r} is unknown; choose from {', '.join(REDUCTIONS)}, or use --fn"
            f"{did_you_mean(op, REDUCTIONS)}"
        )
    dtype = short_dtype(dtype)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    with prints_apart():
        reduction = load_function(fn) if fn else REDUCTIONS[str(op)]
        shape = Shape(lengths[0], columns, DTYPES[dtype], choose_device(sums.device))
        points = orders.sweep(
            reduction,
            shape,
            [(n_rows, length) for length, n_rows in product(lengths, row_counts)],
            arm,
            lambda point: note(f"{reduction.name}: {point.rows} rows read", quiet=quiet),
        )
    setting = {
        "op": reduction.name,
        "columns": columns,
        "dtype": dtype,
        "device": str(shape.device),
        "kernels": arm,
    }
    _write(drawings, order_report.known_orders(points))
    if as_json:
        typer.echo(json.dumps(order_report.order_document(setting, points)))
    else:
        title = f"{reduction.name}, {dtype}, {columns} columns, {shape.device}, {arm} kernels"
        for line in order_report.order_lines(title, reduction.rows, points, _width()):
            typer.echo(line)
    if orders.depends_on_rows(points):
        return 1
    return 0 if all(point.is_known for point in points) else 3


def _write(drawings: dict[str, Path | None], orders: dict[str, Any]) -> None:
    from ndcheck.reports.explain import order as order_report

    for kind, path in drawings.items():
        if path is not None:
            try:
                with replacing(path) as file:
                    file.write(getattr(order_report, kind)(orders))
            except OSError as error:
                raise write_failure(path, error) from error


def trace_loads(
    spec: RunSpec,
    steps: list[int],
    widths: Sequence[int] = (),
    *,
    with_swaps: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Trace a probe under a load of each batch size, and width. Returns the exit code."""
    sampler = _open(spec, quiet=quiet)
    length = sampler.count_tokens(spec.probes[0].content)
    if length == 0:
        raise UsageError("the prompt has no tokens")
    loads = []
    for size in spec.batch_sizes:
        slots = tuple(range(size)) if spec.mode == "copies" else (size // 2,)
        fillers = (length,) * (size - len(slots))
        load = Load(size, slots, fillers, spec.seed)
        loads += [(replace(load, width=width), slots[-1]) for width in widths or [1]]
    explanations = _explain(spec, sampler, steps, loads, with_swaps=with_swaps, quiet=quiet)
    return _show(spec, sampler, explanations, as_json=as_json)


def trace_run(
    directory: Path,
    sample_id: int | None,
    steps: list[int] | None,
    given: Sequence[Given],
    *,
    with_swaps: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Trace the pass in which a recorded sample left its reference. Returns the exit code."""
    from ndcheck.explain.failing import find_failure

    failure = find_failure(directory, sample_id)
    sample, what = failure.sample, "bits" if failure.is_latent else "tokens"
    _check_visible(failure.run.spec)
    confirm(failure.run.spec, given, f"--run {directory}")
    spec = replace(failure.run.spec, arms=(sample.arm,), probes=(failure.probe,))
    note(
        f"sample {sample.sample_id}: {what} differ from the reference at token "
        f"{failure.position + 1}, bits from token {failure.bits_position + 1} on",
        quiet=quiet,
    )
    sampler = _open(spec, failure.run, quiet=quiet)
    # Where the bits begin to differ, an op is to blame; where the tokens part, perhaps none is.
    # A prefill in parts has no pass to compare, but the cache that it left is there from step 1 on.
    first = 0 if sample.load.cache_state == "whole" else 1
    steps = steps or sorted({max(first, failure.bits_position), max(first, failure.position)})
    # Beyond the divergence the sample took in other tokens than the trace does.
    recorded = sample.row_digests[: failure.position + 1]
    if sample.arm == "invariant" and sampler.model.device.type == "cuda":
        note("fused layers are traced op by op, whose bits are not the recorded ones", quiet=quiet)
        recorded = ()
    if sample.load.drafts:
        note(
            f"what was proposed is not kept: the completion is fed in passes of "
            f"{sample.load.width}, as those that verified it",
            quiet=quiet,
        )
        recorded = ()
    loads = [(sample.load.undrafted, sample.slot)]
    n_fed = None if sample.fed is None else sample.fed.n_tokens
    explanations = _explain(
        spec, sampler, steps, loads, recorded, n_fed, with_swaps=with_swaps, quiet=quiet
    )
    code = _show(spec, sampler, explanations, as_json=as_json)
    if not any(explanation.doubt for explanation in explanations):
        advice = {explanation.step: explanation.advice for explanation in explanations}
        save_explanation(directory, sample.sample_id, advice)
    return code


@prints_apart()
def _explain(
    spec: RunSpec,
    sampler: TransformersSampler,
    steps: list[int],
    loads: list[tuple[Load, int]],
    recorded: tuple[str, ...] | None = None,
    n_fed: int | None = None,
    *,
    with_swaps: bool,
    quiet: bool,
) -> list[trace_report.Explanation]:
    """What each step of the spec's only probe shows; the loads come with the probe's slot.

    ``recorded`` are the digests of a sample's logits; None where the loads are no sample's.
    """
    from ndcheck.explain.swapping import find_swaps
    from ndcheck.explain.traced import group_findings
    from ndcheck.explain.tracing import Tracer
    from ndcheck.reports.explain import trace as trace_report

    (arm,), (probe,) = spec.arms, spec.probes
    explanations = []
    for step in steps:
        tracer = Tracer(sampler, probe, step, arm, spec.decoding, n_fed=n_fed)
        alone = tracer.record_alone()
        traces = []
        for load, slot in loads:
            fed = f" of {load.width} tokens" if load.width > 1 else ""
            note(f"step {step}: tracing {load.batch_size} rows{fed}", quiet=quiet)
            traces.append(tracer.trace(load, slot, alone, varies=recorded is None))
        swaps = None
        if with_swaps and arm == "stock" and any(trace.introducers for trace in traces):
            note(f"step {step}: swapping ops one at a time", quiet=quiet)
            swaps = find_swaps(sampler, probe, step, group_findings(traces), loads, spec.decoding)
        digest = recorded[step] if recorded and step < len(recorded) else None
        repeats = tracer.repeats(alone)
        explanations.append(trace_report.Explanation(step, traces, swaps, digest, repeats))
    return explanations


def _show(
    spec: RunSpec,
    sampler: TransformersSampler,
    explanations: list[trace_report.Explanation],
    *,
    as_json: bool,
) -> int:
    from ndcheck.reports.explain import trace as trace_report

    (arm,), (probe,) = spec.arms, spec.probes
    described = sampler.describe()
    setting = {"model": described, "kernels": arm, "prompt": probe.prompt}
    if as_json:
        typer.echo(json.dumps(trace_report.trace_document(setting, explanations)))
    else:
        name, dtype, device = (described[key] for key in ("name", "dtype", "device"))
        title = f"{name}, {dtype}, {device}, {arm} kernels"
        for line in trace_report.trace_lines(title, explanations, _width()):
            typer.echo(line)
    codes = {explanation.exit_code for explanation in explanations}
    return next((code for code in (1, 3) if code in codes), 0)


def shrink(
    directory: Path,
    sample_id: int | None,
    out: Path | None,
    given: Sequence[Given],
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    """Shrink a failing load and check the script that shows it. Returns the exit code."""
    from ndcheck.explain import reproduction_script as script
    from ndcheck.explain.failing import find_failure
    from ndcheck.explain.shrinking import Batch, Shrinker
    from ndcheck.reports.explain.shrink import shrink_document, shrink_lines
    from ndcheck.samplers.local.checkpoint.gguf_file import SUFFIX
    from ndcheck.samplers.local.checkpoint.quantised import read_quantisation
    from ndcheck.samplers.local.checkpoint.sources import find_source

    failure = find_failure(directory, sample_id)
    if failure.sample.arm != "stock":
        raise UsageError("shrink makes scripts of plain transformers: choose a stock --sample")
    spec = failure.run.spec
    _check_visible(spec)
    confirm(spec, given, f"--run {directory}")
    path = out or directory / "repro.py"
    check_outputs(path)
    source = find_source(spec)
    if source.adapter is not None or source.model.endswith(SUFFIX):
        raise UsageError("shrink makes scripts of models in safetensors: save this as one, merged")
    sampler = _open(spec, failure.run, quiet=quiet)

    def show(n_tests: int, best: Batch) -> None:
        rows, tokens = best.size
        note(f"test {n_tests}: {rows} rows, {tokens} tokens beside the probe", quiet=quiet)

    if spec.random_weights is not None and spec.tp_groups is not None:
        raise UsageError("--tp-groups draws random weights that no short script can make: leave it")
    if spec.kv_cache_dtype != "auto":
        raise UsageError("no short script keeps keys and values as FP8: shrink a run without")
    found = read_quantisation(sampler.model.config)
    if found is not None and found.packed is not None:
        raise UsageError("no short script can make these weights: shrink a run of plain ones")
    if spec.dequantise or (spec.random_weights is not None and found is not None):
        raise UsageError("no short script can make these weights: shrink a run of stored ones")
    with prints_apart():
        shrunk = Shrinker(sampler, failure, on_test=show).shrink()
    text = script.write_script(
        shrunk,
        sampler.describe(),
        source.model,
        remote=spec.trust_remote_code,
        random_weights=spec.random_weights,
    )
    try:
        with replacing(path) as file:
            file.write(text)
    except OSError as error:
        raise write_failure(path, error) from error
    note(f"running {path}", quiet=quiet)
    reproduction = script.run_script(path, shrunk)
    if as_json:
        typer.echo(json.dumps(shrink_document(failure, shrunk, reproduction)))
    else:
        for line in shrink_lines(failure, shrunk, reproduction, sampler.decode, _width()):
            typer.echo(line)
    return 1 if reproduction.shows_it else 3


def _check_visible(spec: RunSpec) -> None:
    """Raise UsageError for a run whose ops cannot be seen, whatever else is given."""
    reason = backend_of(spec).unseen(spec)
    if reason is not None:
        raise UsageError(reason)


@prints_apart()
def _open(spec: RunSpec, run: Run | None = None, *, quiet: bool) -> TransformersSampler:
    """With as many threads as ``run`` had. Raises UsageError for a model with ops out of sight."""
    from ndcheck.samplers.local.backend import LocalBackend

    _check_visible(spec)
    note(f"loading {spec.model}", quiet=quiet)
    # What a draft proposed is fed, not proposed again.
    sampler = LocalBackend().open(replace(spec, draft=None))
    if run is not None:
        import torch

        from ndcheck.samplers.local.device import choose_threads

        refuse_other_prompts(run, sampler)
        torch.set_num_threads(choose_threads(run.environment.numeric_flags.get("threads"), 1))
    return sampler


def one_arm(text: str) -> Arm:
    """``stock`` or ``invariant``."""
    (arm, *more) = request.parse_names("--kernels", text, ARMS)
    if more:
        raise UsageError(f"--kernels {text}: give one of {', '.join(ARMS)}")
    return arm


def _width() -> int:
    return shutil.get_terminal_size().columns


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """``"1-4,8"`` as ascending numbers of ``least`` or more."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UsageError(f"{option}: {part.strip()!r} is not a number or a range such as 1-8")
        if max(len(first), len(last)) > MAX_DIGITS:
            raise UsageError(f"{option}: {part.strip():.40} is too large")
        if int(first) < least:
            raise UsageError(f"{option}: {part.strip()!r} is below {least}")
        found.update(range(int(first), int(last or first) + 1))
    if not found:
        raise UsageError(f"{option}: {text!r} is an empty range")
    return sorted(found)
