"""The load plan: which batches run, in which order, and what each is compared with.

A plan is a pure function of the run's spec and the probes' lengths, so a resumed run continues
the same one. It goes through the grid *batch size x axis* in rounds, with other filler contents,
slots and cuts of the prompt in each round, until it holds the samples asked for. Every trial names
its baseline: the trial that differs from it along its axis only.

A round runs the baselines from the largest batch to the smallest, the probe alone, and then all
else from the smallest to the largest: every size follows a larger one and a smaller one, and equal
loads run in another order. In process a load gives what it gave before, so there only `run-to-run`
repeats one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ndcheck.errors import UsageError
from ndcheck.plan.grid import CACHE_STATES, SMALLEST_PAGE_TOKENS, Cell, Grid
from ndcheck.records import ALONE, FED_AXES, Arm, CacheState, Load, Probe, RunSpec, Trial


def plan_trials(
    spec: RunSpec,
    prompt_lengths: Mapping[str, int],
    context: int,
    n_draws: int | None = None,
    cache_states: tuple[CacheState, ...] = CACHE_STATES,
) -> list[Trial]:
    """All trials of a run in execution order, arms interleaved on the same loads.

    ``prompt_lengths`` are in tokens by probe id, ``context`` is the model's limit in tokens.
    A completion that is fed again is no sample of ``spec.n_samples``, unless nothing else is asked.
    ``n_draws`` asks for that many distinct loads of each probe and arm (trials, where a repeat is a
    draw) instead of ``spec.n_samples`` samples. ``cache_states`` are those that the backend can
    bring about. The plan is shorter where no other load exists. The probe alone comes first, in the
    rounds, and last.
    Raises UsageError where a prompt and its completion do not fit the context.
    """
    trials: list[Trial] = []
    for probe in spec.probes:
        length = prompt_lengths[probe.probe_id]
        if length + spec.decoding.max_tokens > context:
            raise UsageError(
                f"prompt {probe.probe_id} has {length} tokens: with --max-tokens "
                f"{spec.decoding.max_tokens} it exceeds the model's context of {context}"
            )
        states = cache_states
        if spec.batching == "continuous" and length <= SMALLEST_PAGE_TOKENS:  # No page to share.
            states = tuple(state for state in states if state != "prefix")
        grid = Grid(spec, probe.probe_id, length, context - spec.decoding.max_tokens, states)
        _ProbePlan(trials, spec, probe, n_draws).add_all(grid)
    return trials


class _ProbePlan:
    """Adds the trials of one probe to those of the run."""

    def __init__(
        self, trials: list[Trial], spec: RunSpec, probe: Probe, n_draws: int | None
    ) -> None:
        self._trials = trials
        self._spec = spec
        self._probe = probe
        self._n_draws = n_draws
        self._first_ids: dict[Load, dict[Arm, int]] = {}
        self._n_run: Counter[Load] = Counter()
        self._n_samples = 0

    def add_all(self, grid: Grid) -> None:
        alone_again = Cell("run-to-run", ALONE)
        self._add(Cell("reference", ALONE))
        # A process may compute its first batch unlike all others, and so its first reference.
        if self._n_missing() > 1:
            self._add(alone_again)
        self._add(Cell("control", ALONE))
        closes_alone = self._n_missing() > 0
        self._n_samples += closes_alone
        round_index, n_missing = 0, self._n_missing() + 1
        # A round that brings nothing new is the last.
        while 0 < self._n_missing() < n_missing:
            n_missing = self._n_missing()
            for cell in grid.round_of_cells(round_index):
                if self._n_missing() > 0 or cell.purpose == "control":
                    self._add_if_new(cell, grid)
            round_index += 1
        if closes_alone:
            self._add(alone_again)

    def _n_missing(self) -> int:
        """Of the samples or draws asked for, those that are not planned yet."""
        if self._n_draws is None:
            return self._spec.n_samples - self._n_samples
        if self._spec.repeats_are_draws or self._spec.axes == ("run-to-run",):
            return self._n_draws + 1 - self._n_run.total()
        return self._n_draws + 1 - len(self._n_run)

    def _counts(self, load: Load) -> bool:
        """Is it among the samples asked for? What is no plain decoding comes on top of these.

        Where nothing else is asked for, it is what is.
        """
        return self._spec.only_feeds or load.is_decoded

    def _add_if_new(self, cell: Cell, grid: Grid) -> None:
        if cell.purpose == "control":
            if cell.baseline in self._first_ids:
                self._add(cell)
            return
        n_copies = len(cell.load.slots)
        is_counted = self._n_draws is None and self._counts(cell.load)
        if is_counted and n_copies > self._n_missing():
            # With other rows than its baseline's, a load would differ from it along two axes.
            if cell.purpose in ("run-to-run", "cache", *FED_AXES):
                return
            n_copies = self._n_missing()
            cell = replace(cell, load=grid.with_copies(cell.load, n_copies))
        n_run = self._n_run[cell.load]
        if cell.baseline not in self._first_ids:
            return
        if cell.purpose == "run-to-run":
            if "run-to-run" not in self._spec.axes and cell.load != ALONE and n_run > 1:
                return
        elif n_run and not self._spec.repeats_are_draws:
            return
        self._add(cell)

    def _add(self, cell: Cell) -> None:
        baselines = self._first_ids.get(cell.baseline, {})
        ids = {}
        for arm in self._spec.arms:
            ids[arm] = len(self._trials)
            last = self._trials[-1] if self._trials else None
            trial = Trial(
                trial_id=len(self._trials),
                arm=arm,
                probe_id=self._probe.probe_id,
                purpose=cell.purpose,
                load=cell.load,
                first_sample_id=last.first_sample_id + last.n_samples if last else 0,
                baseline=baselines.get(arm),
            )
            self._trials.append(trial)
        self._first_ids.setdefault(cell.load, ids)
        if cell.purpose != "control":
            self._n_run[cell.load] += 1
            self._n_samples += len(cell.load.slots) if self._counts(cell.load) else 0
