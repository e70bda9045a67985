"""Two runs side by side: what changed in how they were made, and in what they gave."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ndcheck.environment import MUST_MATCH
from ndcheck.judging.comparison import (
    NOTHING_SHARED,
    ONE_RUN,
    Change,
    Comparison,
    Drift,
    FailOn,
)
from ndcheck.judging.verdict import Verdict
from ndcheck.reports.document import published
from ndcheck.reports.terminal import (
    MIN_WIDTH_SIDE_BY_SIDE,
    print_verdict,
    print_without_padding,
)
from ndcheck.reports.untrusted import quoted, visible
from ndcheck.reports.wording import phrases

SCHEMA_VERSION = 1
VALUE_WIDTH = 28
JUDGED_BY = ("confidence", "allow_latent", "answer", "answer_pattern")
PROMPT_WIDTH = 50


def print_comparison(
    console: Console,
    names: tuple[str, str],
    comparison: Comparison,
    verdicts: Mapping[FailOn, Verdict],
) -> None:
    """``names`` are A's and B's, as the user gave them."""
    for verdict in verdicts.values():
        print_verdict(console, verdict)
    if verdicts:
        console.print()
    for letter, name in zip("AB", names, strict=True):
        console.print(Text(f"{letter}  {visible(name)}"), soft_wrap=True)
    console.print()
    if comparison.changes:
        print_without_padding(console, _changes(comparison.changes, console.width))
    else:
        console.print("Made in the same way: environment, model, kernels and load are equal")
    if any(_decides_bits(change) for change in comparison.changes):
        console.print("* decides bits: other bits in B are no fault by themselves")
    if comparison.is_of_one_run:
        console.print(f"{ONE_RUN[0].upper()}{ONE_RUN[1:]}")
    for drift in comparison.drifts:
        console.print()
        heading = f"{_arms(drift)} {visible(drift.b.probe_id)}: "
        console.print(
            Text(heading + quoted(drift.prompt, PROMPT_WIDTH), style="bold"), soft_wrap=True
        )
        console.print(Text(f"  {drift_sentence(drift)}"))
        print_without_padding(console, _figures(drift))
        for line in _tests(drift, _changes_of_load(comparison.changes)):
            console.print(f"  {line}")
    if not comparison.drifts:
        console.print(
            f"\n{NOTHING_SHARED[0].upper()}{NOTHING_SHARED[1:]}: outputs cannot be compared"
        )
    for letter, alone in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        for name in alone:
            console.print(Text(f"only in {letter}: {visible(name)}"))


def drift_sentence(drift: Drift) -> str:
    """What became of the completion of the probe alone in its batch."""
    tokens = phrases.count(drift.n_shared_tokens, drift.unit)
    if drift.first_divergence is not None and drift.tokens is not None:
        texts = [quoted(text, PROMPT_WIDTH) if text else "the end" for text in drift.tokens]
        at = drift.first_divergence + 1
        return f"{drift.unit.upper()}S differ from {drift.unit} {at}: {texts[0]}, now {texts[1]}"
    if drift.kind == "latent":
        return f"BITS differ, {tokens} are equal"
    if drift.bits_recorded:
        return f"no drift: {tokens} equal bit for bit"
    return f"no drift: {tokens} equal; bits were not recorded in both runs"


def comparison_document(
    names: tuple[str, str], comparison: Comparison, verdicts: Mapping[FailOn, Verdict], code: int
) -> dict[str, Any]:
    """The ``--json`` document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "exit_code": code,
        "a": names[0],
        "b": names[1],
        "fail_on": {
            name: {"verdict": verdict.outcome, "reasons": list(verdict.reasons)}
            for name, verdict in verdicts.items()
        },
        "changes": [
            {**dataclasses.asdict(change), "decides_bits": _decides_bits(change)}
            for change in comparison.changes
        ],
        "drifts": [_drift_document(drift) for drift in comparison.drifts],
        "only_in_a": list(comparison.only_in_a),
        "only_in_b": list(comparison.only_in_b),
        "is_of_one_run": comparison.is_of_one_run,
    }


def _drift_document(drift: Drift) -> dict[str, Any]:
    fields = {
        field.name: getattr(drift, field.name)
        for field in dataclasses.fields(drift)
        if field.name not in ("a", "b")
    }
    sides = {
        side: {
            "arm": probe.arm,
            "probe_id": probe.probe_id,
            "n_trials": probe.n_trials,
            "diverged_trials": probe.diverged_trials,
            "draw": probe.draw,
            "n_draws": probe.n_draws,
            "diverged_draws": probe.diverged_draws,
            "n_samples": probe.n_samples,
            "n_unique": probe.n_unique,
            "common_prefix_tokens": probe.common_prefix_tokens,
            "tokens_per_s": probe.tokens_per_s,
            "slowdown_vs_stock": probe.slowdown_vs_stock,
            "metrics": published(probe.metrics),
        }
        for side, probe in (("a", drift.a), ("b", drift.b))
    }
    return {**fields, **sides}


def _arms(drift: Drift) -> str:
    return drift.b.arm if drift.a.arm == drift.b.arm else f"{drift.a.arm} -> {drift.b.arm}"


def _decides_bits(change: Change) -> bool:
    return change.name in MUST_MATCH or change.name.partition(".")[0] in MUST_MATCH


def _changes(changes: Sequence[Change], width: int) -> Table:
    table = _table("changed", "", "A", "B", gap=1 if width < MIN_WIDTH_SIDE_BY_SIDE else 2)
    table.columns[1].no_wrap = True
    for change in changes:
        mark = "*" if _decides_bits(change) else ""
        table.add_row(
            change.group,
            "\n".join(textwrap.wrap(f"{visible(change.name)}{mark}", VALUE_WIDTH)),
            *(_value(value, change.name) for value in (change.a, change.b)),
        )
    return table


def _value(value: Any, name: str) -> Text:
    if value is None:
        # What is asked for is known.
        return Text("none" if name.startswith("spec.") else "unknown")
    if isinstance(value, dict):
        value = ", ".join(f"{name} {item}" for name, item in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(str, value))
    return Text(visible(str(value)))


def _figures(drift: Drift) -> Table:
    table = _table("", "A", "B")
    for name, *values in _rows(drift):
        table.add_row(f"  {name}", *values)
    return table


def _changes_of_load(changes: Sequence[Change]) -> list[str]:
    """What was run otherwise; other rules to judge the same batches by are no other load."""
    names = [change.name.removeprefix("spec.") for change in changes if change.group == "load"]
    return [name for name in names if name not in JUDGED_BY]


def _tests(drift: Drift, of_load: Sequence[str]) -> Iterator[str]:
    """``of_load`` are the fields of the load that changed."""
    yield f"{phrases.count(drift.n_shared_completions, 'completion')} in common"
    if of_load:
        yield f"the loads differ: {', '.join(map(visible, of_load))}"
    yield f"one rate of divergence: p = {drift.fisher_p:.2g} (Fisher's exact test)"
    if drift.max_abs_dlogprob is not None:
        kl = f"KL k1 {_number(drift.k1_kl)}, k3 {_number(drift.k3_kl)} nats/token"
        yield f"logprobs differ by up to {drift.max_abs_dlogprob:.3g} nats; {kl}"


def _rows(drift: Drift) -> Iterator[tuple[str, ...]]:
    a, b = drift.a, drift.b
    yield "unique", *(f"{p.n_unique} of {p.n_samples}" for p in (a, b))
    yield "diverged", *(f"{p.diverged_draws} of {phrases.draws(p)}" for p in (a, b))
    yield "rate", *(phrases.rate(p) for p in (a, b))
    counted = zip((a, b), drift.units, strict=True)
    yield "common prefix", *(phrases.count(p.common_prefix_tokens, unit) for p, unit in counted)
    metrics_a, metrics_b = published(a.metrics), published(b.metrics)
    for name in metrics_a:
        if metrics_a[name] is not None or metrics_b[name] is not None:
            yield name, _number(metrics_a[name]), _number(metrics_b[name])
    if len(set(drift.units)) == 1:
        yield f"{drift.units[0]}s/s", *(phrases.speed(p.tokens_per_s) for p in (a, b))
    if a.slowdown_vs_stock is not None or b.slowdown_vs_stock is not None:
        yield "time over stock's", *(_number(p.slowdown_vs_stock) for p in (a, b))


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value + 0.0:.3g}"  # no minus before 0


def _table(*names: str, gap: int = 2) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold", max_width=VALUE_WIDTH)
    return table
