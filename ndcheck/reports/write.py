"""The one module that writes reports: each file appears whole or not at all."""

from __future__ import annotations

import csv
import errno
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from ndcheck.findings import Findings
from ndcheck.records import RunSpec
from ndcheck.reports.exports.tables import CSV_FILES, write_csv
from ndcheck.reports.figures import gather
from ndcheck.reports.markdown import markdown_report
from ndcheck.reports.untrusted import csv_text
from ndcheck.reports.wording import phrases
from ndcheck.reports.wording.reproduction import PROMPTS_FILE, prompts_file
from ndcheck.storage.run_directory import (
    remove_leftovers,
    replacing,
    replacing_bytes,
    write_failure,
)

PLOTS_DIRECTORY = "plots"


def write_reports(
    findings: Findings, defaults: RunSpec, *, html: bool = False, plots: bool = False
) -> list[Path]:
    """Write report.md, the CSV files, and the prompts if report.md's command needs them in a file.

    ``html`` adds report.html, ``plots`` the directory plots/. All bytes depend on the findings and
    the defaults alone. The samples are streamed once, and once more for html and plots. Raises
    BackendError where the disk refuses.
    """
    directory = findings.directory
    if directory is None:
        raise ValueError("these findings have no directory")
    try:
        return _write(directory, findings, defaults, html=html, plots=plots)
    except OSError as error:
        raise write_failure(directory, error) from error


def _write(
    directory: Path, findings: Findings, defaults: RunSpec, *, html: bool, plots: bool
) -> list[Path]:
    remove_leftovers(directory)
    remove_leftovers(directory / PLOTS_DIRECTORY)
    for name in CSV_FILES:
        with replacing(directory / name) as file:
            write_csv(name, findings, file)
    texts = {"report.md": markdown_report(findings, defaults)}
    pictures: dict[str, bytes] = {}
    if html or plots:
        figures = gather(findings)
    if html:
        # Few ask for a page, and what fills its template takes longer to import than a small run.
        from ndcheck.reports.html.page import html_report

        texts["report.html"] = html_report(findings, figures, defaults)
    if plots:
        from ndcheck.reports.plots import plot_files

        pictures = plot_files(figures, phrases.unit(findings.run))
        (directory / PLOTS_DIRECTORY).mkdir(exist_ok=True)
        if (directory / PLOTS_DIRECTORY).is_symlink():
            raise OSError(errno.ELOOP, f"{PLOTS_DIRECTORY} is a link")
    prompts = prompts_file(findings.run.spec, defaults)
    if prompts is not None:
        texts[PROMPTS_FILE] = prompts
    for name, text in texts.items():
        with replacing(directory / name) as file:
            file.write(text)
    for name, picture in pictures.items():
        with replacing_bytes(directory / PLOTS_DIRECTORY / name) as binary:
            binary.write(picture)
    names = (*texts, *CSV_FILES, *(f"{PLOTS_DIRECTORY}/{name}" for name in pictures))
    return [directory / name for name in names]


class TableFile:
    """A CSV file that grows row by row, so that a run cut short leaves the rows it had.

    Without a path it takes rows and writes nothing. Raises BackendError where the disk refuses.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._writer: csv.DictWriter[str] | None = None

    def __enter__(self) -> TableFile:
        if self._path is not None:
            try:
                self._file = self._path.open("w", encoding="utf-8", newline="")
            except OSError as error:
                raise write_failure(self._path, error) from error
        return self

    def add(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Rows with the same columns, in the same order, as those before."""
        if self._path is None or self._file is None:
            return
        try:
            for row in rows:
                if self._writer is None:
                    self._writer = csv.DictWriter(self._file, list(row))
                    self._writer.writeheader()
                self._writer.writerow(
                    {k: csv_text(v) if isinstance(v, str) else v for k, v in row.items()}
                )
            self._file.flush()
        except OSError as error:
            raise write_failure(self._path, error) from error

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
