"""The script of the README's picture, on recorded runs."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from bench.measurement import page

RUNS = Path(__file__).parents[2] / "runs"
README = Path(__file__).parents[3] / "README.md"


def picture(monkeypatch, run, out):
    monkeypatch.setattr(sys, "argv", ["page", str(RUNS / run), str(out)])
    return page.main()


def size_px(file):
    start = file.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", start[16:])


def test_a_run_that_forked_gives_a_picture(monkeypatch, tmp_path):
    if not any(map(shutil.which, page.BROWSERS)):
        pytest.skip(f"no Chromium on PATH ({', '.join(page.BROWSERS)})")
    assert picture(monkeypatch, "fork", tmp_path / "page.png") == 0
    width, height = size_px(tmp_path / "page.png")
    # The cards and two short trees, not the whole page, which is many times as high.
    assert 0.2 * width < height < width


def test_a_run_without_a_fork_gives_none(monkeypatch, tmp_path, capsys):
    assert picture(monkeypatch, "clean", tmp_path / "page.png") == 1
    assert "nothing forked" in capsys.readouterr().err
    assert not (tmp_path / "page.png").exists()


def test_the_readme_shows_it_under_its_first_paragraph():
    text = README.read_text(encoding="utf-8")
    _, first, second, *_ = text.split("\n\n")
    assert first.startswith("The same prompt")
    assert "](results/page/page.png)" in second
    assert size_px(README.parent / "results" / "page" / "page.png") > (800, 200)
