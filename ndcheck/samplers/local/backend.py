"""transformers in this process: the backend where nothing else is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ndcheck.errors import UsageError
from ndcheck.plan.arrivals import parse_arrivals, with_clock
from ndcheck.ranks import check_request
from ndcheck.records import RunSpec
from ndcheck.samplers.backend import Backend
from ndcheck.samplers.options import DEFAULTS, ENGINE, OF_SOME, TP, TRANSFORMERS, WIDTHS, Option

if TYPE_CHECKING:
    from ndcheck.samplers.local.sampler import TransformersSampler

NEEDS_CONTINUOUS = "needs --batching continuous, or a server: give --endpoint"


class LocalBackend(Backend):
    title = "transformers in this process"
    chosen_by = f"--engine {TRANSFORMERS}"
    engine = TRANSFORMERS
    own = (
        Option("adapter", ("adapter",), None, lambda path: None if path is None else str(path)),
        WIDTHS,
        *(ENGINE, TP, Option("tp_groups", ("tp_groups",), DEFAULTS.tp_groups)),
        Option("dequantise", ("dequantise",), DEFAULTS.dequantise),
    )
    takes = OF_SOME

    def check_given(self, typed: Mapping[str, Any]) -> None:
        if typed["batching"] == "exact" and typed["arrivals"] is not None:
            raise UsageError(f"--arrivals {typed['arrivals']} {NEEDS_CONTINUOUS}")

    def check(self, spec: RunSpec) -> None:
        parse_arrivals(spec.arrivals, "step")
        if spec.batching == "exact" and spec.arrivals != DEFAULTS.arrivals:
            raise UsageError(f"--arrivals {spec.arrivals} {NEEDS_CONTINUOUS}")
        check_request(spec)

    def open(
        self,
        spec: RunSpec,
        *,
        load_weights: bool = True,
        headers: Mapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> TransformersSampler:
        from ndcheck.samplers.local.checkpoint.sources import find_source

        find_source(spec)  # Before torch is imported, which takes seconds.
        from ndcheck.samplers.local.sampler import TransformersSampler

        return TransformersSampler(spec, load_weights=load_weights)

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

    def arrivals(self, spec: RunSpec) -> str | None:
        return None if spec.batching == "exact" else with_clock(spec.arrivals, "step")
