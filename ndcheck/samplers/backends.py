"""The table of backends, and what is asked of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ndcheck.errors import UsageError, did_you_mean
from ndcheck.records import RunSpec
from ndcheck.samplers.backend import Backend
from ndcheck.samplers.endpoint.backend import EndpointBackend
from ndcheck.samplers.local.backend import LocalBackend
from ndcheck.samplers.options import (
    ASKED,
    DEFAULTS,
    SHARED,
    TRANSFORMERS,
    Option,
)
from ndcheck.samplers.scripted.backend import ScriptedBackend
from ndcheck.samplers.vllm.backend import EngineBackend

BACKENDS: tuple[Backend, ...] = (
    EndpointBackend(),
    ScriptedBackend(),
    LocalBackend(),
    EngineBackend(),
)
ENGINES = tuple(backend.engine for backend in BACKENDS if backend.engine)
_SHARED_NAMES = {option.name for option in SHARED}
OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        *ASKED,
        *(
            option
            for backend in reversed(BACKENDS)
            for option in backend.own
            if option.name not in _SHARED_NAMES
        ),
        *SHARED,
    )
}
"""Every option of a run by its name; a backend may hold it elsewhere."""


def choose(model: str, engine: str, *, is_served: bool) -> Backend:
    """The backend that these options ask for. Raises UsageError for an engine that is none."""
    for backend in BACKENDS:
        if backend.is_chosen(model, engine, is_served=is_served):
            return backend
    raise UsageError(
        f"--engine: {engine!r} is unknown; choose from {', '.join(ENGINES)}"
        f"{did_you_mean(engine, ENGINES)}"
    )


def backend_of(spec: RunSpec) -> Backend:
    """The backend that a run of ``spec`` has."""
    engine = spec.engine.name if spec.engine else TRANSFORMERS
    return choose(spec.model, engine, is_served=spec.endpoint is not None)


def owners(name: str) -> list[Backend]:
    """The backends that take an option."""
    return [backend for backend in BACKENDS if name in {option.name for option in backend.options}]


def refuse_others(backend: Backend, typed: Mapping[str, Any]) -> None:
    """Raise UsageError for an option, by name, that ``backend`` does not take."""
    for name, value in typed.items():
        if name in OPTIONS and OPTIONS[name].is_given(value) and backend not in owners(name):
            owner = owners(name)[0]
            reason = (
                backend.refusals.get(name)
                or backend.refusal
                or f"this is for {owner.title}: give {owner.chosen_by}"
            )
            raise UsageError(f"{OPTIONS[name].flag}: {reason}")


def refuse_other_fields(backend: Backend, spec: RunSpec) -> None:
    """The same for a spec that no command line may have made."""
    typed = {
        option.name: option.get(spec)
        for option in SHARED
        if option.get(spec) != option.get(DEFAULTS)
    }
    refuse_others(backend, typed)
