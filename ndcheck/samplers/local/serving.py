"""Check once per model that transformers' continuous batching computes what the model does.

A request that is served alone has to get the logits of the model's forward pass over it all, as
`faithful` holds exact batches to those of `generate()`. What comes of more requests is the run's.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch

from ndcheck.errors import TrialError, UsageError, first_line
from ndcheck.plan.queue import Request
from ndcheck.records import Decoding, Load, Trial
from ndcheck.samplers.local.checkpoint.quantised import dequantised_layers
from ndcheck.samplers.local.checkpoint.thresholds import Rows, telling_rows
from ndcheck.samplers.local.continuous import Kernels, serve_load
from ndcheck.samplers.local.faithful import N_REPEATS, SHORT, Examination
from ndcheck.samplers.local.memory import in_float32, is_out_of_memory
from ndcheck.samplers.local.prompts import plain_ids
from ndcheck.samplers.local.ties import TiesByIndex


@torch.inference_mode()
def require_served(model: Any, device: torch.device, rows: Rows, kernels: Kernels) -> None:
    """Raise UsageError where a request served by ``kernels`` gets other logits, or an error.

    Of a short prompt, unless ``rows`` pass a length from which the model may compute otherwise.
    """
    rows = telling_rows(model.config.get_text_config(decoder=True), rows, SHORT)
    name = f"--batching continuous: {type(model).__name__}"
    # Some compute, all or in part, in one dtype.
    for widened in (in_float32(model, device), nullcontext(model.dtype)):
        with warnings.catch_warnings(), dequantised_layers(model), widened as dtype:
            warnings.simplefilter("ignore")
            seen = Examination(dtype)
            try:
                difference = _lasting_difference(model, rows, kernels, seen)
            except UsageError:
                raise
            except Exception as error:
                if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
                    raise
                kind = "" if isinstance(error, TrialError) else f"{type(error).__name__}: "
                refusal = UsageError(f"{name} cannot be served: {kind}{first_line(error)}")
                refusal.__cause__ = error
                continue
        if difference > seen.tolerance:
            raise UsageError(
                f"{name} computes something else there: its logits differ by {difference:.2g} of "
                "their spread from those of its own forward pass, which is no rounding"
            )
        return
    raise refusal


def _lasting_difference(model: Any, rows: Rows, kernels: Kernels, seen: Examination) -> float:
    """The least of some, where the first is too much: chance may make one, and a top-k's ties."""
    least = _difference(model, rows, kernels, seen)
    for _ in range(N_REPEATS):
        if least > seen.tolerance:
            least = min(least, _difference(model, rows, kernels, seen))
    if least > seen.tolerance:
        with TiesByIndex():
            least = min(least, _difference(model, rows, kernels, seen))
    return least


def _difference(model: Any, rows: Rows, kernels: Kernels, seen: Examination) -> float:
    """Of the log-probabilities of the tokens that were chosen, in units of the logits' spread.

    The largest, or in 16 bits the middle one: an expert may be chosen by a hair.
    """
    prompt, n_tokens = plain_ids(model, rows.prompt), rows.n_new + 1
    (served,), _ = serve_load(
        model,
        [(Request(0, None, None, n_tokens), prompt)],
        kernels,
        Trial(0, "stock", "", "slot", Load(1), 0),
        Decoding(n_tokens),
        stop_ids=set(),
        size=1,
        prompt=prompt,
    )
    token_ids, _, logprobs, _ = zip(*served.readings, strict=True)
    ids = torch.tensor([[*prompt, *token_ids[:-1]]], device=model.device)
    kept = {} if rows == SHORT else {"logits_to_keep": n_tokens}  # All may be too much memory.
    logits = model(input_ids=ids, use_cache=False, **kept).logits[0, -n_tokens:]
    # Some give logits of fewer bits than they compute in.
    seen.dtype = min(seen.dtype, logits.dtype, key=lambda dtype: dtype.itemsize)
    right = logits.double().cpu()
    if not right.isfinite().all():
        return 0.0
    spread = torch.maximum(right.std(dim=-1), right.abs().amax(dim=-1) / 100).clamp(min=1e-30)
    of_chosen = right.log_softmax(-1)[range(n_tokens), token_ids]
    by_token = (torch.tensor(logprobs).double() - of_chosen).abs() / spread
    by_token = by_token.nan_to_num(nan=torch.inf)
    return float(by_token.max() if seen.dtype.itemsize >= 4 else by_token.median())
