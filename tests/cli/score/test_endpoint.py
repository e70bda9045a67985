"""Scoring by a server: by token ids alone, and nothing is believed that cannot be."""

from __future__ import annotations

import json

import pytest


def score(ndcheck_here, recorded, url, *options):
    return ndcheck_here("score", recorded, "--endpoint", url, "--model", "m", "-q", *options)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_equal_bits_pass_and_no_text_is_sent(ndcheck_here, recorded, served, kind, computer):
    url, bodies = served(kind=kind)
    done = score(ndcheck_here, recorded, url, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["verdict"], document["control"]) == ("PASS", "caught")
    (arm,) = document["arms"]
    assert (arm["n_tokens"], arm["n_differ"]) == (360, 0)
    sent = [body["input_ids" if kind == "sglang" else "prompt"] for body in bodies]
    expected = [[*line["prompt_ids"], *line["completion_ids"]] for line in computer.lines()]
    # Each completion once, and the control: the longest with another token in its middle.
    assert sent[:-1] == expected
    assert [a != b for a, b in zip(sent[-1], expected[0], strict=True)].count(True) == 1
    assert {body["path"] for body in bodies} == {
        "/generate" if kind == "sglang" else "/v1/completions"
    }


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_fault_planted_in_every_completion_is_found_there(
    ndcheck_here, recorded, served, kind, computer
):
    url, _ = served(kind=kind, change=computer.plant)
    done = score(ndcheck_here, recorded, url, "--json")
    assert done.returncode == 1
    (arm,) = json.loads(done.stdout)["arms"]
    assert [c["first_difference"] for c in arm["completions"]] == [computer.planted_at] * 3
    assert [i for i, n in enumerate(arm["by_position"]["n_differ"]) if n] == [computer.planted_at]
    assert arm["reasons"] == ["3 of 360 tokens differ, in 3 of 3 completions, first at token 98"]


def test_a_server_that_echoes_what_was_recorded_does_not_pass(
    ndcheck_here, write_lines, served, computer
):
    (line,) = computer.lines(1)
    url, _ = served(change=lambda found: line["logprobs"])
    done = score(ndcheck_here, write_lines("one.jsonl", [line]), url)
    assert done.returncode == 3
    assert "the control was missed" in done.stdout


def test_a_query_goes_into_every_address_and_is_shown_in_none(ndcheck_here, recorded, served):
    url, bodies = served()
    done = score(ndcheck_here, recorded, url, "--query", "api-version=7", "--query", "sig=hush")
    assert done.returncode in (0, 1), done.stderr
    assert {body["path"] for body in bodies} == {"/v1/completions?api-version=7&sig=hush"}
    assert "hush" not in done.stdout + done.stderr


def test_a_file_of_scores_takes_no_query(ndcheck_here, recorded):
    done = ndcheck_here("score", recorded, "--file", "scores.jsonl", "--query", "sig=hush")
    assert (done.returncode, done.stdout) == (2, "")
    assert "leave out --query" in done.stderr
    assert "hush" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("no-scores", 2, "gives no log-probabilities of a prompt of token ids"),
        ("no-choice", 2, "gives no log-probabilities of a prompt of token ids"),
        ("short", 4, "another number of tokens than it was given"),
        ("other-ids", 4, "no log-probability of token id"),
        ("text", 4, "'-1.5' as log-probability of token 120"),
        ("nan", 4, "ndcheck: "),
        ("positive", 4, "3.5 as log-probability"),
        ("huge", 4, "-1e+30 as log-probability"),
        ("true", 4, "True as log-probability"),
        ("bad-rank", 4, "ranks that are none"),
    ],
)
def test_what_cannot_be_a_score_is_one_line(ndcheck_here, recorded, served, fault, code, words):
    url, _ = served(fault)
    done = score(ndcheck_here, recorded, url)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "unexpected" not in done.stderr


def test_a_refusal_is_one_line_and_what_may_succeed_later_is_tried_again(
    ndcheck_here, recorded, served
):
    url, bodies = served(refusals=[400])
    done = score(ndcheck_here, recorded, url)
    assert done.returncode == 2
    assert "HTTP 400: not now" in done.stderr
    assert "vLLM's and SGLang's servers do" in done.stderr
    assert len(bodies) == 1
    url, bodies = served(refusals=[503])
    assert score(ndcheck_here, recorded, url).returncode == 0
    assert len(bodies) == 5


def test_a_server_that_is_not_there_is_one_line(ndcheck_here, recorded):
    done = score(ndcheck_here, recorded, "http://127.0.0.1:9/v1")
    assert done.returncode == 4
    assert "cannot connect" in done.stderr


def test_a_server_has_its_own_kernels_and_dtype(ndcheck_here, recorded):
    for option in (("--kernels", "invariant"), ("--dtype", "fp32")):
        done = score(ndcheck_here, recorded, "http://127.0.0.1:9/v1", *option)
        assert done.returncode == 2
        assert "server's own" in done.stderr
