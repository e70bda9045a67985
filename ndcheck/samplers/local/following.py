"""The ranks, which are the processes that share a model, compute each trial together.

Rank 0 announces it to the others. The first rank that fails says why, and all end.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ndcheck import ranks
from ndcheck.errors import BackendError
from ndcheck.records import Fault, Load, Trial
from ndcheck.samplers.local.batch import layer_state
from ndcheck.samplers.local.memory import free_bytes

POLL_S = 0.005
GRACE_S = 10
"""How long rank 0 may take to report after another rank ended; torchrun kills it after 30."""
KEPT = 0.5
"""The share of the free memory in which batches are kept beside the one to come: where its prompt
then runs out of memory the run ends, and to capture a batch again takes seconds."""
LOST = "another rank ended, or torchrun was told to stop"


class Ranks:
    """This process among those that torchrun started.

    Joining makes the first rank that fails the one that says why, and lets none outlive torchrun's
    SIGTERM, whatever it waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_failed = False
        self.rank: int
        self.size: int
        try:
            store, self.rank, self.size = next(iter(rendezvous("env://")))
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("ranks", store),
                rank=self.rank,
                world_size=self.size,
                # Loading a large model takes some ranks longer than others.
                timeout=timedelta(hours=1),
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise BackendError(f"the ranks cannot meet: {error}") from error
        self._store = PrefixStore("ndcheck", store)
        self._n_announced = 0
        self._room: int | None = None
        ranks.set_speaker(self._is_first)
        atexit.register(_destroy_group)
        self._end_with_torchrun()

    def announce(self, trial: Trial | None) -> None:
        """On rank 0: the next trial, or None at the end."""
        if self.rank == 0:
            document = None if trial is None else dataclasses.asdict(trial)
            self._store.set(str(self._n_announced), json.dumps(document))
            self._n_announced += 1

    def next_trial(self) -> Trial | None:
        """On the other ranks: what rank 0 announced next."""
        key = str(self._n_announced)
        while not self._store.check([key]):  # Not `wait`, which would hold signals back.
            time.sleep(POLL_S)
        self._n_announced += 1
        return _read_trial(json.loads(self._store.get(key)))

    def agree(self, streams: Sequence[Sequence[int]]) -> None:
        """Raise BackendError where a rank generated other tokens than rank 0."""
        digest = hashlib.blake2b(json.dumps([*streams]).encode(), digest_size=7).digest()
        own = torch.tensor([int.from_bytes(digest)], device=self._device)
        others = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(others, own)
        odd = [rank for rank, other in enumerate(others) if not torch.equal(other, others[0])]
        if odd:
            raise BackendError(
                f"ranks {', '.join(map(str, odd))} generated other tokens than rank 0: the ranks' "
                "logits differ, so no completion is the model's"
            )

    def _measure_room(self) -> None:
        """How much memory every rank has for kept batches, before any."""
        own = torch.tensor([free_bytes(self._device)], device=self._device)
        others = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(others, own)
        self._room = int(KEPT * int(min(others)))

    def make_room(self, kept: dict[tuple[Any, Any, int, int], Any], n_columns: int) -> None:
        """Let go of ``kept`` batches, the oldest first, until one of so many columns fits in.

        ``kept`` are by arm, decoding, rows and width. No rank halves a batch that does not fit, and
        all let go of the same ones, since they go by the same numbers.
        """
        if self._room is None:
            self._measure_room()
        assert self._room is not None
        for key in list(kept):
            sizes = [rows * width for _, _, rows, width in kept]
            layers = map(layer_state, kept[key].batch.cache.layers)
            n_bytes = sum(part.nbytes for layer in layers for part in layer.tensors())
            if n_bytes / (key[2] * key[3]) * (sum(sizes) + n_columns) <= self._room:
                return
            del kept[key]
            gc.collect()  # A graph keeps its memory as long as it is there.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def failure(self, error: BaseException) -> BackendError:
        """What to raise for an error after which this rank is out of step with the others."""
        self._has_failed = True
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if re.search(r"gloo|nccl|peer|Connection", line, re.IGNORECASE):
            line = LOST  # What a collective says of a rank that is gone helps nobody.
        return BackendError(f"rank {self.rank} of {self.size}: {line}")

    def leave(self) -> None:
        """End the others' wait and the group."""
        with suppress(RuntimeError):  # The store went with torchrun.
            self.announce(None)
        _destroy_group()

    def _is_first(self) -> bool:
        try:
            return int(self._store.add("failures", 1)) == 1
        except RuntimeError:  # The store went with torchrun.
            return self.rank == 0

    def _end_with_torchrun(self) -> None:
        """torchrun ends the ranks by SIGTERM, which may find this one waiting for the dead."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def end(*_: Any) -> None:
            if self._has_failed:  # Its report is under way.
                return
            self._has_failed = True
            raise BackendError(f"rank {self.rank} of {self.size}: {LOST}")

        def watch() -> None:
            while os.read(reader, 1)[0] != signal.SIGTERM:
                pass
            if self.rank == 0:
                time.sleep(GRACE_S)
                if self._is_first():
                    os.write(2, f"ndcheck: {LOST}; finished trials are kept\n".encode())
            os._exit(BackendError.exit_code)

        signal.signal(signal.SIGTERM, end)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=watch, daemon=True).start()


def _destroy_group() -> None:
    """gloo's threads abort a process that ends with them, so nothing may hold the group either."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _read_trial(fields: dict[str, Any] | None) -> Trial | None:
    if fields is None:
        return None
    load: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.pop("load").items()
    }
    fault = fields.pop("fault")
    return Trial(**fields, load=Load(**load), fault=None if fault is None else Fault(**fault))
