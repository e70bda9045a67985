"""``--model scripted:NAME``: planted streams that nothing computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ndcheck.errors import UsageError
from ndcheck.records import RunSpec
from ndcheck.samplers.backend import Backend
from ndcheck.samplers.options import KERNELS, parse_arms

if TYPE_CHECKING:
    from ndcheck.samplers.base import Sampler
    from ndcheck.samplers.endpoint.private import Private

PREFIX = "scripted:"


class ScriptedBackend(Backend):
    title = "a scripted model"
    chosen_by = "--model scripted:NAME"
    own = (replace(KERNELS, parse=lambda arms: parse_arms(arms or ("stock",))),)
    refusal = f"this needs a model that computes, not {PREFIX}NAME"

    def is_chosen(self, model: str, engine: str, *, is_served: bool) -> bool:
        return model.startswith(PREFIX)

    def blank(self, defaults: RunSpec) -> RunSpec:
        # A command names the arms, both or one: what no --kernels means is not as elsewhere.
        return replace(defaults, arms=())

    def open(
        self,
        spec: RunSpec,
        *,
        load_weights: bool,
        private: Private,
        say: Callable[[str], None],
    ) -> Sampler:
        from ndcheck.samplers.scripted.sampler import BEHAVIOURS, ScriptedSampler

        name = spec.model.removeprefix(PREFIX)
        if name not in BEHAVIOURS:
            raise UsageError(
                f"no scripted sampler named {name!r}: choose from {', '.join(BEHAVIOURS)}"
            )
        return ScriptedSampler(name)

    def unseen(self, spec: RunSpec) -> str | None:
        return f"--model {spec.model} does not run in this process: no op can be seen"
