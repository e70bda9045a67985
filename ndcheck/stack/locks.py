"""Lock files, as pip reads them: one pinned package a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ndcheck.errors import UsageError
from ndcheck.samplers.endpoint.redaction import without_credentials
from ndcheck.storage.reading import read_text

EXPORTS = {
    "uv.lock": "uv export --no-hashes",
    "poetry.lock": "poetry export",
    "Pipfile.lock": "pipenv requirements",
    "pdm.lock": "pdm export",
}
OPTIONS = ("-i", "-f", "--index-url", "--extra-index-url", "--find-links", "--no-index", "--pre")
HASH = re.compile(r"\s--hash[= ]\S+")


@dataclass(frozen=True, slots=True)
class Lock:
    """``packages`` are requirements by canonical name; ``options`` are pip's, on where to look."""

    packages: dict[str, str]
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A package that two locks pin differently; None is absent."""

    name: str
    good: str | None
    bad: str | None

    @property
    def shown(self) -> Change:
        """The same without users and passwords of addresses."""
        good, bad = (pin and without_credentials(pin) for pin in (self.good, self.bad))
        return Change(self.name, good, bad)

    def __str__(self) -> str:
        return f"{self.shown.good or 'absent'} -> {self.shown.bad or 'absent'}"


def read_lock(path: Path) -> Lock:
    """Requirements with one exact version or address each. Raises UsageError with the line."""
    if path.name in EXPORTS:
        raise UsageError(f"{path}: give it as requirements: {EXPORTS[path.name]} > FILE")
    try:
        lines = list(_lines(read_text(path)))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    packages: dict[str, str] = {}
    options: list[str] = []
    for line in lines:
        shown = without_credentials(line)
        if line.startswith("-"):
            if re.split(r"[ =]", line)[0] not in OPTIONS:
                raise UsageError(f"{path}: {shown!r}: give packages, and of options {OPTIONS[2]}, "
                                 f"{', '.join(OPTIONS[3:])}")  # fmt: skip
            options += re.split(r"[ =]", line, maxsplit=1)
            continue
        requirement = _pinned(path, line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        name = canonicalize_name(requirement.name)
        if name in packages:
            raise UsageError(f"{path}: {name} is there twice")
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        place = f" @ {requirement.url}" if requirement.url else requirement.specifier
        packages[name] = f"{requirement.name}{extras}{place}"
    if not packages:
        raise UsageError(f"{path}: it pins no package; pip freeze writes such a file")
    return Lock(packages, tuple(options))


def _lines(text: str) -> Iterator[str]:
    """Continued lines as one, without comments and hashes."""
    for line in text.replace("\\\n", " ").splitlines():
        stripped = HASH.sub("", re.sub(r"(^|\s)#.*", "", line)).strip()
        if stripped:
            yield stripped


def _pinned(path: Path, line: str) -> Requirement:
    shown = without_credentials(line)
    try:
        requirement = Requirement(line)
    except InvalidRequirement as error:
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"{path}: {shown!r} is no requirement: {without_credentials(first)}"
        ) from error
    pins = [pin for pin in requirement.specifier if pin.operator in ("==", "===")]
    is_exact = len(requirement.specifier) == 1 and pins and "*" not in pins[0].version
    if requirement.url is None and not is_exact:
        raise UsageError(f"{path}: {shown!r} is not pinned; give NAME==VERSION or NAME @ URL")
    return requirement


def changes(good: Lock, bad: Lock) -> list[Change]:
    """What the second lock pins differently, by name."""
    names = sorted({*good.packages, *bad.packages})
    pairs = ((name, good.packages.get(name), bad.packages.get(name)) for name in names)
    return [Change(name, old, new) for name, old, new in pairs if old != new]
