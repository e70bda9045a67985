"""`ndcheck kernels manifest` and `compare` from options to exit code."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from ndcheck.cli.console import EXIT_CODES, note
from ndcheck.cli.kernels_session import read_selection
from ndcheck.errors import UsageError
from ndcheck.reports.stack import manifests as report
from ndcheck.stack.manifests import compare_manifests, judge_manifests, read_manifest
from ndcheck.stack.taking import take_manifest
from ndcheck.storage.outputs import check_outputs
from ndcheck.storage.run_directory import replacing, write_failure


def take(
    out: Path,
    device: str,
    dtype: str,
    op: str,
    rows: str | None,
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure this stack and write what was seen. Returns the exit code."""
    wanted = read_selection(device, dtype, op, rows)
    if wanted.device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: there are kernels for cpu and cuda")
    check_outputs(out)
    manifest = take_manifest(
        wanted.device,
        wanted.dtypes,
        wanted.row_counts,
        wanted.ops,
        lambda line: note(line, quiet=quiet),
    )
    document = report.manifest_document(manifest)
    try:
        with replacing(out) as file:
            json.dump(document, file, indent=1)
            file.write("\n")
    except OSError as error:
        raise write_failure(out, error) from error
    if as_json:
        typer.echo(json.dumps(document))
    else:
        report.print_manifest(Console(highlight=False), manifest, str(out))
    return 0


def compare(a: Path, b: Path, *, as_json: bool) -> int:
    """Show what changed. Returns the exit code."""
    found = compare_manifests(read_manifest(a), read_manifest(b))
    verdict = judge_manifests(found)
    code = EXIT_CODES[verdict.outcome]
    names = (str(a), str(b))
    if as_json:
        typer.echo(json.dumps(report.comparison_document(names, found, verdict, code), indent=2))
    else:
        report.print_manifest_comparison(Console(highlight=False), names, found, verdict)
    return code
