"""What a first import of transformers leaves out, and leaves as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PLAIN = "from transformers import GenerationMixin"
OURS = """
from ndcheck.samplers.local.device import starting_up
with starting_up("cpu"):
    from transformers import GenerationMixin
"""
SHOW = """
import gc, sys
print("sklearn" in sys.modules, GenerationMixin.has_curve, gc.isenabled())
import sklearn
print(sklearn.roc_curve)
"""
# As `transformers.generation` does it up to 5.17 at least.
TRANSFORMERS = """
import importlib.util
class GenerationMixin:
    has_curve = importlib.util.find_spec("sklearn") is not None
    if has_curve:
        from sklearn import roc_curve
"""


@pytest.mark.parametrize(("script", "is_imported"), [(PLAIN, True), (OURS, False)])
def test_scikit_learn_is_left_out_and_can_be_imported_afterwards(script, is_imported, tmp_path):
    (tmp_path / "transformers.py").write_text(TRANSFORMERS)
    (tmp_path / "sklearn.py").write_text("roc_curve = 'a curve'")
    path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    run = subprocess.run(
        [sys.executable, "-c", f"{script}\n{SHOW}"], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert run.stdout.splitlines() == [f"{is_imported} {is_imported} True", "a curve"]
