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
from dataclasses import dataclass

from ndcheck.records import Fed, Load, Purpose, Sample, Witness
from ndcheck.storage.reading import MAX_LINE_BYTES, decode, parse_json

_KEYS = {"purpose": "axis"}
"""Fields that have another name in files."""


def encode_line(sample: Sample) -> bytes:
    fields = {name: getattr(sample, name) for name in Sample.__dataclass_fields__}
    load, witness = fields.pop("load"), fields.pop("witness")
    logprobs = fields.pop("logprobs")
    document = {
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
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{8})*")


@dataclass(frozen=True, slots=True)
class _Packed:
    """What a line holds in a form of its own; a margin of infinity is null."""

    axis: Purpose
    logprob_bits: str = ""
    margins: tuple[float | None, ...] = ()
    row_digests: str = ""
    fed: Fed | None = None


def decode_line(line: bytes | None) -> Sample:
    """Raises ValueError saying what is wrong with the line."""
    if line is None:
        raise ValueError(f"it is longer than {MAX_LINE_BYTES >> 20} MiB")
    document = parse_json(line.decode("utf-8"))
    packed = decode(_Packed, document)
    for name, digits in (("logprob_bits", 8), ("row_digests", _DIGITS_PER_DIGEST)):
        text = getattr(packed, name)
        if len(text) % digits or not _HEXADECIMAL.fullmatch(text):
            raise ValueError(f"{name}: give {digits} hexadecimal digits a token")
    fed = packed.fed
    if fed and not all(re.fullmatch(r"[0-9a-f]{16}", d) for d in (fed.digest, fed.decoded_digest)):
        raise ValueError(f"fed: its digests have {_DIGITS_PER_DIGEST} hexadecimal digits")
    bits, digests = bytes.fromhex(packed.logprob_bits), packed.row_digests
    return decode(
        Sample,
        document,
        purpose=packed.axis,
        load=decode(Load, document),
        witness=decode(Witness, document),
        logprobs=struct.unpack(f">{len(bits) // 4}f", bits),
        margins=tuple(math.inf if margin is None else margin for margin in packed.margins),
        row_digests=tuple(
            digests[at : at + _DIGITS_PER_DIGEST]
            for at in range(0, len(digests), _DIGITS_PER_DIGEST)
        ),
    )
