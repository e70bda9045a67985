"""What a first import of transformers leaves out, and a measurement leaves as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import ndcheck
from ndcheck.builtin import MODEL_DIRECTORY

PLAIN = "from transformers import GenerationMixin, PreTrainedModel"
OURS = """
from ndcheck.samplers.local.device import starting_up
with starting_up("cpu"):
    from transformers import GenerationMixin, PreTrainedModel
"""
SHOW = """
import gc, sys
print(*(name in sys.modules for name in NAMES), gc.isenabled())
print(GenerationMixin.has_curve, PreTrainedModel.has_losses, *PreTrainedModel.has_media)
import scipy, sklearn, torchaudio, torchvision
print(sklearn.roc_curve, scipy.optimize, torchaudio.load, torchvision.io)
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
    media = ("torchvision", "torchaudio")
    has_media = [importlib.util.find_spec(name) is not None for name in media]
    if any(has_media):
        import torchaudio, torchvision
"""
PACKAGES = {
    "sklearn": "roc_curve = 'curve'", "scipy": "optimize = 'optimum'",
    "torchvision": "io = 'images'", "torchaudio": "load = 'sounds'",
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "is_imported"),
    [(PLAIN, True), (OURS, True), (f"import ndcheck.__main__\n{OURS}", False)],
)
def test_what_models_do_not_need_is_left_out_and_can_be_imported_later(
    script, is_imported, tmp_path
):
    (tmp_path / "transformers.py").write_text(TRANSFORMERS)
    for name, source in PACKAGES.items():
        (tmp_path / f"{name}.py").write_text(source)
    path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    run = subprocess.run(
        [sys.executable, "-c", f"{script}\nNAMES = {list(PACKAGES)}\n{SHOW}"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    seen = " ".join([str(is_imported)] * len(PACKAGES))
    assert run.stdout.splitlines() == [f"{seen} True", seen, "curve optimum sounds images"]


MEASURE = """
import logging, random, sys
import torch
torch.manual_seed(3)
expected = torch.rand(3).tolist()
torch.manual_seed(3)
import ndcheck
ndcheck.measure(sys.argv[1], random_weights=0, samples=12, max_tokens=2, loads=[1, 2], dtype="fp32")
from transformers.utils import logging as spoken
print(torch.rand(3).tolist() == expected, spoken.get_verbosity() == logging.WARNING)
print(spoken.is_progress_bar_enabled())
"""


def test_a_measurement_leaves_the_draws_and_the_warnings_of_its_process(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(MODEL_DIRECTORY)], cwd=tmp_path,
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["True"] * 3


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def settings():
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    return dtype, device, torch.is_autocast_enabled("cpu")


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": default_dtype,
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_measurement_computes_as_a_command_whatever_its_process_has_set(tmp_path, name):
    def digests(out):
        options = {"dtype": "fp32", "samples": 12, "loads": [1, 2], "axes": ["run-to-run", "slot"]}
        run = ndcheck.measure(out=tmp_path / out, max_tokens=3, kernels="stock", **options)
        lines = (run.path / "samples.jsonl").read_text().splitlines()
        return [json.loads(line).get("row_digests") for line in lines]

    expected = digests("plain")
    with SETTINGS[name]():
        before = settings()
        assert digests("set") == expected
        assert settings() == before
    assert any(expected)
