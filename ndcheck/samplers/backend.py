"""What ndcheck asks of a kind of sampler before one is open: each backend's ``backend.py`` answers.

They import nothing that computes: help, reports and refusals need them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ndcheck.records import RunSpec
from ndcheck.samplers.options import (
    ASKED,
    OF_SOME,
    SHARED,
    Option,
)

if TYPE_CHECKING:
    from ndcheck.samplers.base import Sampler
    from ndcheck.samplers.endpoint.private import Private


class Backend:
    """One way to get tokens: how it is chosen, what it takes, checks, opens and can explain."""

    title: str
    """In help and in the line that refuses an option of another backend."""
    chosen_by: str
    """What to give on the command line to get it."""
    engine: str = ""
    """Its name for ``--engine``, where that chooses it."""
    own: tuple[Option, ...] = ()
    """Options that it alone has, and those of SHARED that mean something else to it."""
    takes: frozenset[str] = frozenset()
    """Names from OF_SOME."""
    refusal: str = ""
    """Why an option of another backend is refused; empty: by naming that one."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """The same by the option's name, where it has a reason of its own."""
    opening: str = "loading"
    is_remote: bool = False
    """Does it compute elsewhere, so that only it can tell where, and answers are of replicas?"""

    @property
    def options(self) -> tuple[Option, ...]:
        """All that it takes, in the order in which a command gives them."""
        own = {option.name: option for option in self.own}
        shared = {option.name: option for option in SHARED}
        return (
            *ASKED,
            *(option for name, option in own.items() if name not in shared),
            *(
                own.get(name, option)
                for name, option in shared.items()
                if name in own or name in self.takes or name not in OF_SOME
            ),
        )

    def is_chosen(self, model: str, engine: str, *, is_served: bool) -> bool:
        """Is it meant by these? The first of the table that says so is."""
        return engine == self.engine

    def blank(self, defaults: RunSpec) -> RunSpec:
        """``defaults`` with the places of its own options."""
        return defaults

    def check_given(self, typed: Mapping[str, Any]) -> None:
        """Raise UsageError for options by name that do not fit together, as they were typed."""

    def check(self, spec: RunSpec) -> None:
        """Raise UsageError naming the option that it cannot serve."""

    def open(
        self,
        spec: RunSpec,
        *,
        load_weights: bool,
        private: Private,
        say: Callable[[str], None],
    ) -> Sampler:
        """The sampler of ``spec``, as `ndcheck.samplers.base.open_sampler` says."""
        raise NotImplementedError

    def runs_side_by_side(self, spec: RunSpec) -> bool:
        """Whether a run of ``spec`` computes its arms at the same time."""
        return False

    def open_for_run(
        self,
        spec: RunSpec,
        *,
        private: Private,
        say: Callable[[str], None],
        n_threads: object = None,
    ) -> Sampler:
        """As `ndcheck.samplers.base.open_for_run` says."""
        return self.open(spec, load_weights=True, private=private, say=say)

    def unseen(self, spec: RunSpec) -> str | None:
        """Why `trace` and `shrink` cannot look into a run of ``spec``; None: they can."""
        raise NotImplementedError

    def untimed(self, spec: RunSpec) -> str | None:
        """Why a dry run does not time trials of ``spec``, maybe ""; None: it does."""
        return ""

    def arrivals(self, spec: RunSpec) -> str | None:
        """When requests arrive, as an option says it; None where a load is one exact batch."""
        return None
