"""ndcheck.toml: what it accepts, and one clear line for everything it does not."""

from __future__ import annotations

import inspect

import pytest

from ndcheck.cli.commands.run import run
from ndcheck.config import OPTIONS, read_checks
from ndcheck.errors import UsageError
from ndcheck.judging.rules import Rules
from ndcheck.records import AXES, Endpoint, Probe

NOT_OF_A_CHECK = {
    *("context", "out", "resume", "dry_run", "verbose", "html", "plots", "json", "quiet", "header"),
    "against",
}
"""Options of `ndcheck run` that say what to do with a run, not what it measures, secrets, and a
second server, whose run is another."""


def write(tmp_path, text, name="ndcheck.toml"):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_check_takes_whatever_ndcheck_run_takes():
    assert set(OPTIONS) == set(inspect.signature(run).parameters) - NOT_OF_A_CHECK


def test_a_check_of_a_server(tmp_path):
    (check,) = read_checks(
        write(
            tmp_path,
            """
            [checks.served]
            endpoint = "http://host/v1"
            model = "big"
            arrival = "closed"
            timeout = 5
            api_key_file = "key.txt"
            """,
        )
    )
    assert check.spec.endpoint == Endpoint(
        "http://host/v1", str(tmp_path / "key.txt"), arrival="closed", timeout_s=5
    )
    assert check.spec.arms == ("stock",)


def test_options_defaults_and_rules(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    checks = read_checks(
        write(
            tmp_path,
            """
            max_tokens = 16
            loads = [1, 4]
            [rules]
            max_unique = 3
            [rules.cache]
            allow_latent = true
            [checks.first]
            model = "scripted:clean"
            prompt = "hello"
            target_rate = 0.05
            [checks.second]
            loads = "1,2"
            prompts_file = "prompts.txt"
            kernels = ["stock", "invariant"]
            confidence = 1e-1
            [checks.second.rules]
            max_unique = 1
            arms = ["invariant"]
            max_slowdown = 2
            [checks.second.rules.invariant]
            min_common_prefix = 16
            [checks.second.rules.cache]
            confidence = 0.9
            [checks.second.rules.invariant.cache]
            max_divergence_rate = 0.5
            """,
        )
    )
    first, second = checks
    assert (first.name, first.spec.model, first.spec.decoding.max_tokens) == (
        "first",
        "scripted:clean",
        16,
    )
    assert first.spec.probes == (Probe("p1", "hello"),)
    assert first.spec.target_rate == 0.05
    assert (first.spec.batch_sizes, second.spec.batch_sizes) == ((1, 4), (1, 2))
    assert first.rules.general == Rules(max_unique=3)
    assert first.rules.of_property("stock", "cache") == Rules(allow_latent=True)
    assert [probe.prompt for probe in second.spec.probes] == ["one", "two"]
    assert second.rules.arms == ("invariant",)
    assert second.rules.of_arm("invariant") == Rules(
        max_unique=1, max_slowdown=2, min_common_prefix=16
    )
    assert second.rules.of_arm("stock") == Rules(max_unique=1, max_slowdown=2)
    assert second.rules.of_property("invariant", "cache") == Rules(
        allow_latent=True, confidence=0.9, max_divergence_rate=0.5
    )


def test_pyproject(tmp_path):
    text = '[tool.ndcheck.checks.a]\nmodel = "scripted:clean"\n'
    (check,) = read_checks(write(tmp_path, text, "pyproject.toml"))
    assert check.spec.model == "scripted:clean"


MISTAKES = {
    "a misspelt rule": (
        "[checks.a.rules]\nmax_uniqe = 1",
        "checks.a.rules.max_uniqe: unknown key, did you mean max_unique? accepted: allow_latent, ",
    ),
    "a misspelt option": (
        "[checks.a]\nprompts = ['x']",
        "checks.a.prompts: unknown key, did you mean prompt? accepted: adapter, allow_latent, ",
    ),
    "a misspelt table": (
        "[check.a]\nmodel = 'x'",
        "check: unknown key, did you mean checks? accepted: adapter, allow_latent, ",
    ),
    "a rule of a run on a property": (
        "[checks.a.rules.slot]\nmax_unique = 1",
        "checks.a.rules.slot.max_unique: unknown key; accepted: allow_latent, confidence, "
        "max_divergence_rate, min_common_prefix",
    ),
    "a rule among options": (
        "[checks.a]\nmax_slowdown = 2",
        "checks.a.max_slowdown: unknown key here: it is a rule, for [checks.a.rules]; accepted: ",
    ),
    "a rule before all checks": (
        "max_unique = 2\n[checks.a]",
        "max_unique: unknown key here: it is a rule, for [rules]; accepted: adapter, ",
    ),
    "an option among rules": (
        "[checks.a.rules]\nloads = [1]",
        "checks.a.rules.loads: unknown key here: it is an option, for [checks.a]; accepted: ",
    ),
    "a wrong type": (
        "[checks.a]\nmax_tokens = 'many'",
        "checks.a.max_tokens: 'many' is not accepted; give a whole number",
    ),
    "a true for a number": (
        "[checks.a.rules]\nmax_unique = true",
        "checks.a.rules.max_unique: True is not accepted; give a whole number",
    ),
    "a number for a list": (
        "[checks.a]\nloads = 4",
        "checks.a.loads: 4 is not accepted; give text or a list of numbers",
    ),
    "a bad batch size": (
        "[checks.a]\nloads = [1, 0]",
        "checks.a.loads: '0' is not a batch size; give numbers of 1 or more",
    ),
    "a misspelt property": (
        "[checks.a]\naxes = ['slots']",
        f"checks.a.axes: 'slots' is unknown; choose from {', '.join(AXES)}, did you mean slot?",
    ),
    "a misspelt arm": (
        "[checks.a.rules]\narms = ['invariants']",
        "checks.a.rules.arms: 'invariants' is unknown, did you mean invariant? accepted: stock, "
        "invariant",
    ),
    "a rule for an arm that does not run": (
        "[checks.a]\nkernels = 'stock'\n[checks.a.rules.invariant]\nmax_unique = 1",
        "checks.a.rules.invariant: the run has no such arm, only stock",
    ),
    "a slowdown of one arm": (
        "[checks.a]\nkernels = 'stock'\n[checks.a.rules]\nmax_slowdown = 2.0",
        "checks.a.rules.max_slowdown: the invariant arm is compared with stock: run both with "
        "kernels = stock,invariant",
    ),
    "a rate out of range": (
        "[checks.a.rules]\nmax_divergence_rate = 5",
        "checks.a.rules.max_divergence_rate: 5 is out of range; give a rate from 0 to below 1",
    ),
    "a drift kind without a baseline": (
        "[checks.a.rules]\nfail_on = ['tokens']",
        "checks.a.rules.fail_on: it needs a baseline",
    ),
    "a misspelt drift kind": (
        "[checks.a.rules]\nbaseline = 'main'\nfail_on = ['token']",
        "checks.a.rules.fail_on: 'token' is unknown, did you mean tokens? accepted: environment, ",
    ),
    "a prompts file that is not there": (
        "[checks.a]\nprompts_file = 'none.txt'",
        "checks.a.prompts_file ",
    ),
    "an empty prompt": ("[checks.a]\nprompt = ['x', ' ']", "checks.a: prompt p2 is empty"),
    "a name that is no file name": ("[checks.'a/b']\nmodel = 'x'", "'checks.a/b': name it with"),
    "no check": ("max_tokens = 4", "checks: none is given; add a table [checks.NAME]"),
    "a check that is no table": ("[checks]\na = 1", "checks.a: give a table, [checks.a]"),
    "a rule that is a table": (
        "[checks.a.rules.max_unique]\nstock = 1",
        "checks.a.rules.max_unique: {'stock': 1} is not accepted; give a whole number",
    ),
    "no TOML": ("[checks.a\n", "Expected ']' at the end of a table declaration (at line 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    text, message = MISTAKES[mistake]
    file = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_checks(file)
    line = str(caught.value)
    assert line.startswith(f"{file}: {message}")
    assert "\n" not in line


def test_fields_of_a_request_are_a_table(tmp_path):
    text = """
        [checks.served]
        endpoint = "http://host/v1"
        model = "m"
        extra_body = { top_k = 1, chat_template_kwargs = { enable_thinking = false } }
        query = ["api-version=2024-10-21"]
        """
    (check,) = read_checks(write(tmp_path, text))
    body = '{"chat_template_kwargs":{"enable_thinking":false},"top_k":1}'
    assert check.spec.endpoint.extra_body == body
    assert check.spec.endpoint.query == ("api-version=2024-10-21",)
    with pytest.raises(UsageError, match="extra_body: 1 is not accepted; give text or a table"):
        read_checks(write(tmp_path, text.replace("{ top_k", "1 # {")))
