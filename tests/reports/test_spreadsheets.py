"""The CSV exports open in LibreOffice as they are: every cell, none of them an error."""

from __future__ import annotations

import csv
import shutil
import subprocess

import pytest

import ndcheck

OFFICE = shutil.which("soffice")
COMMA, QUOTE, UTF_8 = "44", "34", "76"
FORMAT = f"{COMMA},{QUOTE},{UTF_8},1"


def read(file):
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.reader(lines))


@pytest.mark.skipif(OFFICE is None, reason="LibreOffice is not installed")
def test_every_cell_arrives(tmp_path):
    run = ndcheck.measure("scripted:hostile", max_tokens=20, out=tmp_path / "run")
    files = sorted(run.path.glob("*.csv"))
    done = subprocess.run(
        [
            OFFICE,
            "--headless",
            f"-env:UserInstallation={(tmp_path / 'profile').as_uri()}",
            f"--infilter=CSV:{FORMAT}",
            "--convert-to",
            f"csv:Text - txt - csv (StarCalc):{FORMAT}",
            "--outdir",
            tmp_path / "office",
            *files,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    notes = [line for line in done.stderr.splitlines() if "javaldx" not in line]
    assert notes == []
    for file in files:
        rows, ours = read(tmp_path / "office" / file.name), read(file)
        assert rows[0] == ours[0]
        assert [len(row) for row in rows] == [len(row) for row in ours]
        assert not any(cell.startswith(("#", "Err:")) for row in rows for cell in row)
        if "text" in ours[0]:
            at = ours[0].index("text")
            assert {row[at].removeprefix("'") for row in rows} == {
                row[at].removeprefix("'") for row in ours
            }
