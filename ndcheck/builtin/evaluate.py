"""Measures a trained model and writes its card: `python -m ndcheck.builtin.evaluate`."""

import json
from pathlib import Path

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.builtin.card import render_card
from ndcheck.builtin.corpus import Document, corpus_sha256, read_corpus
from ndcheck.builtin.measurement import measure
from ndcheck.builtin.options import OneLineParser
from ndcheck.errors import UsageError


def main(arguments: list[str] | None = None) -> None:
    """Parses the options and rewrites the card."""
    parser = OneLineParser(
        "ndcheck.builtin.evaluate", "Measures a trained model on the CPU and rewrites its card."
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL_DIRECTORY, help="the model directory to measure"
    )
    options = parser.parse_args(arguments)
    try:
        write_card(options.model, read_corpus(options.stdlib))
    except UsageError as error:
        parser.error(str(error))


def write_card(directory: Path, documents: list[Document]) -> None:
    """Measures the model of `directory` and writes its README.md."""
    record = directory / "training.json"
    if not record.is_file():
        raise UsageError(f"{directory} holds no model that ndcheck.builtin.train wrote")
    training = json.loads(record.read_text(encoding="utf-8"))
    if training["corpus_sha256"] != corpus_sha256(documents):
        raise UsageError("this standard library is not the one the model was trained on")
    card = render_card(measure(directory, documents), training)
    (directory / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
