"""transformers in this process: the backend where nothing else is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ndcheck.errors import UsageError, did_you_mean, doing
from ndcheck.plan.arrivals import parse_arrivals, with_clock
from ndcheck.ranks import check_request
from ndcheck.records import CacheDtype, RunSpec
from ndcheck.samplers.backend import Backend
from ndcheck.samplers.options import (
    DEFAULTS,
    DRAFT,
    DTYPES,
    ENGINE,
    OF_SOME,
    TP,
    TRANSFORMERS,
    WIDTHS,
    Option,
)

if TYPE_CHECKING:
    from ndcheck.samplers.endpoint.private import Private
    from ndcheck.samplers.local.sampler import TransformersSampler

MOST_BYTES_LOADED = 2 << 30
"""For a plan alone: so many are read in seconds."""
LEAST_TOKENS_BESIDE, MOST_BYTES_BESIDE = 5000, 1 << 29
"""Of all completions of an arm, and of the weights of a model of which two are opened."""
NEEDS_CONTINUOUS = "needs --batching continuous, or a server: give --endpoint"


class LocalBackend(Backend):
    title = "transformers in this process"
    chosen_by = f"--engine {TRANSFORMERS}"
    engine = TRANSFORMERS
    own = (
        Option("adapter", ("adapter",), None, lambda path: None if path is None else str(path)),
        WIDTHS,
        DRAFT,
        *(ENGINE, TP, Option("tp_groups", ("tp_groups",), DEFAULTS.tp_groups)),
        Option("dequantise", ("dequantise",), DEFAULTS.dequantise),
        Option("kv_cache_dtype", ("kv_cache_dtype",), DEFAULTS.kv_cache_dtype),
    )
    takes = OF_SOME

    def check_given(self, typed: Mapping[str, Any]) -> None:
        if typed["batching"] == "exact" and typed["arrivals"] is not None:
            raise UsageError(f"--arrivals {typed['arrivals']} {NEEDS_CONTINUOUS}")

    def check(self, spec: RunSpec) -> None:
        parse_arrivals(spec.arrivals, "step")
        if spec.batching == "exact" and spec.arrivals != DEFAULTS.arrivals:
            raise UsageError(f"--arrivals {spec.arrivals} {NEEDS_CONTINUOUS}")
        if spec.kv_cache_dtype not in (caches := get_args(CacheDtype)):
            raise UsageError(f"--kv-cache-dtype {spec.kv_cache_dtype}: give {' or '.join(caches)}")
        if spec.kv_cache_dtype != "auto" and spec.batching != "exact":
            raise UsageError(
                f"--kv-cache-dtype {spec.kv_cache_dtype} needs --batching exact: the pages of "
                "continuous batching are transformers' own, in the model's dtype"
            )
        accepted = ("auto", *DTYPES)
        if spec.dtype not in accepted:
            raise UsageError(
                f"--dtype {spec.dtype}: choose from {', '.join(accepted)}"
                f"{did_you_mean(spec.dtype, accepted)}"
            )
        check_request(spec)
        if spec.draft is not None:
            _check_draft(spec)

    def open(
        self,
        spec: RunSpec,
        *,
        load_weights: bool = True,
        private: Private | None = None,
        say: Callable[[str], None] | None = None,
    ) -> TransformersSampler:
        from ndcheck.samplers.local.checkpoint.sources import find_source

        find_source(spec)  # Before torch is imported, which takes seconds.
        with _importing(spec):
            from ndcheck.samplers.local.device import own_settings
            from ndcheck.samplers.local.sampler import TransformersSampler

        with ExitStack() as stack:
            stack.enter_context(own_settings())
            sampler = TransformersSampler(spec, load_weights=load_weights)
            sampler.at_close.push(stack.pop_all())
        return sampler

    def open_for_run(
        self,
        spec: RunSpec,
        *,
        private: Private,
        say: Callable[[str], None],
        n_threads: object = None,
    ) -> TransformersSampler:
        from ndcheck.samplers.local.beside.compiling import compile_ahead

        with ExitStack() as stack:
            stack.enter_context(compile_ahead(spec))
            sampler = self._open_for_run(spec, n_threads)
            sampler.at_close.push(stack.pop_all())
        return sampler

    def _open_for_run(self, spec: RunSpec, n_threads: object) -> TransformersSampler:
        is_beside = self.runs_side_by_side(spec)
        if not is_beside and n_threads is None:
            return self.open(spec)
        with _importing(spec):
            from ndcheck.samplers.local.beside.sampler import SideBySideSampler
            from ndcheck.samplers.local.device import choose_threads, computing_with, own_settings

        with ExitStack() as stack:
            stack.enter_context(own_settings())
            n_threads = choose_threads(n_threads, 2 if is_beside else 1)
            stack.enter_context(computing_with(n_threads))
            sampler = SideBySideSampler(spec) if is_beside else self.open(spec)
            sampler.at_close.push(stack.pop_all())
        return sampler

    def runs_side_by_side(self, spec: RunSpec) -> bool:
        """Each in a process of its own, where that saves more than it takes to start one.

        And where the model is so small that its steps keep one core busy: of a large one they
        keep all, and no memory has to hold it twice.
        """
        n_tokens = len(spec.probes) * spec.n_samples * spec.decoding.max_tokens
        if (
            len(spec.arms) < 2
            or spec.tensor_parallel > 1
            or not spec.batch_sizes
            or spec.random_weights is not None
            or spec.draft is not None
            or (spec.target_rate is None and n_tokens < LEAST_TOKENS_BESIDE)
            or not 0 < self._n_bytes(spec) <= MOST_BYTES_BESIDE
            or len(os.sched_getaffinity(0)) < 2
        ):
            return False
        with _importing(spec):
            from ndcheck.samplers.local.beside.sampler import has_room

            return has_room(spec, self._n_bytes(spec))

    def unseen(self, spec: RunSpec) -> str | None:
        if spec.tensor_parallel > 1:
            return (
                f"{spec.model} runs on {spec.tensor_parallel} ranks: an op is seen in one process; "
                "explain a run of it with --tp 1"
            )
        if spec.batching == "continuous":
            return (
                "continuous batching: no step can be repeated alone; explain a run of the same "
                "prompts with --batching exact"
            )
        return None

    def untimed(self, spec: RunSpec) -> str | None:
        if spec.tensor_parallel > 1 or spec.batching == "continuous":
            return "only exact batches in one process are timed"
        if not spec.batch_sizes:
            return None  # Its weights are loaded anyway, to see what fits beside them.
        if spec.random_weights is not None:
            return "no weights are made for a plan"
        n_bytes = self._n_bytes(spec)
        if not 0 < n_bytes <= MOST_BYTES_LOADED:
            size = f"{n_bytes / 1e9:.1f} GB of weights" if n_bytes else "weights of the hub"
            return f"{size} are not loaded for a plan"
        return None

    def _n_bytes(self, spec: RunSpec) -> int:
        """Of the weights' files; 0 where they are not in a directory."""
        from ndcheck.samplers.local.checkpoint.sources import find_source

        model = Path(find_source(spec).model)
        files = [model] if model.is_file() else list(model.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files)

    def arrivals(self, spec: RunSpec) -> str | None:
        return None if spec.batching == "exact" else with_clock(spec.arrivals, "step")


@contextmanager
def _importing(spec: RunSpec) -> Iterator[None]:
    from ndcheck.samplers.local.device import starting_up

    with (
        doing("importing torch and transformers"),
        starting_up(spec.device if spec.tensor_parallel == 1 else None),
    ):
        yield


def _check_draft(spec: RunSpec) -> None:
    option = f"--draft {spec.draft}"
    if spec.batching != "exact":
        raise UsageError(f"{option}: only --batching exact has passes that are known")
    if "width" not in spec.axes:
        raise UsageError(f"{option}: what it proposes is verified along width: add it to --axes")
    if spec.decoding.temperature:
        raise UsageError(f"{option}: its tokens are verified greedily: leave out --temperature")
    if spec.tensor_parallel > 1:
        raise UsageError(f"{option}: it drafts in one process: leave out --tp")
