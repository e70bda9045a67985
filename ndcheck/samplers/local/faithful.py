"""Check once per model, before it is measured, that ndcheck's batches compute what the model does.

The right logits are those of `generate()` on a prompt alone. The same tokens also run in exact
batches: alone and padded, with the prompt whole, in chunks or on a prefix, then token by token.
Where stock kernels differ from the right logits by more than rounding, the model's own code makes
the difference (positions that follow padding, say). That is not nondeterminism, so the property is
left out or refused, with the reason. An arm that computes a model in code of its own may mend it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ndcheck.errors import TrialError, UsageError, first_line
from ndcheck.records import CacheState, Load
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.checkpoint.generation import plain_generation
from ndcheck.samplers.local.checkpoint.quantised import dequantised_layers
from ndcheck.samplers.local.checkpoint.rope import rope_reason, rope_switch
from ndcheck.samplers.local.checkpoint.thresholds import Rows, telling_rows
from ndcheck.samplers.local.memory import in_float32, is_out_of_memory
from ndcheck.samplers.local.prompts import plain_ids
from ndcheck.samplers.local.ties import TiesByIndex

N_STEPS, SHORT = 3, Rows(prompt=7, filler=13, n_new=3)
TOLERANCE, TOLERANCE_16_BIT = 0.001, 0.5
"""Most that logits may differ by, in units of their spread over the vocabulary.

Over the causal language models of transformers, made small: rounding gives up to 0.0001 in fp32
and up to 0.3 in bf16; wrong masks, positions and states give 0.002 to 5.
"""
N_REPEATS = 3

Path = tuple[bool, CacheState | Literal["scored"]]
"""Whether the row is padded, and how its prompt enters the cache: scored, with the completion."""

ALONE: Path = (False, "whole")
IN_PASSES: Path = (False, "chunked")
"""Several tokens over what the cache holds: a chunk of a prompt, and of a completion too."""
SCORED: Path = (False, "scored")
PATHS: tuple[Path, ...] = (
    *(ALONE, IN_PASSES, (False, "prefix"), SCORED),
    *((True, "whole"), (True, "chunked"), (True, "prefix")),
)


@dataclass(slots=True)
class Examination:
    """What was seen of one model, in ``dtype`` and of rows as long as ``rows``.

    ``differences`` from the right logits are in units of their spread, by path; ``sensitivity`` is
    that of the logits after another first token, which shows what a wrong prompt would have done.
    ``reasons`` say why a path must not be measured; that of `ALONE` holds for all.
    """

    dtype: torch.dtype
    rows: Rows = SHORT
    sensitivity: float = 0.0
    differences: dict[Path, float] = field(default_factory=dict)
    reasons: dict[Path, str | None] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        return TOLERANCE if self.dtype.itemsize >= 4 else TOLERANCE_16_BIT

    def reason(self, path: Path) -> str | None:
        """Why the path must not be measured: it, or one that it builds on."""
        return next(filter(None, (self.reasons.get(base) for base in _bases(path))), None)

    def describe(self) -> str | None:
        """For a run's record; None where no exact batch was looked at."""
        if not self.differences:
            return None
        seen = ", ".join(
            f"{_name(path)} {difference:.1g}" for path, difference in self.differences.items()
        )
        dtype = str(self.dtype).removeprefix("torch.")
        blind = "" if self.sensitivity > self.tolerance else ", too little to show a fault"
        return (
            f"{seen} of the logits' spread in {dtype}; another token: {self.sensitivity:.1g}{blind}"
        )


_SEEN: weakref.WeakKeyDictionary[Any, Examination] = weakref.WeakKeyDictionary()


def require_faithful(
    model: Any, device: torch.device, lengths: Sequence[int], n_new: int, cache_state: CacheState
) -> None:
    """Raise UsageError where a batch of such rows would not compute what each row's own does.

    ``lengths`` are the rows' in tokens, ``n_new`` the tokens to come. What was not examined before
    is not while ops are dispatched otherwise: by other kernels, to a recorder, with planted faults.
    """
    config = model.config.get_text_config(decoder=True)
    reason = rope_reason(config, lengths, n_new, cache_state)
    if reason is None:
        path = (min(lengths) < max(lengths), cache_state)
        # `is_in_torch_dispatch_mode` stays True once two threads' modes overlapped.
        if _get_current_dispatch_mode() is None:
            examine(model, device, [path], rows=Rows(min(lengths), max(lengths), n_new))
        findings = _SEEN.get(model)
        reason = findings.reason(path) if findings is not None else None
    if reason is not None:
        raise UsageError(reason)


def examine(
    model: Any,
    device: torch.device,
    paths: Sequence[Path] = PATHS,
    arm: Callable[[], AbstractContextManager[object]] | None = None,
    rows: Rows = SHORT,
) -> Examination:
    """What is to be said of these paths through a model, and of whether it is a decoder.

    Of short rows, unless ``rows`` pass a length from which the model may compute otherwise; in fp32
    where the memory holds the weights once more, else in the model's own dtype, where only what is
    far off shows. A run's only ``arm`` is asked about the paths that stock code failed: its batches
    against the plain pass of stock code.
    """
    if arm is not None:
        return _mend(model, device, paths, arm, rows)
    findings = _SEEN.get(model)
    rows = telling_rows(model.config.get_text_config(decoder=True), rows, SHORT)
    if findings is not None and (rows := rows.joined(findings.rows)) != findings.rows:
        findings = None
    bases = dict.fromkeys(base for path in paths for base in _bases(path))
    wanted = [p for p in bases if findings is None or p not in findings.reasons]
    if findings is None or wanted:
        findings = _SEEN[model] = findings or Examination(model.dtype, rows)
        examination = _Examination(model, device, findings)
        with warnings.catch_warnings(), dequantised_layers(model):
            warnings.simplefilter("ignore")  # The run gives them again.
            reasons = findings.reasons.copy()
            with in_float32(model, device) as findings.dtype:
                was_computed = examination.look(wanted)
            if not was_computed:  # Some compute, all or in part, in one dtype.
                findings.dtype, findings.reasons = model.dtype, reasons
                examination.look(wanted)
        if "flex" in str(model.config._attn_implementation):
            # It compiles for a limited number of shapes, and the run needs them.
            torch.compiler.reset()
    return findings


def _mend(
    model: Any,
    device: torch.device,
    paths: Sequence[Path],
    arm: Callable[[], AbstractContextManager[object]],
    rows: Rows,
) -> Examination:
    """Take back the reasons against paths that are right inside ``arm``."""
    findings = examine(model, device, paths, rows=rows)
    bases = dict.fromkeys(base for path in paths for base in _bases(path))
    failed = [path for path in bases if findings.reasons[path] is not None]
    if failed and not findings.reasons[ALONE]:
        mended = Examination(model.dtype, findings.rows)
        with warnings.catch_warnings(), in_float32(model, device) as mended.dtype:
            warnings.simplefilter("ignore")
            # Decoding alone, too: with it a run compares them.
            _Examination(model, device, mended, arm).look([ALONE, *failed])
        for path in failed:
            if path in mended.differences and mended.reason(path) is None:
                findings.reasons[path] = None
                findings.differences[path] = mended.differences[path]
    return findings


class _Examination:
    def __init__(
        self,
        model: Any,
        device: torch.device,
        findings: Examination,
        arm: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        self._arm = arm
        self._model = model
        self._name = type(model).__name__
        self._config = model.config.get_text_config(decoder=True)
        self._device = device
        self._findings = findings
        n_filler = findings.rows.filler
        switch = rope_switch(self._config)
        if switch is not None:
            n_filler = max(2, min(n_filler, switch[1] - N_STEPS))
        n_prompt = min(findings.rows.prompt, n_filler - 1)
        ids = plain_ids(model, n_filler + n_prompt + 1)
        self._filler, self._prompt, self._other = ids[:n_filler], ids[n_filler:-1], ids[-1]

    @torch.inference_mode()
    def look(self, paths: Sequence[Path]) -> bool:
        """Fill in the findings; False where the model cannot be computed at all."""
        findings = self._findings
        try:
            generated = self._generate()
            forced = self._filler[:N_STEPS] if generated is None else generated[1]
            tokens = [*self._prompt, *forced]
            plain = self._plain(tokens)
            # Stock code that decodes otherwise than it prefills is right in its plain pass alone.
            right = plain if generated is None or self._arm else generated[0]
            other_end = self._plain([*tokens[:-1], self._other])
            at = len(self._prompt) - min(len(self._prompt), SHORT.prompt)  # A window may hide more.
            other_start = self._plain([*tokens[:at], self._other, *tokens[at + 1 :]])
        except UsageError as error:
            findings.reasons.update(dict.fromkeys(PATHS, str(error)))
            return False
        findings.sensitivity = _difference(other_start, plain, findings.dtype)
        if self._differs_always(
            (other_end[:-1], lambda: self._plain([*tokens[:-1], self._other])[:-1]),
            (plain[:-1], lambda: self._plain(tokens)[:-1]),
        ):
            findings.reasons.update(dict.fromkeys(PATHS, self._bidirectional()))
            return True

        def compute_right() -> Tensor:
            again = None if generated is None or self._arm else self._generate()
            return self._plain(tokens) if again is None else again[0]

        for path in paths:
            try:
                decoded = self._decode(path, forced)
                found = _difference(decoded, right, findings.dtype)
                is_off = self._differs_always(
                    (decoded, partial(self._decode, path, forced)), (right, compute_right)
                ) and not self._agrees_without_ties(path, tokens)
            except UsageError as error:
                findings.reasons[path] = str(error)
                continue
            findings.differences[path] = found
            findings.reasons[path] = self._unfaithful(path, found) if is_off else None
        return True

    def _differs_always(self, *sides: tuple[Tensor, Callable[[], Tensor]]) -> bool:
        """Do two computations give other logits, and each its own again? Else chance may do it.

        That is for a run to find, and no reason against one.
        """
        dtype, tolerance = self._findings.dtype, self._findings.tolerance
        (here, _), (there, _) = sides
        return _difference(here, there, dtype) > tolerance and all(
            _difference(again(), first, dtype) <= tolerance
            for first, again in sides
            for _ in range(N_REPEATS)
        )

    def _agrees_without_ties(self, path: Path, tokens: list[int]) -> bool:
        """Is it that a top-k takes one of several equal numbers by its place, as kernels do?

        Padding and a cache's columns move them. That is for a run to find, too.
        """
        try:
            with TiesByIndex():
                generated = None if self._arm else self._generate()
                right, forced = generated or (self._plain(tokens), tokens[-N_STEPS:])
                decoded = self._decode(path, forced)
        except UsageError:
            return False
        return _difference(decoded, right, self._findings.dtype) <= self._findings.tolerance

    def _generate(self) -> tuple[Tensor, list[int]] | None:
        """The right logits [1 + steps, V], and the tokens [steps] that were chosen by them.

        None for a model that has only its forward pass, whose logits are then the right ones.
        """
        ids = torch.tensor([self._prompt], device=self._device)
        try:
            with self._refusing("generate()"), plain_generation(self._model):
                done = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=N_STEPS + 1,
                    min_new_tokens=N_STEPS + 1,
                    do_sample=False,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
        except UsageError:
            return None
        chosen = done.sequences[0, -N_STEPS - 1 : -1].tolist()
        return torch.cat(done.logits).double(), chosen

    def _plain(self, tokens: list[int]) -> Tensor:
        """Logits [1 + steps, V] of one forward pass over it all, without a cache."""
        with self._refusing("its forward pass without a cache"):
            ids, n = torch.tensor([tokens], device=self._device), 1 + N_STEPS
            kept = {} if self._findings.rows == SHORT else {"logits_to_keep": n}
            logits = self._model(input_ids=ids, use_cache=False, **kept).logits
        if logits.ndim != 3 or logits.shape[0] != 1 or logits.shape[1] < n:
            raise UsageError(
                f"{self._name} cannot be measured: its logits are {list(logits.shape)}, "
                f"where those of {len(tokens)} tokens are [1, tokens, vocabulary]"
            )
        # Some give logits of fewer bits than they compute in.
        dtypes = (self._findings.dtype, logits.dtype)
        self._findings.dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
        return torch.as_tensor(logits[0, -n:]).double().clone()

    def _decode(self, path: Path, forced: list[int]) -> Tensor:
        is_padded, cache_state = path
        rows = [self._prompt, self._filler] if is_padded else [self._prompt]
        arm = self._arm or nullcontext
        with self._refusing(f"a batch ({_name(path)})"), arm():
            width = max(map(len, rows)) + max(len(forced), self._findings.rows.n_new)
            batch = ExactBatch(self._model, self._device, len(rows), width)
            # What another prompt left behind must not show.
            batch.reset([row[::-1] for row in rows])
            batch.compute_prompt("whole")
            batch.reset(rows)
            fed = torch.tensor([forced], device=self._device).expand(len(rows), -1)
            if cache_state == "scored":
                ((part, n_wanted),) = batch.passes(fed, Load(len(rows), (0,), scores=True))
                return batch.forward(part, n_wanted)[0].double()
            # A model may give all its logits in one buffer.
            logits = [batch.compute_prompt(cache_state)[0].double().clone()]
            if path == IN_PASSES:  # The prompt's last part may be a single token.
                logits += batch.forward(fed, len(forced))[0].double()
            else:
                logits += [batch.step(ids)[0].double().clone() for ids in fed.unbind(1)]
        return torch.stack(logits)

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """What a model's own code raises becomes a refusal by name."""
        try:
            yield
        except Exception as error:
            if isinstance(error, torch.AcceleratorError | UsageError) or is_out_of_memory(error):
                raise
            kind = "" if isinstance(error, TrialError) else f" raises {type(error).__name__}"
            raise UsageError(
                f"{self._name} cannot be measured: {what}{kind}: {first_line(error)}"
            ) from error

    def _bidirectional(self) -> str:
        is_encoder = getattr(self._model.config, "is_decoder", True) is False
        said = " (its config says is_decoder: false)" if is_encoder else ""
        return (
            f"{self._name} lets a token see those after it{said}: it is no decoder, and ndcheck "
            "measures what decoders complete"
        )

    def _unfaithful(self, path: Path, difference: float) -> str:
        (is_padded, cache_state), rows = path, self._findings.rows
        differ = f"differ by {difference:.2g} of their spread from"
        longer = "" if rows == SHORT else f" (in {rows.filler + rows.n_new} tokens: try fewer)"
        how = {
            "whole": "decoded token by token",
            "chunked": "in passes of several tokens",
            "prefix": "after a prefix computed before",
            "scored": "of prompt and completion in one pass",
        }[cache_state]
        if is_padded:
            how = f"of a padded row{'' if cache_state == 'whole' else f', {how}'}"
        return (
            f"{self._name} computes something else in such a batch: its logits {how} "
            f"{'hold NaN, unlike' if difference == torch.inf else differ} those of generate() "
            f"alone, which is no rounding{longer}"
        )


def _bases(path: Path) -> tuple[Path, ...]:
    """The paths that one is made of, and it."""
    is_padded, cache_state = path
    return tuple(dict.fromkeys((ALONE, (is_padded, "whole"), (False, cache_state), path)))


def _name(path: Path) -> str:
    is_padded, cache_state = path
    return f"{'padded' if is_padded else 'alone'} {cache_state}"


def _difference(logits: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of a token's logits in units of their spread; 0 where NaN is right too.

    The largest of the tokens' in fp32. In 16 bits a single token may be far off, where an expert
    was chosen by a hair: the middle one counts.
    """
    if not right.isfinite().all():
        return 0.0
    # Logits that are all alike have none: rounding then is in units of themselves.
    spread = torch.maximum(right.std(dim=-1), right.abs().amax(dim=-1) / 100).clamp(min=1e-30)
    by_token = (logits - right).abs().amax(dim=-1) / spread
    by_token = by_token.nan_to_num(nan=torch.inf)
    return float(by_token.max() if dtype.itemsize >= 4 else by_token.median())
