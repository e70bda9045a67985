"""The model that proposes tokens: one of its own, or the first layers of the one that verifies.

What it proposes decides how many tokens a pass gives, and never which. It computes in the kernels
of the arm that it drafts for.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ndcheck.errors import UsageError
from ndcheck.records import RunSpec
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.checkpoint.sources import Source, find_source
from ndcheck.samplers.local.decoding.selection import lowest_argmax
from ndcheck.samplers.local.loading import load_config, load_model, load_tokenizer
from ndcheck.samplers.options import n_draft_layers

log = logging.getLogger(__name__)


class DraftSource:
    """Where a draft is, and its config; checked against the model ``target`` before it is loaded.

    Raises UsageError where it cannot be found, or has another vocabulary.
    """

    def __init__(self, spec: RunSpec, target: Source, config: Any) -> None:
        self.option = f"--draft {spec.draft}"
        self._n_layers = n_draft_layers(spec.draft)
        self._config = config
        if self._n_layers is not None:
            n_all = config.get_text_config(decoder=True).num_hidden_layers
            if self._n_layers > n_all:
                raise UsageError(f"{self.option}: {spec.model} has {n_all} layers")
            return
        self._spec = replace(spec, model=str(spec.draft), adapter=None)
        try:
            self._source = find_source(self._spec)
            self._config = load_config(self._source.model, self._spec)
            own = load_tokenizer(self._source.tokenizer, self._spec).get_vocab()
        except UsageError as error:
            raise UsageError(str(error).replace("--model", "--draft")) from error
        sizes = [c.get_text_config(decoder=True).vocab_size for c in (self._config, config)]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"{self.option}: its vocabulary has {sizes[0]} tokens, that of {spec.model} "
                f"{sizes[1]}: give a draft with the same one"
            )
        if own != load_tokenizer(target.tokenizer, spec).get_vocab():
            raise UsageError(
                f"{self.option}: its tokenizer names other tokens than that of {spec.model}: "
                "give a draft with the same vocabulary"
            )

    @property
    def context(self) -> int | None:
        """The longest prompt and completion that it takes, in tokens; None: not known."""
        return getattr(self._config.get_text_config(decoder=True), "max_position_embeddings", None)

    def load(self, model: Any, device: torch.device) -> Any:
        """The draft beside the loaded ``model``, some of whose modules it may share.

        Raises UsageError where either keeps what rejected tokens cannot be taken out of.
        """
        if self._n_layers is not None:
            draft = first_layers(model, self._n_layers, self.option)
        else:
            try:
                draft = load_model(
                    *(self._source.model, self._config, self._spec, device, self._source.adapter)
                )
            except UsageError as error:
                raise UsageError(str(error).replace("--model", "--draft")) from error
        if device.type == "cuda":
            log.warning(
                "%s: its passes, and those that verify, are launched by Python and not captured "
                "as CUDA graphs: their time says nothing of a server's",
                self.option,
            )
        for each in (model, draft):
            if not ExactBatch(each, device, 1, 1).can_be_rewound:
                raise UsageError(
                    f"{self.option}: {type(each).__name__} keeps more than keys and values of "
                    "every token, so rejected ones cannot be taken back"
                )
        return draft


def first_layers(model: Any, n_layers: int, option: str) -> Any:
    """A model of the same modules, but for the layers after the first ``n_layers``.

    Early exit, as in LayerSkip (Elhoushi et al. 2024). Raises UsageError where the layers are not
    found.
    """
    base = model.base_model
    all_layers = {
        name: child
        for name, child in base.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == model.config.num_hidden_layers
    }
    if len(all_layers) != 1:
        raise UsageError(
            f"{option}: the layers of {type(model).__name__} are not in one list of its base: "
            "give a model's directory"
        )
    ((name, layers),) = all_layers.items()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]
    inner, draft = copy.copy(base), copy.copy(model)
    inner._modules = {**base._modules, name: layers[:n_layers]}
    draft._modules = {**model._modules, model.base_model_prefix: inner}
    inner.config = draft.config = config
    return draft


class Drafter:
    """A draft model with the rows of a batch that verifies, whose next tokens it proposes."""

    def __init__(self, draft: Any, verifying: ExactBatch) -> None:
        self.batch = ExactBatch(draft, verifying.device, verifying.n_rows, verifying.width)
        self.batch.reset(verifying.rows)
        self._pass(lambda: self.batch.compute_prompt("whole"), verifying.n_filled)

    def propose(self, token_ids: Tensor, n_tokens: int) -> list[Tensor]:
        """The next tokens [B] of every row, ``token_ids`` first, and ``n_tokens`` after it.

        All of them are in the batch then, as they are in one that verifies them.
        """
        found = [token_ids.clone()]
        for _ in range(n_tokens):
            found.append(lowest_argmax(self._take(found[-1])))
        self._take(found[-1])
        return found

    def _take(self, token_ids: Tensor) -> Tensor:
        return self._pass(
            lambda: self.batch.forward(token_ids[:, None], 1)[:, -1], self.batch.n_filled + 1
        )

    def _pass(self, compute: Callable[[], Tensor], n_columns: int) -> Tensor:
        logits = compute()
        # Fused layers count the columns in the last layer of all, which a draft may lack.
        self.batch.rewind(n_columns)
        return logits
