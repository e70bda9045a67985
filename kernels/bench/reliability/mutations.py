"""Mutations of JSON, of lines and of bytes, each a function of a seeded generator."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, 1e308, float("nan"), float("inf"))
ODD_TEXTS = (
    "", "\udcff", "\x00", "\u202e", "../../x", "/dev/zero", "x" * 5000, "=1+1", "[red]", "\n", "é",
    "PASS", "stock", "-1", "1e999", "{}", "(", "(a|aa)+$", "\ufeff", "None",
)  # fmt: skip
ODD = (None, True, False, [], {}, [[]], [None], {"a": 1}, [1.5], ["x"], *ODD_NUMBERS, *ODD_TEXTS)
ODD_BYTES = (b"\x00", b"\xff\xfe", b"\r\n", b"\n", b"{", b"}", b'"', b"\\ud800", b"NaN", b"1e999",
             b"9" * 5000, b"[" * 3000, b",", b"\xed\xa0\x80", b"\xef\xbb\xbf")  # fmt: skip


def mutate_value(value: Any, rng: random.Random) -> Any:
    """The same JSON with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        changed = dict(value)
        kind = rng.randrange(8)
        if kind == 0:
            del changed[name]
        elif kind == 1:
            changed[rng.choice(ODD_TEXTS)] = changed.pop(name)
        elif kind == 2:
            other = rng.choice(list(value))
            changed[name], changed[other] = changed[other], changed[name]
        else:
            changed[name] = mutate_value(value[name], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        kind = rng.randrange(5)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value + value[at:]
        return [*value[:at], mutate_value(value[at], rng), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.3:
        return value + rng.choice((-1, 1, 2**31, -(2**31)))
    return rng.choice((*ODD, "\ud800"))


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(mutate_value(json.loads(content), rng)).encode()


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    """One line of JSON changed, dropped, doubled, moved or cut."""
    lines = content.splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        del lines[at:]
    else:
        lines[at] = mutate_json(lines[at], rng) + b"\n"
    return b"".join(lines)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, cut, put in or doubled."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at : at + rng.choice((1, 2, 10, 1000))]
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.choice((1, 10, 1000))]
        elif kind == 3:
            del changed[at:]
        else:
            changed[at:at] = rng.choice(ODD_BYTES)
    return bytes(changed)


def replace_file(path: Path, rng: random.Random) -> None:
    """Something that is no file in its place, or nothing."""
    path.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")
