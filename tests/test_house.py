"""Modules and folders stay short enough to be looked over."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
MAX_SOURCES = 15


def crowded(directory):
    """The modules with too many lines, and the folders with too many modules."""
    modules = [p for p in directory.rglob("*.py") if not ignored(p.relative_to(directory))]
    assert modules
    long = [p for p in modules if len(p.read_text().splitlines()) > MAX_LINES]
    folders = Counter(p.parent for p in modules)
    return long, [folder for folder, n in folders.items() if n > MAX_SOURCES]


def ignored(path):
    return any(part.startswith(".") or part in ("build", "dist", "venv") for part in path.parts)


@pytest.mark.parametrize("directory", ["ndcheck", "kernels", "tests"])
def test_no_module_is_long_and_no_folder_is_full(directory):
    assert crowded(ROOT / directory) == ([], [])


def test_one_line_and_one_module_too_many_are_seen(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    for i in range(MAX_SOURCES):
        (full / f"m{i}.py").write_text("x = 1\n" * MAX_LINES)
    assert crowded(tmp_path) == ([], [])
    (full / "m0.py").write_text("x = 1\n" * (MAX_LINES + 1))
    (full / "__init__.py").touch()
    assert crowded(tmp_path) == ([full / "m0.py"], [full])


def test_the_longest_files_of_tests_are_there(request):
    (conftest,) = (
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", "") == str(ROOT / "tests" / "conftest.py")
    )
    for name in conftest.LONGEST:
        assert len(list((ROOT / "tests").rglob(name.removeprefix("tests/")))) == 1, name
