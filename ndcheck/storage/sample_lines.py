"""A sample as a line of samples.jsonl, bit for bit.

Per-token values that must survive are hexadecimal strings of fixed width per token:
``logprob_bits`` 8 digits (big-endian fp32), ``row_digests`` 16 digits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from ndcheck.records import Arm, Drafted, Fault, Fed, FinishReason, Load, Purpose, Sample, Witness
from ndcheck.storage.ranges import Count, NotNegative, RawText, Seed
from ndcheck.storage.reading import MAX_LINE_BYTES, decode, parse_json, refuse_unknown

NONCE = "nonce"
_KEYS = {"purpose": "axis"}
"""Fields that have another name in files."""


def encode_line(sample: Sample, nonce: str = "") -> bytes:
    """``nonce`` is that of the run; without one the line says of none."""
    fields = {name: getattr(sample, name) for name in Sample.__dataclass_fields__}
    load, witness = fields.pop("load"), fields.pop("witness")
    logprobs = fields.pop("logprobs")
    document = {
        **({NONCE: nonce} if nonce else {}),
        **{_KEYS.get(name, name): value for name, value in fields.items()},
        **dataclasses.asdict(load),
        **dataclasses.asdict(witness),
        "fed": dataclasses.asdict(sample.fed) if sample.fed else None,
        "drafted": dataclasses.asdict(sample.drafted) if sample.drafted else None,
        "fault": dataclasses.asdict(sample.fault) if sample.fault else None,
        "logprob_bits": struct.pack(f">{len(logprobs)}f", *logprobs).hex(),
        "margins": [m if math.isfinite(m) else None for m in sample.margins],
        "row_digests": "".join(sample.row_digests),
    }
    # One line whatever the text holds: JSON escapes line feeds, and lone surrogates become \\uXXXX.
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


_DIGITS_PER_DIGEST = 16
_DIGEST = re.compile(r"[0-9a-f]{16}")
_LOGPROBS = re.compile(r"(?:[0-9a-f]{8})*")


@dataclass(frozen=True, slots=True)
class _Numbers:
    sample_id: Seed
    trial_id: Seed
    baseline: Seed | None
    slot: Count
    elapsed_s: NotNegative


@dataclass(frozen=True, slots=True)
class _Whose:
    arm: Arm
    probe_id: str


@dataclass(frozen=True, slots=True)
class _Purpose:
    axis: Purpose


@dataclass(frozen=True, slots=True)
class _Ending:
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class _Tokens:
    token_ids: tuple[Count, ...]
    token_texts: tuple[RawText, ...]


@dataclass(frozen=True, slots=True)
class _Logits:
    """A margin of infinity is null."""

    margins: tuple[float | None, ...] = ()
    row_digests: str = ""


@dataclass(frozen=True, slots=True)
class _Remarks:
    fault: Fault | None = None
    fed: Fed | None = None
    drafted: Drafted | None = None
    error: RawText | None = None
    n_retries: Count = 0


@dataclass(frozen=True, slots=True)
class _Logprobs:
    logprob_bits: str = ""


_FIRST_KEYS = tuple(
    f',"{name}":'.encode("ascii")
    for name in ("token_ids", "finish_reason", "margins", "fault", "logprob_bits")
)
"""In a line that `encode_line` wrote, its parts begin with these."""
_OF_RUN = re.compile(rb'{"nonce":"([0-9a-f]{1,64})",')
_HEADING = re.compile(
    rb'"sample_id":(0|[1-9]\d{,17}),"trial_id":(0|[1-9]\d{,17}),(.+),("axis":.+),'
    rb'"baseline":(null|0|[1-9]\d{,17}),"slot":(0|[1-9]\d{,8})'
)
_ENDING = re.compile(rb'(.+),"elapsed_s":((?:0|[1-9]\d{,9})\.\d{1,25}(?:e-\d\d)?)')
MOST_BYTES_IN_PARTS = 2**16
_N_KEPT = 4096


def decode_line(line: bytes | None, nonce: str | None = None, *, knows_all: bool = False) -> Sample:
    """Raises ValueError saying what is wrong with the line.

    ``nonce`` is that of the run whose line it has to be, None if that of any run is accepted.
    ``knows_all``: no later version wrote it, so that a key unknown here is a damaged one.
    """
    if line is None:
        raise ValueError(f"it is longer than {MAX_LINE_BYTES >> 20} MiB")
    of_run = _OF_RUN.match(line)
    own: Any = of_run[1].decode() if of_run else ""
    try:
        if nonce in (None, own):
            return _decode_parts(b"{" + line[of_run.end() :] if of_run else line)
    except ValueError:
        pass
    # Another version's or program's, or a damaged one: read as a whole, it is told which.
    document = parse_json(line.decode("utf-8"))
    own = document.pop(NONCE, "") if isinstance(document, dict) else ""
    if nonce not in (None, own):
        raise ValueError("it is of another run")
    if knows_all and isinstance(document, dict):
        refuse_unknown(document, dict.fromkeys(frozenset().union(*_KEYS_OF.values())))
    numbers, whose, purpose, ending, tokens, logits, *rest, logprobs = (
        _read(part, document) for part in _KEYS_OF
    )
    values = dataclasses.astuple(numbers)
    return _join(values, whose, purpose, ending, tokens, logits, tuple(rest), logprobs)


def _decode_parts(line: bytes) -> Sample:
    """The same of a line as `encode_line` writes it; ValueError of any other.

    What a sample has alike with others, all but a few numbers, is decoded once. Within a string of
    JSON the quotes of a key cannot stand.
    """
    if len(line) > MOST_BYTES_IN_PARTS or line[:1] != b"{" or line[-2:] != b"}\n":
        raise ValueError("it is long, or cut off")
    found, start = [], 1
    for key in _FIRST_KEYS:
        end = line.index(key, start)
        found.append(line[start:end])
        start = end + 1
    heading, tokens, ending, logits, rest = found
    begins, ends = _HEADING.fullmatch(heading), _ENDING.fullmatch(ending)
    if begins is None or ends is None:
        raise ValueError("its numbers are written otherwise")
    sample_id, trial_id, whose, purpose, baseline, slot = begins.groups()
    finish_reason, elapsed_s = ends.groups()
    numbers = (
        int(sample_id),
        int(trial_id),
        None if baseline == b"null" else int(baseline),
        int(slot),
        float(elapsed_s),
    )
    return _join(
        numbers,
        _kept_part(_Whose, whose),
        _kept_part(_Purpose, purpose),
        _kept_part(_Ending, finish_reason),
        _kept_part(_Tokens, tokens),
        _kept_part(_Logits, logits),
        _kept_rest(rest),
        _kept_part(_Logprobs, line[start:-2]),
    )


_Rest = tuple[_Remarks, Load, Witness]


@lru_cache(_N_KEPT)
def _kept_rest(text: bytes) -> _Rest:
    load, witness = text.index(b',"batch_size":'), text.index(b',"achieved_batch_size":')
    return (
        _kept_part(_Remarks, text[:load]),
        _kept_part(Load, text[load + 1 : witness]),
        _kept_part(Witness, text[witness + 1 :]),
    )


def _read_part(part: type[Any], text: bytes) -> Any:
    document = parse_json(f"{{{text.decode('utf-8')}}}")
    # Another part's key could be there twice.
    if not document.keys() <= _KEYS_OF[part]:
        raise ValueError("it has other keys")
    return _read(part, document)


_kept_part = lru_cache(_N_KEPT)(_read_part)


def _read(part: type[Any], document: Any) -> Any:
    found = decode(part, document)
    unpack = _UNPACK.get(part)
    return found if unpack is None else unpack(found)


def _unpack_logits(logits: _Logits) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The margins and the digests."""
    margins = cast("tuple[float, ...]", logits.margins)
    if None in logits.margins:
        margins = tuple(math.inf if margin is None else margin for margin in logits.margins)
    digests = _DIGEST.findall(logits.row_digests)
    if len(digests) * _DIGITS_PER_DIGEST != len(logits.row_digests):
        raise _not_digits("row_digests", _DIGITS_PER_DIGEST)
    return margins, tuple(digests)


def _unpack_logprobs(logprobs: _Logprobs) -> tuple[float, ...]:
    if not _LOGPROBS.fullmatch(logprobs.logprob_bits):
        raise _not_digits("logprob_bits", 8)
    bits = bytes.fromhex(logprobs.logprob_bits)
    return struct.unpack(f">{len(bits) // 4}f", bits)


def _not_digits(name: str, digits: int) -> ValueError:
    return ValueError(f"{name}: give {digits} hexadecimal digits a token")


def _check_remarks(remarks: _Remarks) -> _Remarks:
    fed = remarks.fed
    if fed and not all(map(_DIGEST.fullmatch, (fed.digest, fed.decoded_digest))):
        raise ValueError(f"fed: its digests have {_DIGITS_PER_DIGEST} hexadecimal digits")
    return remarks


_UNPACK: dict[type[Any], Callable[[Any], Any]] = {
    _Logits: _unpack_logits,
    _Remarks: _check_remarks,
    _Logprobs: _unpack_logprobs,
}
_KEYS_OF = {
    part: frozenset(field.name for field in dataclasses.fields(part))
    for part in (
        _Numbers,
        _Whose,
        _Purpose,
        _Ending,
        _Tokens,
        _Logits,
        _Remarks,
        Load,
        Witness,
        _Logprobs,
    )
}


def _join(
    numbers: tuple[Any, ...],
    whose: _Whose,
    purpose: _Purpose,
    ending: _Ending,
    tokens: _Tokens,
    logits: tuple[tuple[float, ...], tuple[str, ...]],
    rest: _Rest,
    logprobs: tuple[float, ...],
) -> Sample:
    sample_id, trial_id, baseline, slot, elapsed_s = numbers
    remarks, load, witness = rest
    return Sample(
        sample_id,
        trial_id,
        whose.arm,
        whose.probe_id,
        purpose.axis,
        baseline,
        load,
        slot,
        witness,
        tokens.token_ids,
        tokens.token_texts,
        ending.finish_reason,
        elapsed_s,
        logprobs,
        *logits,
        remarks.fault,
        remarks.fed,
        remarks.drafted,
        remarks.error,
        remarks.n_retries,
    )
