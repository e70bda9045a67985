"""vLLM's plug-in: `NDCHECK_VLLM=1 VLLM_BATCH_INVARIANT=1 vllm serve ...`.

vLLM calls `register` in each of its processes (entry point group ``vllm.general_plugins``). Unless
both variables ask for it, nothing of vLLM is touched. Else the functions of `seams` are replaced
when a worker starts its invariant mode, every layer of the loaded model is listed with what
computes it, and after vLLM's warm-up every covered layer must have run by our ops.

Sums over ranks are ours too, or vLLM's where two ranks alone have one order: NCCL then moves
numbers only, so that where nothing is left to vLLM (``strict``) its own invariant mode's settings
of NCCL, which slow all collectives, are taken back.

NDCHECK_VLLM is ``1`` or ``strict`` (a layer that nothing covers ends the start), ``partial`` (it is
left to vLLM and named), ``auto`` (then all is left to vLLM), or ``audit`` (print the table, stop).
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from importlib import metadata
from typing import Any

from ndcheck_kernels.engines.seams import RELEASES, Replacements, SeamError, release_of, seams

SWITCH = "NDCHECK_VLLM"
VLLMS_LARGEST, LARGEST_GRAPH, GRAPH_STEP = 512, 1024, 16
"""Rows of the largest step that vLLM captures by itself, and of ours, in vLLM's steps.

A step that is no graph starts each product from Python, ours at some four times cuBLAS's cost.
"""
MODES = {"1": "strict", "strict": "strict", "partial": "partial", "auto": "auto", "audit": "audit"}

log = logging.getLogger("vllm.ndcheck")  # vLLM's handler writes what is below its own name.


class CoverageError(RuntimeError):
    """The model is not computed as asked."""


def register() -> None:
    """Put the plug-in in place if it is asked for. Raises ValueError for another mode."""
    asked = os.environ.get(SWITCH, "")
    if asked in ("", "0"):
        for near in difflib.get_close_matches(SWITCH, {*os.environ} - {SWITCH}, cutoff=0.9):
            log.warning("ndcheck: nothing reads %s, did you mean %s?", near, SWITCH)
        return
    if asked not in MODES:
        raise ValueError(f"{SWITCH}={asked}: choose from {', '.join(MODES)}, or 0")
    import vllm
    from vllm import envs

    if not envs.VLLM_BATCH_INVARIANT:
        log.warning("ndcheck: %s=%s does nothing without VLLM_BATCH_INVARIANT=1", SWITCH, asked)
        return
    release = release_of(vllm.__version__)
    if release not in RELEASES:
        _leave(f"vLLM {vllm.__version__} is not among the releases {', '.join(RELEASES)}")
        return
    try:
        Plugin(MODES[asked], release).wait_for_start()
    except SeamError as error:
        _leave(str(error))


def _leave(reason: str) -> None:
    log.warning("ndcheck: %s; vLLM's own invariant mode goes on", reason)


def capture_more(config: Any) -> None:
    """Have decode steps of up to `LARGEST_GRAPH` requests captured, unless sizes were asked for."""
    graphs, requests = config.compilation_config, config.scheduler_config.max_num_seqs
    asked = (graphs.max_cudagraph_capture_size, graphs.cudagraph_capture_sizes)
    if asked == (None, None) and requests > VLLMS_LARGEST and config.speculative_config is None:
        rows = min(-(-requests // GRAPH_STEP) * GRAPH_STEP, LARGEST_GRAPH)
        graphs.max_cudagraph_capture_size = rows


def add_apart(config: Any) -> None:
    """Have sums over ranks computed apart from norms, as vLLM's mode does itself from 0.29 on.

    The fused kernel is not batch-invariant, and takes the place of ours.
    """
    passes = config.compilation_config.pass_config
    if passes.fuse_allreduce_rms and config.parallel_config.tensor_parallel_size > 1:
        passes.fuse_allreduce_rms = False
        log.warning("ndcheck: fuse_allreduce_rms is turned off: its sums follow the batch")


class Plugin:
    """One process's: what it replaced, and what it saw."""

    def __init__(self, mode: str, release: str) -> None:
        self._mode = mode
        self._places = seams(release)
        self._own = Replacements()
        self._layers: list[Any] = []
        self._left: str | None = None
        self._kept: tuple[str, ...] = ()

    def wait_for_start(self) -> None:
        """Every process loads plug-ins, but only a worker starts the invariant mode."""

        def graph_sizes(config: Any) -> None:
            capture_more(config)
            add_apart(config)
            self._own["graph_sizes"](config)

        self._own.put(self._places, {"start": self._start, "graph_sizes": graph_sizes})

    def _start(self) -> None:
        import torch
        from vllm.v1.worker.gpu_worker import Worker

        from ndcheck_kernels.cuda.configs import PROVEN

        Worker.ndcheck_coverage = lambda worker: self.describe()
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor in PROVEN:
            try:
                self._replace()
            except SeamError as error:
                self._give_up(str(error))
        else:
            self._give_up(f"compute capability {major}.{minor} is not among those proven")
        before = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
        self._own["start"]()
        if self._mode == "strict" and not self._left:
            self._free_collectives(before)

    def _free_collectives(self, variables: dict[str, str]) -> None:
        """Give NCCL the settings from before; from now on no sum over ranks may be its own."""
        from ndcheck_kernels.engines import layers

        self._own.put(self._places, {"reduce_scatter": layers.reduce_scatter})
        for name in [name for name in os.environ if name.startswith("NCCL_")]:
            del os.environ[name]
        os.environ.update(variables)
        self._kept = ("all_reduce", "reduce_scatter")

    def _replace(self) -> None:
        from ndcheck_kernels.engines import layers

        def experts(own: Any, *given: Any, **named: Any) -> Any:
            if given or self._left or layers.experts_refusal(own, named):
                return self._own["experts"](own, *given, **named)
            return layers.experts(own, named)

        def log_softmax(input: Any, dim: int, _half_to_float: bool) -> Any:
            # torch keeps the function that it was given, so this one outlives `restore`.
            chosen = self._own["log_softmax"] if self._left else layers.log_softmax
            return chosen(input, dim, _half_to_float)

        def load(worker: Any, *, load_dummy_weights: bool = False) -> None:
            self._own["load"](worker, load_dummy_weights=load_dummy_weights)
            self._check(worker.model_runner.get_model(), worker.vllm_config)

        def warm_up(worker: Any) -> Any:
            times = self._own["warm_up"](worker)
            self._confirm()
            return times

        # Called, and not replaced.
        layers.vllms_own["pair"], *_ = self._places["pair_fits"].find()
        self._places["pair_sum"].find()
        for use in ("fp8_linear", "communicator", "all_reduce", "attention_step"):
            layers.vllms_own[use] = self._places[use].find()[2]
        self._own.put(
            self._places,
            {
                "linear": layers.linear,
                "output": layers.output,
                "log_softmax": log_softmax,
                "experts": experts,
                "fp8_linear": layers.fp8_linear,
                "communicator": layers.communicator,
                "all_reduce": layers.all_reduce,
                "attention_step": layers.attention_step,
                "load": load,
                "warm_up": warm_up,
            },
        )

    def describe(self) -> dict[str, Any]:
        """What `LLMEngine.collective_rpc("ndcheck_coverage")` answers, for each worker."""
        from ndcheck_kernels.engines import coverage, layers

        return {
            "by": "vllm" if self._left else "ndcheck",
            "reason": self._left,
            "version": _version(),
            "table": coverage.table(self._layers),
            "uncovered": [layer.name for layer in coverage.uncovered(self._layers)],
            "fires": dict(layers.fires),
        }

    def _check(self, model: Any, config: Any) -> None:
        """List the layers and make their ops ready. Raises CoverageError, or SystemExit to stop."""
        from ndcheck_kernels.engines import coverage
        from ndcheck_kernels.engines.warm_up import warm_up

        self._layers = coverage.list_layers(model, config)
        kind = coverage.kind_of(model)
        if self._mode == "audit":
            if config.parallel_config.rank == 0:
                sys.stdout.write(f"{kind}\n{coverage.table(self._layers)}\n")
                sys.stdout.flush()  # Before a process that vLLM may kill.
            raise SystemExit(0)
        if kind not in coverage.MODELS:
            self._give_up(f"the forward pass of {kind} is not known")
            return
        uncovered = coverage.uncovered(self._layers)
        named = f"nothing covers {coverage.name_some(uncovered)}"
        if uncovered and self._mode == "strict":
            raise CoverageError(f"ndcheck: {named}; {SWITCH}=partial leaves them to vLLM")
        if uncovered and self._mode == "auto":
            self._give_up(named)
            return
        if uncovered:
            log.warning("ndcheck: %s: left to vLLM", named)
        coverage.mark(model, self._layers)
        warm_up(self._layers, config)

    def _confirm(self) -> None:
        """Raises CoverageError where a covered layer was computed by something else."""
        from ndcheck_kernels.engines import coverage, layers

        if self._left:
            return
        missed = coverage.never_ran(self._layers, layers.weights_seen)
        if missed:
            raise CoverageError(
                f"ndcheck: {len(missed)} layers never came to its ops: {coverage.name_some(missed)}"
            )
        if not layers.fires:
            raise CoverageError("ndcheck: none of its ops ever ran")
        counts = ", ".join(f"{op} {n}" for op, n in sorted(layers.fires.items()))
        log.info("ndcheck %s: %d layers covered; calls: %s", _version(), len(self._layers), counts)

    def _give_up(self, reason: str) -> None:
        self._left = reason
        self._own.restore(but=self._kept)
        _leave(reason)


def _version() -> str:
    try:
        return metadata.version("ndcheck")
    except metadata.PackageNotFoundError:
        return "of a checkout"
