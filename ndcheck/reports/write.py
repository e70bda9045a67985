"""The one module that writes reports: each file appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ndcheck.analysis.summary import Summary
from ndcheck.records import Run, RunSpec, Sample
from ndcheck.reports.markdown import markdown_report
from ndcheck.reports.reproduction import PROMPTS_FILE, prompts_file
from ndcheck.reports.tables import completion_tables, loads_table, sample_tables, summary_table
from ndcheck.store import replacing
from ndcheck.verdict import Judgement

if TYPE_CHECKING:
    import pandas as pd


def write_reports(
    directory: Path,
    run: Run,
    samples: Iterable[Sample],
    summary: Summary,
    judgement: Judgement,
    defaults: RunSpec,
    advice: Sequence[str] = (),
) -> list[Path]:
    """Write report.md, the CSV files, and the prompts if report.md's command needs them in a file.

    All bytes depend on the arguments alone.
    ``samples`` are all of the run's, controls too, in the order that ``summary.samples`` has; they
    are read once, as a stream. Raises OSError where the disk refuses.
    """
    tables: dict[str, Iterable[pd.DataFrame]] = {
        "samples.csv": sample_tables(run, samples, summary),
        "completions.csv": completion_tables(summary),
        "loads.csv": [loads_table(summary)],
        "summary.csv": [summary_table(summary, judgement)],
    }
    for name, parts in tables.items():
        with replacing(directory / name) as file:
            for index, part in enumerate(parts):
                # RFC 4180 ends lines with CR LF.
                part.to_csv(file, index=False, header=index == 0, lineterminator="\r\n")
    texts = {"report.md": markdown_report(run, summary, judgement, defaults, advice)}
    prompts = prompts_file(run.spec, defaults)
    if prompts is not None:
        texts[PROMPTS_FILE] = prompts
    for name, text in texts.items():
        with replacing(directory / name) as file:
            file.write(text)
    return [directory / name for name in (*texts, *tables)]
