"""Which device to run on, and how a model's layers run there."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ndcheck.errors import UsageError, first_line
from ndcheck.storage.reading import uncollected

if TYPE_CHECKING:
    import torch

NEVER_NEEDED = ("sklearn", "scipy", "torchvision", "torchaudio")
"""By a model that reads and writes text; transformers imports them where they are installed."""


@contextmanager
def starting_up(device: str | None) -> Iterator[None]:
    """Import torch and transformers, and what the block imports, while ``device`` starts.

    Together they make a million objects, of which none is garbage, and where they are installed
    transformers imports scikit-learn, for a kind of assisted generation, SciPy, for losses of
    object detection, torchvision and torchaudio, for images and sounds: all this takes seconds. It
    would miss them ever after, so only a command goes without them, never the process of a user's
    own code.
    """
    if "transformers" in sys.modules:
        yield
        return
    with uncollected():
        import torch  # noqa: F401 - here, so that the thread finds it whole

        def start() -> None:
            with suppress(Exception):  # It will fail again, where that can be said.
                _start(choose_device(device or "cpu"))

        starting = threading.Thread(target=start, daemon=True)
        starting.start()
        try:
            with ExitStack() as hidden:
                for package in NEVER_NEEDED if _is_command() else ():
                    hidden.enter_context(_hidden(package))
                from transformers import GenerationMixin, PreTrainedModel  # noqa: F401
            yield
        finally:
            starting.join()  # A process that ends while torch computes in a thread is aborted.


def _start(device: torch.device) -> None:
    """Have ready what the first pass on a device waits for, and nothing else in this process."""
    import torch

    values = torch.zeros(1, 1, 64, 64, device=device)
    if device.type == "cuda":
        from triton.runtime.cache import triton_key

        heads = values.bfloat16()
        torch.nn.functional.scaled_dot_product_attention(heads, heads @ heads, heads)
        triton_key()  # A digest of all of Triton's files.


def _is_command() -> bool:
    """Whether this process runs ndcheck's command line, and nothing after it."""
    main = sys.modules["__main__"]
    return "ndcheck.__main__" in sys.modules or getattr(main, "__package__", None) == "ndcheck"


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let a package that is not imported yet seem not to be installed."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules.setdefault(package, None)
    try:
        yield
    finally:
        if modules[package] is None:
            del modules[package]


@contextmanager
def own_settings() -> Iterator[None]:
    """Compute as a command does, whatever this process has set, and leave that as it was.

    Loading a model quietens transformers.
    """
    import torch
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            logging.set_verbosity(verbosity)
            if has_bars:
                logging.enable_progress_bar()


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises UsageError for a device that is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # `meta` is a device that holds nothing.
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} is not available: {first_line(error)}") from error
    return device


def own_device(device: torch.device) -> torch.device:
    """This rank's, by its number on the machine.

    Raises UsageError for the CPU beside a GPU, which transformers takes for its ranks, and on every
    rank of a machine that has fewer GPUs than ranks.
    """
    import torch

    if device.type == "cpu" and torch.cuda.is_available():
        raise UsageError(
            "--device cpu: with --tp transformers takes the GPUs; hide them: CUDA_VISIBLE_DEVICES="
        )
    if device.type != "cuda":
        return device
    own, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", own + 1))
    if n_here > n_gpus:
        raise UsageError(
            f"--tp: {n_here} ranks on this machine take a GPU each, and it has {n_gpus}; "
            "ranks on the CPU hide them: CUDA_VISIBLE_DEVICES="
        )
    return torch.device("cuda", own)


def choose_threads(begun_with: object, n_processes: int) -> int:
    """Threads for each of the processes that compute side by side: a share of the cores.

    Where OMP_NUM_THREADS or MKL_NUM_THREADS says how many, each has as many. ``begun_with`` are
    those that a run's record names: where this process has so many, what it goes on with.
    """
    import torch

    here = torch.get_num_threads()
    if type(begun_with) is int and 0 < begun_with <= here:
        return begun_with
    if n_processes == 1 or os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        return here
    return min(here, max(1, len(os.sched_getaffinity(0)) // n_processes))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from ``seed``; afterwards whoever else draws goes on as if nothing had been drawn."""
    import torch

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def computing_with(n_threads: int) -> Iterator[None]:
    """Compute with so many threads in this process, and afterwards with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make what would wait for the device an error before CUDA sees it, which ends a capture."""
    import torch

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is a prototype, says torch.
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def fused_layers(model: Any, device: torch.device) -> AbstractContextManager[object]:
    """Inside of which the invariant arm's decoder layers run fused, where the device has that."""
    if device.type == "cuda":
        from ndcheck_kernels.models.decoder import fused_layers

        return fused_layers(model)
    if device.type == "cpu":
        from ndcheck_kernels.models.direct_layers import direct_layers

        return direct_layers(model)
    return nullcontext()


def product_tables(arms: Sequence[str], device: torch.device) -> str | None:
    """Which tables the invariant arm's products follow on a GPU, and since when."""
    if "invariant" not in arms or device.type != "cuda":
        return None
    from ndcheck_kernels.cuda.products.proofs import summary

    return summary(device)
