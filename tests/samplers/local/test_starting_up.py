"""What a first import of transformers leaves out, and leaves as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PLAIN = "from transformers import GenerationMixin, PreTrainedModel"
OURS = """
from ndcheck.samplers.local.device import starting_up
with starting_up("cpu"):
    from transformers import GenerationMixin, PreTrainedModel
"""
SHOW = """
import gc, sys
print("sklearn" in sys.modules, "scipy" in sys.modules, gc.isenabled())
print(GenerationMixin.has_curve, PreTrainedModel.has_losses)
import scipy, sklearn
print(sklearn.roc_curve, scipy.optimize)
"""
# As `transformers.generation` does it up to 5.17 at least, and `transformers.modeling_utils`.
TRANSFORMERS = """
import importlib.util
class GenerationMixin:
    has_curve = importlib.util.find_spec("sklearn") is not None
    if has_curve:
        from sklearn import roc_curve
class PreTrainedModel:
    has_losses = importlib.util.find_spec("scipy") is not None
    if has_losses:
        from scipy import optimize
"""


@pytest.mark.parametrize(("script", "is_imported"), [(PLAIN, True), (OURS, False)])
def test_what_models_do_not_need_is_left_out_and_can_be_imported_later(
    script, is_imported, tmp_path
):
    (tmp_path / "transformers.py").write_text(TRANSFORMERS)
    (tmp_path / "sklearn.py").write_text("roc_curve = 'a curve'")
    (tmp_path / "scipy.py").write_text("optimize = 'an optimum'")
    path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    run = subprocess.run(
        [sys.executable, "-c", f"{script}\n{SHOW}"], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    seen = f"{is_imported} {is_imported}"
    assert run.stdout.splitlines() == [f"{seen} True", seen, "a curve an optimum"]
