"""Trains the embedded model: `python -m ndcheck.builtin.train`."""

import time
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from ndcheck.builtin.corpus import Document, read_corpus
from ndcheck.builtin.evaluate import write_card
from ndcheck.builtin.measurement import held_out_loss
from ndcheck.builtin.options import OneLineParser
from ndcheck.builtin.recipe import Recipe
from ndcheck.builtin.trainer import Trainer
from ndcheck.builtin.vocabulary import encode_stream
from ndcheck.errors import UsageError

console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> None:
    """Parses the options, trains, and writes the card of what came out."""
    parser = OneLineParser(
        "ndcheck.builtin.train",
        "Trains the embedded model on the standard library. Killed and run again with the same "
        "options, it continues from its last checkpoint.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("builtin-training"),
        help="folder for the checkpoint, and for the model directory `model` inside it",
    )
    parser.add_argument(
        "--device", default=detect_device(), choices=("cuda", "cpu"), help="where to train"
    )
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, help="time between checkpoints"
    )
    parser.add_argument(
        "--start", type=Path, help="begin with this model directory instead of random weights"
    )
    for choice in fields(Recipe):
        parser.add_argument(
            f"--{choice.name.replace('_', '-')}",
            type=type(choice.default),
            default=choice.default,
            help=choice.metadata["help"],
        )
    options = vars(parser.parse_args(arguments))
    try:
        recipe = Recipe(**{choice.name: options[choice.name] for choice in fields(Recipe)})
        documents = read_corpus(options["stdlib"])
        train(
            recipe,
            documents,
            options["output"],
            options["device"],
            options["checkpoint_seconds"],
            options["start"],
        )
    except UsageError as error:
        parser.error(str(error))
    console.print("measuring on the CPU, about a minute")
    write_card(options["output"] / "model", documents)


def detect_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def train(
    recipe: Recipe,
    documents: list[Document],
    output: Path,
    device: str,
    checkpoint_seconds: float,
    start: Path | None = None,
) -> None:
    """Runs what is left of the recipe; every checkpoint leaves a model that loads."""
    transformers.logging.disable_progress_bar()
    trainer = Trainer(recipe, documents, device)
    if start is not None:
        trainer.start_from(start)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.load_checkpoint(checkpoint)
    held_out_N = encode_stream(
        trainer.tokenizer, [document.text for document in documents if document.held_out]
    )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        saved_s = time.monotonic()
        task = progress.add_task("training", total=trainer.total, completed=trainer.done)
        while trainer.done < trainer.total:
            loss = trainer.advance()
            progress.update(task, completed=trainer.done, description=f"loss {loss:.3f}")
            is_due = time.monotonic() - saved_s >= checkpoint_seconds
            if is_due or trainer.done in (recipe.steps, trainer.total):
                saved_s = time.monotonic()
                trainer.save_checkpoint(checkpoint)
                trainer.export(output / "model")
                held_out = held_out_loss(trainer.model.eval(), held_out_N, recipe.context_tokens)
                progress.print(
                    f"{trainer.done}/{trainer.total}: loss {loss:.3f}, held out {held_out:.3f}"
                )


if __name__ == "__main__":
    main()
