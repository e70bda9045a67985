"""``ndcheck.toml`` or ``[tool.ndcheck]``: named checks, each a run's options and its rules.

::

    model = "builtin"                # options outside of a check are defaults of all checks

    [checks.queue]
    prompt = "class Queue:"
    kernels = ["stock", "invariant"]

    [checks.queue.rules]
    arms = ["invariant"]             # those that must pass; stock is their control
    max_slowdown = 4

    [checks.queue.rules.cache]       # an arm or a property may have rules of its own
    allow_latent = true

    [checks.trainer]
    score = "scored"                 # judge what `ndcheck score --out scored` left there

    [checks.trainer.rules]
    max_kl = 1e-3
"""

from __future__ import annotations

import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from ndcheck.errors import UsageError, did_you_mean
from ndcheck.judging.comparison import FAIL_ON
from ndcheck.judging.rules import BASELINE_DEFAULT, PROPERTY_RULES, Rules, RuleSet
from ndcheck.judging.scores import Limits
from ndcheck.records import ARMS, AXES, Arm, Axis, RunSpec
from ndcheck.request import Options, make_private, make_spec
from ndcheck.samplers.endpoint.private import Private
from ndcheck.storage.reading import read_text

FILES = (Path("ndcheck.toml"), Path("pyproject.toml"))

Table = Mapping[str, Any]
OPTIONS = get_type_hints(Options)
"""Whatever `ndcheck run` accepts, by the same names."""
FILE_OPTIONS = {"prompts_file", "api_key_file", "adapter"}
"""Relative to the configuration's folder."""
RULES = get_type_hints(Rules)
SCORE_RULES = get_type_hints(Limits)
RUN_RULES = {"arms": Sequence[str], "baseline": str, "fail_on": Sequence[str], "manifest": str}
CHECK_NAME = re.compile(r"[A-Za-z0-9_.-]+")
DESCRIPTIONS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a file name",
    dict: "a table",
}


@dataclass(frozen=True, slots=True)
class Check:
    """A run to make and what is demanded of it, as ``file`` says; ``private`` is in no record."""

    name: str
    spec: RunSpec
    rules: RuleSet
    file: Path
    private: Private = field(default_factory=Private, repr=False)

    def locate(self, error: UsageError) -> UsageError:
        """The same error with the file and the key, where it speaks of an option."""
        return UsageError(f"{self.file}: {_key(error, f'checks.{self.name}.')}")


@dataclass(frozen=True, slots=True)
class ScoreCheck:
    """A directory of `ndcheck score`, and what is accepted there, as ``file`` says."""

    name: str
    directory: Path
    limits: Limits
    file: Path


def find_file() -> Path:
    """The configuration of the current directory. Raises UsageError if there is none."""
    for file in FILES:
        if file.is_file() and _read_table(file) is not None:
            return file
    raise UsageError(
        "nothing to judge: give a run's directory, or write ndcheck.toml "
        "(or [tool.ndcheck] in pyproject.toml) with a table [checks.NAME]"
    )


def read_checks(file: Path) -> list[Check | ScoreCheck]:
    """All checks of a file. Raises UsageError with the file, the key and what is accepted."""
    table = _read_table(file)
    if table is None:
        raise UsageError(f"{file}: it has no table [tool.ndcheck]")
    try:
        return _read_checks(table, file)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _read_table(file: Path) -> Table | None:
    try:
        table: Table = tomllib.loads(read_text(file))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except RecursionError:
        raise UsageError(f"{file}: it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    if file.name != "pyproject.toml":
        return table
    tools = table.get("tool", {})
    tool = tools.get("ndcheck") if isinstance(tools, dict) else None
    if tool is not None and not isinstance(tool, dict):
        raise UsageError(f"{file}: tool.ndcheck: give a table, [tool.ndcheck]")
    return tool


def _read_checks(table: Table, file: Path) -> list[Check | ScoreCheck]:
    _refuse_unknown(table, (*OPTIONS, "rules", "checks"), "")
    checks = table.get("checks")
    if not isinstance(checks, dict) or not checks:
        raise UsageError("checks: none is given; add a table [checks.NAME]")
    shared = {name: value for name, value in table.items() if name in OPTIONS}
    _check_types(shared, OPTIONS, "")
    shared_rules = _rules_table(table, "rules.")
    found: list[Check | ScoreCheck] = []
    for name, check in checks.items():
        place = f"checks.{name}."
        if not CHECK_NAME.fullmatch(name) or name.strip(".") == "":
            raise UsageError(f"{place[:-1]!r}: name it with letters, digits, and _ . - alone")
        if not isinstance(check, dict):
            raise UsageError(f"{place[:-1]}: give a table, [checks.{name}]")
        if "score" in check:
            found.append(_read_score_check(name, check, file, place))
            continue
        _refuse_unknown(check, (*OPTIONS, "rules", "score"), place)
        options = {key: value for key, value in check.items() if key != "rules"}
        _check_types(options, OPTIONS, place)
        options = {**shared, **options}
        spec = _make_spec(options, file.parent, place)
        table_of_rules = _merge(shared_rules, _rules_table(check, f"{place}rules."))
        rules = _make_rules(table_of_rules, spec, f"{place}rules.")
        if rules.manifest is not None:
            rules = replace(rules, manifest=str(file.parent / rules.manifest))
        private = make_private((), options.get("query", ()), options.get("extra_body"))
        found.append(Check(name, spec, rules, file, private))
    return found


def _read_score_check(name: str, check: Table, file: Path, place: str) -> ScoreCheck:
    """Nothing runs here, so that it has neither options nor the rules of all runs."""
    _refuse_unknown(check, ("score", "rules"), place)
    _check_types({"score": check["score"]}, {"score": str}, place)
    rules = check.get("rules", {})
    if not isinstance(rules, dict):
        raise UsageError(f"{place}rules: give a table, [{place}rules]")
    _refuse_unknown(rules, SCORE_RULES, f"{place}rules.")
    _check_types(rules, SCORE_RULES, f"{place}rules.")
    try:
        limits = Limits(**rules)
    except UsageError as error:
        raise UsageError(_key(error, f"{place}rules.")) from error
    return ScoreCheck(name, file.parent / check["score"], limits, file)


def _make_spec(options: Table, folder: Path, place: str) -> RunSpec:
    for name in FILE_OPTIONS & options.keys():
        options = {**options, name: folder / options[name]}
    try:
        return make_spec(**options)
    except UsageError as error:
        raise UsageError(_key(error, place)) from error


def _key(error: UsageError, place: str) -> str:
    """A line that begins with a flag begins with the key instead: the same name in a file."""
    flag = re.match(r"--([a-z-]+)", str(error))
    if flag is None:
        return f"{place[:-1]}: {error}"
    return f"{place}{flag[1].replace('-', '_')}{str(error)[flag.end() :]}"


def _rules_table(table: Table, place: str) -> Table:
    rules = table.get("rules", {})
    if not isinstance(rules, dict):
        raise UsageError(f"{place[:-1]}: give a table, [{place[:-1]}]")
    _check_rules(rules, {**RULES, **RUN_RULES}, (*ARMS, *AXES), place)
    return rules


def _check_rules(
    table: Table, accepted: Mapping[str, Any], scopes: Sequence[str], place: str
) -> None:
    """``scopes`` are the arms and properties that may have tables of their own here."""
    _refuse_unknown(table, (*accepted, *scopes), place)
    _check_types({k: v for k, v in table.items() if k in accepted}, accepted, place)
    for scope in scopes:
        inner = table.get(scope, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{place}{scope}: give a table, [{place}{scope}]")
        if scope in ARMS:
            _check_rules(inner, RULES, AXES, f"{place}{scope}.")
        else:
            _check_rules(inner, {n: RULES[n] for n in PROPERTY_RULES}, (), f"{place}{scope}.")


def _make_rules(table: Table, spec: RunSpec, place: str) -> RuleSet:
    by_property: dict[tuple[Arm | None, Axis], Rules] = {}
    for arm in (None, *ARMS):
        scope = table.get(arm, {}) if arm else table
        by_property |= {(arm, axis): Rules(**scope[axis]) for axis in AXES if axis in scope}
    arms = _names(table["arms"], ARMS, f"{place}arms") if "arms" in table else None
    fail_on = table.get("fail_on", BASELINE_DEFAULT)
    rules = RuleSet(
        general=_plain_rules(table),
        by_arm={arm: _plain_rules(table[arm]) for arm in ARMS if arm in table},
        by_property=by_property,
        arms=cast("tuple[Arm, ...] | None", arms),
        baseline=table.get("baseline"),
        fail_on=cast("Any", _names(fail_on, FAIL_ON, f"{place}fail_on")),
        manifest=table.get("manifest"),
    )
    if "fail_on" in table and rules.baseline is None:
        raise UsageError(f"{place}fail_on: it needs a baseline to compare with; give one")
    try:
        rules.check(spec)
    except UsageError as error:
        raise UsageError(f"{place}{error}") from error
    return rules


def _plain_rules(table: Table) -> Rules:
    return Rules(**{name: value for name, value in table.items() if name in RULES})


def _merge(wider: Table, narrower: Table) -> Table:
    merged = dict(wider)
    for key, value in narrower.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) else value
    return merged


def _names(values: Iterable[str], accepted: Sequence[str], place: str) -> tuple[str, ...]:
    values = tuple(values)
    for value in values or ("",):
        if value not in accepted:
            raise UsageError(
                f"{place}: {value!r} is unknown{did_you_mean(value, accepted) or ';'} "
                f"accepted: {', '.join(accepted)}"
            )
    return values


def _refuse_unknown(table: Table, accepted: Iterable[str], place: str) -> None:
    accepted = sorted(accepted)
    for key in table:
        if key not in accepted:
            hint = _rightful_place(key, place) or did_you_mean(key, accepted)
            raise UsageError(
                f"{place}{key}: unknown key{hint or ';'} accepted: {', '.join(accepted)}"
            )


def _rightful_place(key: str, place: str) -> str:
    """Of a rule among options, or an option among rules; else empty."""
    outside, rules, _ = place.partition("rules.")
    if rules and key in OPTIONS:
        table = f"[{outside[:-1]}]" if outside else "the top of the file"
        return f" here: it is an option, for {table};"
    if not rules and key in {**RULES, **RUN_RULES, **SCORE_RULES}:
        return f" here: it is a rule, for [{place}rules];"
    return ""


def _check_types(table: Table, hints: Mapping[str, Any], place: str) -> None:
    for key, value in table.items():
        accepted = _alternatives(hints[key])
        if not any(_is_a(value, kind) for kind in accepted):
            described = " or ".join(dict.fromkeys(map(_describe, accepted)))
            raise UsageError(f"{place}{key}: {value!r} is not accepted; give {described}")


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for kind in get_args(hint) if kind is not type(None)]
    return [hint]


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Sequence:
        (of,) = get_args(kind)
        return isinstance(value, list) and all(_is_a(item, of) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, str if kind is Path else get_origin(kind) or kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Sequence:
        return "a list of numbers" if get_args(kind)[0] is int else "a list of texts"
    return DESCRIPTIONS[get_origin(kind) or kind]
