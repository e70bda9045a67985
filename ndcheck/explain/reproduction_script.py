"""A stand-alone script that shows a shrunk failure with torch and transformers alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ndcheck.explain.shrinking import Shrunk

TIMEOUT_S = 600

_SCRIPT = Template('''\
"""Token $token of row $slot is not the one it gets alone. Found by ndcheck shrink."""
import inspect
import torch
import transformers

ROWS = [
$rows
]
SLOT, N_TOKENS, LENGTHS = $slot, $n_tokens, $lengths
torch.set_num_threads($threads)
$load
CACHE = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

$functions@torch.inference_mode()
def complete(rows, slot, lengths):
    """Greedy tokens and logits of one row in a left-padded batch, prefilled in ``lengths``."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows]).to(model.device)
    pads = torch.tensor([[width - len(row)] for row in rows]).to(model.device)
    columns = torch.arange(width + N_TOKENS).to(model.device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=width + N_TOKENS)
$start
    while len(tokens) < N_TOKENS:
        start, end = end, end + parts[0].shape[1]
        position = (columns[start:end] - pads).clamp(min=0)
        logits = model(parts.pop(0), attention_mask=(columns >= pads).long(), position_ids=position,
                       use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1]
        if not parts:
            parts = [(logits == logits.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)]
            tokens, bits = [*tokens, int(parts[0][slot])], [*bits, logits[slot]]
    return tokens, bits

alone, bits_alone = complete([ROWS[SLOT]], 0, [len(ROWS[SLOT])])
batched, bits_batched = $batched
print("alone  ", alone, "\\nbatched", batched)
differ = $criterion
raise SystemExit(f"differs at token {differ.index(True) + 1}" if any(differ) else 0)
''')

_PREFIX = '''\
@torch.inference_mode()
def load_prefix(cache, rows, width):
    """Fill the first columns with what each row's prefix, computed alone, leaves behind."""
    caches = [transformers.StaticCache(config=model.config, max_cache_len=len(r)) for r in rows]
    for row, own in zip(rows, caches):
        ids = torch.tensor([row]).to(model.device)
        model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(len(row))[None]
              .to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: own})
    for n, layers in enumerate(zip(*(own.layers for own in caches))):
        kept = [[state[:, :, :len(row)] for row, x in zip(rows, layers)
                 for state in [getattr(x, kind)]] for kind in ("keys", "values")]
        cache.update(*(torch.cat([torch.nn.functional.pad(state, (0, 0, width - state.shape[2], 0))
                                  for state in states]) for states in kept), n)

'''
_FEED = '''\
@torch.inference_mode()
def feed(rows, slot, completion):
    """Tokens and logits of one row that is fed prompt and completion in passes of LENGTHS."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row + more[:-1]
                        for row, more in zip(rows, completion)]).to(model.device)
    pads = torch.tensor([[width - len(row)] for row in rows]).to(model.device)
    columns = torch.arange(width + N_TOKENS).to(model.device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=width + N_TOKENS)
    end, bits = 0, []
    for part in ids.split(LENGTHS, dim=1):
        start, end = end, end + part.shape[1]
        wanted = min(part.shape[1], max(0, end - width + 1))
        logits = model(part, attention_mask=(columns >= pads).long(), use_cache=True,
                       position_ids=(columns[start:end] - pads).clamp(min=0),
                       logits_to_keep=max(1, wanted), **{CACHE: cache}).logits[slot]
        bits += list(logits[-wanted:]) if wanted else []
    return [int((row == row.amax()).int().argmax()) for row in bits], bits

'''
_BATCHED = "complete(ROWS, SLOT, LENGTHS)"
_BATCHED_FED = """\
feed(
    ROWS, SLOT, [complete(ROWS, i, [max(map(len, ROWS))])[0] for i in range(len(ROWS))])"""
_START = "    parts, end, tokens, bits = list(ids.split(lengths, dim=1)), 0, [], []"
_START_PREFIX = """\
    end, tokens, bits = width - sum(lengths), [], []
    parts = list(ids[:, end:].split(lengths, dim=1))
    if end:
        load_prefix(cache, [row[: len(row) - sum(lengths)] or [0] for row in rows], end)"""

_LOAD = Template("""\
model = transformers.AutoModelForCausalLM.from_pretrained(
    $model, dtype=$dtype, attn_implementation=$attention$trust)
model = model.to($device).eval()""")

_MAKE = Template("""\
torch.manual_seed($seed)
config = transformers.AutoConfig.from_pretrained($model$trust)
with torch.device($device):
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=config.dtype or torch.bfloat16, attn_implementation=$attention$trust)
for weight in model.eval().parameters():
    weight.data = weight.data.to($dtype)""")


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A script, and what it printed when it was run; ``shows_it`` if it found the same token."""

    path: Path
    shows_it: bool
    output: str


def write_script(
    shrunk: Shrunk,
    described: dict[str, Any],
    source: str,
    *,
    remote: bool,
    random_weights: int | None = None,
) -> str:
    """The script's text: at most 39 lines (56 with a prefix, 62 if fed) and one for each row.

    ``described`` is the sampler's description of the model, ``source`` where it is loaded from;
    ``random_weights`` is the seed of weights that are not.
    """
    import torch

    batch = shrunk.batch
    has_prefix = sum(shrunk.pass_lengths) < max(map(len, batch.rows))
    is_fed = batch.load.is_fed
    load = _LOAD if random_weights is None else _MAKE
    tokens = "[a != b for a, b in zip(alone, batched)]"
    return _SCRIPT.substitute(
        token=shrunk.position + 1,
        slot=batch.slot,
        rows="\n".join(f"    {list(row)}," for row in batch.rows),
        n_tokens=batch.n_tokens,
        lengths=list(shrunk.pass_lengths),
        functions=_PREFIX * has_prefix + _FEED * is_fed,
        batched=_BATCHED_FED if is_fed else _BATCHED,
        start=_START_PREFIX if has_prefix else _START,
        threads=torch.get_num_threads(),
        load=load.substitute(
            model=repr(source),
            trust=", trust_remote_code=True" * remote,
            dtype=f"torch.{described['dtype']}",
            attention=repr(described["attention"]),
            device=repr(described["device"]),
            seed=random_weights,
        ),
        criterion=tokens.replace("a != b", "not torch.equal(a, b)")
        .replace("alone", "bits_alone")
        .replace("batched", "bits_batched")
        if shrunk.is_latent
        else tokens,
    )


def run_script(path: Path, shrunk: Shrunk) -> Reproduction:
    """Run the script in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, str(path)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Reproduction(path, False, f"it did not end within {TIMEOUT_S} s")
    expected = f"differs at token {shrunk.position + 1}"
    lines = [*done.stdout.strip().splitlines(), *done.stderr.strip().splitlines()[-1:]]
    shows_it = done.returncode == 1 and lines[-1:] == [expected]
    return Reproduction(path, shows_it, "\n".join(lines))
