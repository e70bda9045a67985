"""The plugin in a project of its own: its fixtures work, and loading it costs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

TESTS = """
import sys

def test_nothing_heavy_is_imported_yet():
    assert not {"torch", "transformers", "pandas", "numpy", "ndcheck.api"} & set(sys.modules)
    assert "ndcheck.pytest_plugin" in sys.modules

def test_good(assert_deterministic):
    assert_deterministic("scripted:clean", loads=[1, 2], samples=40, max_tokens=4)

def test_bad(assert_deterministic):
    assert_deterministic("scripted:batch-dependent", loads=[1, 2], samples=20, max_tokens=8)

def test_op(assert_batch_invariant):
    import torch
    assert_batch_invariant(lambda x: x * len(x), torch.randn(3, 4))
"""


def test_the_plugin_in_a_project(tmp_path):
    (tmp_path / "test_project.py").write_text(TESTS)
    # Coverage's own plugin would import what this test says is not imported.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:cov"]
    if not any(point.name == "ndcheck" for point in entry_points(group="pytest11")):
        raise AssertionError("the installed ndcheck has no pytest plugin: install it again")
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "AssertionError: ndcheck run --model scripted:batch-dependent" in done.stdout
    assert "row 0 in slot 0 of a batch of 2 differs from the row alone" in done.stdout
