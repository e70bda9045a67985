"""The result of a run on one screen, and the one-line progress of a run under way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ndcheck.analysis.summary import LoadFinding, ProbeSummary, Summary
from ndcheck.findings import Findings
from ndcheck.judging.verdict import NOT_TOLD_APART, Outcome, Verdict
from ndcheck.records import ARMS, AXES, RunSpec
from ndcheck.reports.ranking import tally, worst_first
from ndcheck.reports.trees.branches import tree_lines
from ndcheck.reports.untrusted import quoted, visible
from ndcheck.reports.wording import answers, phrases, serving
from ndcheck.reports.wording.remedies import alone, remedies
from ndcheck.reports.wording.reproduction import argument, prompts_file, wrapped_command
from ndcheck.samplers.backends import backend_of

MAX_VERDICTS = 8
MAX_OF_MANY = 3
"""Of more failed prompts than verdicts are shown: commands that measure one alone."""
MAX_LOADS = 10
MAX_COMPLETIONS = 5
MAX_COMMAND_LINES = 4
MIN_PROMPT_WIDTH = 16
MIN_WIDTH_SIDE_BY_SIDE = 80
STYLES: dict[Outcome, str] = {
    "FAIL": "bold red",
    "INCONCLUSIVE": "bold yellow",
    "PASS": "bold green",
}


def print_report(
    console: Console, findings: Findings, defaults: RunSpec, outputs: Sequence[str] = ()
) -> None:
    """Print the screen; ``outputs`` are options that the command to repeat it has besides."""
    width, ranked = console.width, worst_first(findings)
    # The details of one probe fill a screen: the worst one's; report.md has them all.
    detailed = [probe for probe in ranked if probe.probe_id == ranked[0].probe_id]
    detailed.sort(key=lambda probe: ARMS.index(probe.arm))
    groups = [detailed] if width >= MIN_WIDTH_SIDE_BY_SIDE else [[probe] for probe in detailed]
    unit = phrases.unit(findings.run)
    sections: list[Sequence[RenderableType]] = [
        [_verdicts(ranked, findings)],
        [_setting(findings, detailed, defaults, width, outputs)],
        *([*_heading(group, detailed), *_axes(group, findings, unit, width)] for group in groups),
        *([*_heading(group, detailed), *_loads(group, unit)] for group in groups),
        [*_answers(detailed, findings)],
        [*_comparison(findings.summary)],
        [*_trees(detailed, width, unit)],
        [Text(visible(f"trace: {sentence}")) for sentence in findings.advice],
        [*_next_steps(findings, defaults, width)],
    ]
    for index, section in enumerate(section for section in sections if section):
        if index:
            console.print()
        for part in section:
            print_without_padding(console, part)


def _heading(
    group: Sequence[ProbeSummary], detailed: Sequence[ProbeSummary]
) -> Iterator[RenderableType]:
    if len(group) < len(detailed):
        yield Text(group[0].arm, style="bold")


def print_verdict(console: Console, verdict: Verdict, subject: str = "") -> None:
    """A line for each of its reasons; ``subject`` is what it is about, where there are several."""
    about = f"{subject}  " if subject else ""
    for reason in verdict.reasons:
        label = Text(verdict.label, style=STYLES[verdict.outcome])
        console.print(Text.assemble(label, f"  {about}{visible(reason)}"))


def print_without_padding(console: Console, part: RenderableType) -> None:
    """Print without the spaces that would end each line."""
    for line in console.render_lines(part, pad=False):
        text = Text.assemble(*((segment.text, segment.style or "") for segment in line))
        text.rstrip()
        console.print(text)


def _verdicts(ranked: Sequence[ProbeSummary], findings: Findings) -> Table:
    """One line for each probe and arm, the worst first."""
    judgement, verdicts = findings.judgement, findings.verdicts
    rows: list[tuple[Outcome, str, list[str]]] = []
    explained = {r for verdict in verdicts.values() for r in verdict.verdict.reasons}
    unexplained = [r for r in judgement.verdict.reasons if r not in explained]
    if unexplained or not ranked:
        rows.append((judgement.verdict.outcome, "", unexplained))
    for probe in ranked[:MAX_VERDICTS]:
        verdict = verdicts[probe.arm, probe.probe_id].verdict
        sentences = [phrases.outcome(probe)]
        if verdict.outcome == "INCONCLUSIVE":
            # The table of properties has no row for one that was not tried.
            tried = {finding.axis for finding in probe.axes if finding.n_trials}
            of_axes = {
                r
                for axis, judged in verdicts[probe.arm, probe.probe_id].axes.items()
                for r in judged.reasons
                if axis in tried
            }
            sentences += [reason for reason in verdict.reasons if reason not in of_axes]
        elif verdict.outcome == "FAIL" and not probe.diverged_draws:
            sentences += verdict.reasons[:1]
        rows.append((verdict.outcome, phrases.subject(probe, findings.summary), sentences))
    with_subject = any(subject for _, subject, _ in rows)
    grid = _grid(3 if with_subject else 2)
    for outcome, subject, sentences in rows:
        label = Text(outcome, style=STYLES[outcome])
        reasons = Text("\n".join(map(visible, sentences)))
        grid.add_row(label, *([Text(subject)] if with_subject else []), reasons)
    if len(ranked) > MAX_VERDICTS:
        grid.add_row("", "", f"and {len(ranked) - MAX_VERDICTS} more in summary.csv")
        grid.add_row("", "", f"{tally(ranked, findings)}")
    return grid


def _setting(
    findings: Findings,
    detailed: Sequence[ProbeSummary],
    defaults: RunSpec,
    width: int,
    outputs: Sequence[str],
) -> Table:
    """Where and what was measured, and the command that does it again."""
    run = findings.run
    grid = _grid(2)
    width -= len("decoding  ")
    grid.add_row("model", Text(phrases.environment(run)))
    grid.add_row("decoding", Text(phrases.workload(run)))
    shortfall = phrases.shortfall(run, findings.summary)
    if shortfall:
        grid.add_row("loads", Text(shortfall))
    shown = {probe.probe_id for probe in detailed}
    for probe in run.spec.probes:
        if probe.probe_id in shown:
            label = f"{visible(probe.probe_id)}: " if len(run.spec.probes) > 1 else ""
            text_width = max(MIN_PROMPT_WIDTH, width - cell_len(label))
            grid.add_row("prompt", Text(label + quoted(probe.prompt, text_width)))
    for served in (summary.serving for summary in detailed):
        if served is not None:
            if backend_of(run.spec).is_remote:
                grid.add_row("answers", Text(serving.origin(served, run)))
            if served.reached:
                grid.add_row("batches", Text("\n".join(serving.batches(served))))
    command = wrapped_command(run.spec, defaults, width, _directory(findings), outputs)
    grid.add_row("repeat", _command(command, width))
    return grid


def _directory(findings: Findings) -> str:
    return "" if findings.directory is None else str(findings.directory)


def _command(lines: Sequence[str], width: int) -> Text:
    """A command that can be copied; one that the screen would break in the middle is not shown."""
    if len(lines) > MAX_COMMAND_LINES or max(map(cell_len, lines)) > width:
        return Text("the command is too long for the screen: see report.md")
    return Text("\n".join(lines), style="cyan")


def _axes(
    detailed: Sequence[ProbeSummary], findings: Findings, unit: str, width: int
) -> list[RenderableType]:
    """Each property with its own verdict, arms below one another."""
    with_arm = len(detailed) > 1
    is_narrow = width < MIN_WIDTH_SIDE_BY_SIDE
    names = ["property", *(["arm"] if with_arm else []), "verdict"]
    table = _table(*names, gap=1 if is_narrow else 2)
    confidence = phrases.percent(detailed[0].confidence) if detailed else ""
    numbers = ("diverged", f"rate ({confidence} %)", "latent", f"at {unit}\n(from 1)")
    if is_narrow:
        numbers = ("diverged", f"rate\n({confidence} %)", "bits\nonly", f"{unit}\nfrom 1")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for axis in AXES:
        label: str = axis
        for probe in detailed:
            finding = next((finding for finding in probe.axes if finding.axis == axis), None)
            verdict = findings.verdicts[probe.arm, probe.probe_id].axes.get(axis)
            if finding is None or verdict is None:
                continue
            n, diverged, latent = finding.shown
            table.add_row(
                label,
                *([probe.arm] if with_arm else []),
                Text(verdict.outcome, style=STYLES[verdict.outcome].removeprefix("bold ")),
                f"{diverged}/{n}",
                phrases.rate(finding),
                str(latent),
                phrases.first_at(finding),
            )
            label = ""
    if not table.row_count:
        return []
    notes = [phrases.scope(detailed)]
    if any(finding.told_apart is False for probe in detailed for finding in probe.axes):
        notes.append(f"INCONCLUSIVE: something diverged, {NOT_TOLD_APART}")
    return [table, *map(Text, [*notes, *phrases.fed_notes(detailed, with_arm=with_arm)])]


def _answers(detailed: Sequence[ProbeSummary], findings: Findings) -> Iterator[RenderableType]:
    """Flips of the answer beside flips of tokens, by load; how right answers are, over prompts."""
    for probe in detailed:
        if (sentence := answers.flips(probe)) is not None:
            yield Text(f"{probe.arm}: {sentence}" if len(detailed) > 1 else sentence)
    rows = [
        (probe, load)
        for probe in detailed
        for load in probe.loads
        if load.n_diverged_trials or load.answer_flips
    ]
    if any(probe.answers for probe in detailed) and rows:
        table = _table("load", *(["arm"] if len(detailed) > 1 else []))
        for name in ("batch", "slot", "trials", "tokens\nflipped", "answer\nflipped"):
            table.add_column(name, justify="right", no_wrap=True)
        for probe, load in rows[:MAX_LOADS]:
            table.add_row(
                phrases.load(load),
                *([probe.arm] if len(detailed) > 1 else []),
                str(load.batch_size),
                "all" if load.slot is None else str(load.slot),
                str(load.n_trials),
                str(load.n_diverged_trials),
                "" if load.answer_flips is None else str(load.answer_flips),
            )
        yield table
        if len(rows) > MAX_LOADS:
            yield Text(f"{len(rows) - MAX_LOADS} more in loads.csv")
    yield from map(Text, answers.accuracy(findings))


def _comparison(summary: Summary) -> Iterator[Text]:
    """What the invariant arm costs, and whether the arms differ at all."""
    timed = [(probe, x) for probe in summary.probes if (x := probe.slowdown_vs_stock) is not None]
    for probe, slowdown in timed if len(timed) <= MAX_VERDICTS else ():
        yield Text(f"{phrases.subject(probe, summary)} takes {slowdown:.2f}x the time of stock")
    if len(timed) > MAX_VERDICTS:
        slowdowns = [slowdown for _, slowdown in timed]
        yield Text(
            f"invariant takes {median(slowdowns):.2f}x the time of stock: the median of "
            f"{len(timed)} prompts, from {min(slowdowns):.2f}x to {max(slowdowns):.2f}x"
        )
    if summary.fisher_p is not None:
        yield Text(f"stock against invariant: p = {summary.fisher_p:.2g} (Fisher's exact test)")


def _loads(detailed: Sequence[ProbeSummary], unit: str) -> list[RenderableType]:
    """The loads, arms side by side: those that diverged, or whose bits did, before the others."""
    by_load: dict[tuple[object, ...], dict[str, LoadFinding]] = {}
    for probe in detailed:
        for load in probe.loads:
            key = (load.axis, load.batch_size, load.slot, phrases.load(load))
            by_load.setdefault(key, {})[probe.arm] = load
    rows = list(by_load.values())
    told = [row for row in rows if not all(_load_rank(row))]
    shown = (sorted(told, key=_load_rank) or rows)[:MAX_LOADS]
    names = ("token", "tok/s") if unit == "token" else ("char", "char/s")
    # Two arms just fit 80 columns.
    table = _table("load", gap=1 if len(detailed) > 1 else 2)
    for name in ("batch", "slot"):
        table.add_column(name, justify="right", no_wrap=True)
    for probe in detailed:
        arm = f"{probe.arm}\n" if len(detailed) > 1 else ""
        for name in ("unique", *names[:1], "latent", *names[1:]):
            table.add_column(f"{arm}{name}", justify="right", no_wrap=True)
            arm = "\n" if arm else ""
    for row in rows:
        if row in shown:
            load = next(iter(row.values()))
            cells = [cell for probe in detailed for cell in _load_cells(row.get(probe.arm))]
            slot = "all" if load.slot is None else str(load.slot)
            table.add_row(phrases.load(load), str(load.batch_size), slot, *cells)
    if not rows:
        return []
    counted = Text(f"{unit.capitalize()}s are counted from 1, slots from 0")
    hidden = [load for row in rows if row not in shown for load in row.values()]
    if not hidden:
        return [table, counted]
    diverged = sum(load.n_diverged_trials for load in hidden)
    latent = sum(load.latent for load in hidden)
    trials = phrases.count(sum(load.n_trials for load in hidden), "trial")
    rest = f"{len(rows) - len(shown)} more in loads.csv: {diverged} of {trials} diverged"
    return [table, Text(rest + (f", {latent} latent" if latent else "")), counted]


def _load_rank(row: Mapping[str, LoadFinding]) -> tuple[bool, bool, bool]:
    diverged = any(load.n_diverged_trials for load in row.values())
    latent = any(load.latent for load in row.values())
    plain = any(load.axis in ("reference", "batch-size") for load in row.values())
    return not diverged, not latent, not plain


def _load_cells(load: LoadFinding | None) -> list[str]:
    if load is None:
        return [""] * 4
    if not load.n_samples:
        return ["failed", "", "", ""]
    return [
        str(load.n_unique),
        phrases.token(load.first_divergence_min),
        str(load.latent),
        phrases.speed(load.tokens_per_s),
    ]


def _grid(n_columns: int) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(n_columns):
        grid.add_column(overflow="fold")
    return grid


def _table(*names: str, gap: int = 2) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _trees(detailed: Sequence[ProbeSummary], width: int, unit: str) -> Iterator[Text]:
    for probe in detailed:
        if not probe.completions:
            continue
        arm = f"{probe.arm}: " if len(detailed) > 1 else ""
        unique = f"{probe.n_unique} unique" if probe.n_unique > 1 else "all the same"
        yield Text(f"{arm}{phrases.count(probe.n_samples, 'completion')}, {unique}", style="bold")
        for line in tree_lines(probe, width - 2, MAX_COMPLETIONS, unit):
            yield Text(f"  {line}")


def _next_steps(findings: Findings, defaults: RunSpec, width: int) -> Iterator[RenderableType]:
    width, directory = width - 2, _directory(findings)
    for remedy in remedies(findings, defaults, directory, width):
        yield Text(f"{remedy.reason}:" if remedy.command else remedy.reason)
        if remedy.command:
            yield Padding(_command(remedy.command, width), (0, 0, 0, 2))
    failed = list(_failed_probes(findings))
    shown = failed[: MAX_VERDICTS if len(failed) <= MAX_VERDICTS else MAX_OF_MANY]
    for probe_id in shown if len(failed) > 1 else ():
        spec = alone(findings.run.spec, probe_id)
        # A conversation is no option's: the run's file holds it among the others.
        if prompts_file(spec, defaults) is not None:
            yield Text(f"{visible(probe_id)} fails")
            continue
        yield Text(f"{visible(probe_id)} fails; measure it alone:")
        yield Padding(_command(wrapped_command(spec, defaults, width), width), (0, 0, 0, 2))
    if len(failed) > len(shown):
        yield Text(f"{len(failed) - len(shown)} more fail: summary.csv has them")
    if directory:
        yield Text("Show this again, or open report.md and the CSV files there:")
        yield Padding(_command([f"ndcheck report {argument(directory)}"], width), (0, 0, 0, 2))


def _failed_probes(findings: Findings) -> dict[str, None]:
    """Ids of the probes that failed in any arm, each once: in the order of the run, of many the
    worst first."""
    probes = findings.summary.probes
    if len(probes) > MAX_VERDICTS:
        probes = tuple(worst_first(findings))
    verdicts = (findings.verdicts[probe.arm, probe.probe_id] for probe in probes)
    return dict.fromkeys(v.probe_id for v in verdicts if v.verdict.outcome == "FAIL")


def progress_line(
    done: int,
    total: int,
    unique: Mapping[str, int],
    first_divergence: int | None,
    eta_s: float | None,
    width: int = 80,
    unit: str = "token",
) -> str:
    """Trials, unique completions by arm and the earliest divergence so far, and the time left."""
    parts = [f"{done}/{total} trials"]
    if unique:
        counts = ", ".join(f"{arm} {count}" for arm, count in unique.items())
        parts.append(f"unique: {counts}")
    if first_divergence is not None:
        parts.append(f"diverged at {unit} {first_divergence + 1}")
    if eta_s is not None:
        parts.append(f"{minutes(eta_s)} left")
    line = "  ".join(parts)
    return line if cell_len(line) <= width else set_cell_size(line, width)


def minutes(elapsed_s: float) -> str:
    """As a clock shows it: 1:05 is 65 s."""
    whole, seconds = divmod(round(elapsed_s), 60)
    return f"{whole}:{seconds:02d}"
