"""The embedded model: `--model builtin` works without a hub, a download or a licence click."""

from pathlib import Path

MODEL_DIRECTORY: Path = Path(__file__).parent / "model"
"""An ordinary Hugging Face model directory: config, weights, tokenizer and model card."""
