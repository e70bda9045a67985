"""Recordings and scores as files, and runs that hold no ids: everything in them is untrusted."""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest


def test_scores_of_another_program_pass_with_the_control_alone(
    ndcheck_here, recorded, tmp_path, write_lines, computer
):
    echo = ndcheck_here("score", recorded, "--file", recorded)
    assert echo.returncode == 3
    assert "these may be the recorded numbers themselves" in echo.stdout

    asked = tmp_path / "asked.jsonl"
    done = ndcheck_here("score", recorded, "--requests", asked)
    assert done.returncode == 0
    requests = [json.loads(line) for line in asked.read_text().splitlines()]
    assert len(requests) == 4
    answers = [
        {**each, "logprobs": computer.scores(each["prompt_ids"], each["completion_ids"])}
        for each in requests
    ]
    done = ndcheck_here("score", recorded, "--file", write_lines("scored.jsonl", answers))
    assert done.returncode == 0
    assert "PASS  0 of 360 tokens differ, of 3 completions, 3 distinct" in done.stdout
    # What repeats the numbers by their place answers the control as it does the completion.
    control = next(i for i, each in enumerate(requests) if each not in requests[:3])
    answers[control]["logprobs"] = answers[0]["logprobs"]
    done = ndcheck_here("score", recorded, "--file", write_lines("echo.jsonl", answers))
    assert done.returncode == 3
    assert "the control was missed" in done.stdout


def test_a_fault_planted_in_every_completion_is_found_there(
    ndcheck_here, recorded, write_lines, tmp_path, computer
):
    scored = write_lines("scored.jsonl", computer.lines(change=computer.plant))
    table = tmp_path / "tokens.csv"
    done = ndcheck_here("score", recorded, "--file", scored, "--csv", table)
    assert done.returncode == 1
    assert "FAIL  3 of 360 tokens differ, in 3 of 3 completions, first at token 98" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360
    assert [int(row["index"]) for row in rows if row["differs"] == "True"] == [97, 97, 97]
    expected = [x for line in computer.lines(change=computer.plant) for x in line["logprobs"]]
    assert [float(row["scored_logprob"]) for row in rows] == expected


def test_on_a_narrow_screen_words_and_numbers_stay_whole(
    ndcheck_here, recorded, write_lines, computer
):
    scored = write_lines("scored.jsonl", computer.lines(change=computer.plant))
    wide, narrow = (
        ndcheck_here("score", recorded, "--file", scored, env={"COLUMNS": columns}).stdout
        for columns in ("120", "40")
    )
    assert "357/360 (99.2 %)" in narrow
    shown = [line for line in narrow.splitlines() if str(recorded.parent) not in line]
    assert max(map(len, shown)) <= 40 < max(map(len, wide.splitlines()))
    # The same words, wherever the lines end.
    assert " ".join(narrow.split()[:30]) == " ".join(wide.split()[:30])


def test_limits_accept_what_is_within_them(ndcheck_here, recorded, write_lines, computer):
    shifted = write_lines("s.jsonl", computer.lines(change=lambda v: [x - 0.125 for x in v]))
    for options, code, word in (
        (("--max-logprob-difference", 0.13), 0, "ACCEPTED"),
        (("--max-logprob-difference", 0.12), 1, "FAIL"),
        (("--max-kl", 0.01), 0, "ACCEPTED"),
        # k3 of a ratio of exp(-1/8): exp(-1/8) - 1 + 1/8 = 0.0075.
        (("--max-kl", 0.007), 1, "FAIL"),
        (("--max-kl", 0.01, "--bitwise"), 1, "FAIL"),
        (("--max-kl", -1), 2, ""),
    ):
        done = ndcheck_here("score", recorded, "--file", shifted, *options)
        assert done.returncode == code, options
        assert word in done.stdout


def test_scores_that_were_rounded_are_no_bits(ndcheck_here, recorded, write_lines, computer):
    short = write_lines("s.jsonl", computer.lines(change=lambda v: [round(x, 4) for x in v]))
    done = ndcheck_here("score", recorded, "--file", short)
    assert done.returncode == 3
    assert "rounded" in done.stdout
    done = ndcheck_here("score", recorded, "--file", short, "--max-logprob-difference", 1e-4)
    assert done.returncode == 0


def test_completions_without_a_score_pass_nothing(ndcheck_here, recorded, write_lines, computer):
    rest = write_lines("rest.jsonl", list(computer.lines())[:1])
    done = ndcheck_here("score", recorded, "--file", rest, "--max-kl", 1)
    assert done.returncode == 3
    assert "2 completions without a score" in done.stdout
    others = write_lines("others.jsonl", [{**next(computer.lines()), "prompt_ids": [1]}])
    done = ndcheck_here("score", recorded, "--file", others, "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert "the scorer returned nothing" in document["arms"][0]["reasons"][0]
    assert document["arms"][0]["k3_kl"] is None


LINE = {"prompt_ids": [1], "completion_ids": [2, 3], "logprobs": [-1.0, -2.0]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no completion"),
        (b"\n\n", "holds no completion"),
        (b"{", "line 1"),
        (b"[1]", "give an object"),
        (b"\xff\xfe", "line 1"),
        ({**LINE, "logprobs": [-1.0]}, "2 completion_ids and 1 logprobs"),
        ({**LINE, "logprobs": [-1.0, "x"]}, "logprobs"),
        ({**LINE, "logprobs": [-1.0, float("nan")]}, "NaN is no JSON"),
        ({**LINE, "logprobs": [-1.0, -1e300]}, "logprobs"),
        ({**LINE, "logprobs": [-1.0, 2.0]}, "logprobs"),
        ({**LINE, "logprobs": [-1.0, True]}, "logprobs"),
        ({**LINE, "completion_ids": [2, -3]}, "completion_ids"),
        ({**LINE, "completion_ids": [2, 2**40]}, "completion_ids"),
        ({**LINE, "completion_ids": [2, 3.5]}, "completion_ids"),
        ({**LINE, "completion_ids": [], "logprobs": []}, "at least one id"),
        ({**LINE, "prompt_ids": []}, "at least one id"),
        ({**LINE, "ranks": [1]}, "2 completion_ids and 1 ranks"),
        ({**LINE, "ranks": [0, 1]}, "ranks"),
        ({"completion_ids": [2], "logprobs": [-1.0]}, "no field 'prompt_ids'"),
    ],
)
@pytest.mark.parametrize("place", ["recorded", "scored"])
def test_a_wrong_line_is_named(ndcheck_here, write_lines, tmp_path, content, words, place):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    right = write_lines("right.jsonl", [LINE])
    files = (wrong, right) if place == "recorded" else (right, wrong)
    done = ndcheck_here("score", files[0], "--file", files[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_scores_of_one_completion_are_refused(ndcheck_here, write_lines):
    twice = write_lines("twice.jsonl", [LINE, {**LINE, "logprobs": [-1.0, -2.5]}])
    done = ndcheck_here("score", twice, "--file", twice)
    assert done.returncode == 2
    assert "line 2: other log-probabilities for the same ids" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.jsonl", "--file", "missing.jsonl"), "No such file"),
        (("pipe", "--file", "pipe"), "it is a pipe"),
        (("right.jsonl",), "names no model"),
        (("right.jsonl", "--arms", "stock", "--file", "right.jsonl"), "--arms"),
        (("right.jsonl", "--file", "right.jsonl", "--dtype", "fp32"), "leave out --dtype"),
        (("right.jsonl", "--file", "right.jsonl", "--plot", "p.jpg"), ".png or .svg"),
        (("right.jsonl", "--model", "scripted:clean"), "scripted"),
        (("right.jsonl", "--model", "builtin", "--kernels", "stock,invariant"), "give one of"),
        ((".", "--file", "right.jsonl"), "holds no run"),
    ],
)
def test_what_cannot_be_done_is_one_line(ndcheck_here, write_lines, tmp_path, arguments, words):
    write_lines("right.jsonl", [LINE])
    os.mkfifo(tmp_path / "pipe")
    done = ndcheck_here("score", *arguments, "-q")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_run_without_ids_is_never_turned_into_tokens(ndcheck_here, tmp_path):
    ndcheck_here("run", "--model", "scripted:clean", "-n", 4, "--out", "r", "-q")
    done = ndcheck_here("score", "r", "--model", "builtin")
    assert (done.returncode, done.stdout) == (2, "")
    assert "text is not turned into tokens again" in done.stderr


def test_the_figure_is_the_same_each_time(ndcheck_here, recorded, write_lines, tmp_path, computer):
    pytest.importorskip("matplotlib")
    scored = write_lines("scored.jsonl", computer.lines(change=computer.plant))
    for name in ("a.svg", "b.svg", "c.png"):
        ndcheck_here("score", recorded, "--file", scored, "--plot", name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_of_a_file_are_compared(ndcheck_here, write_lines):
    recorded = write_lines("r.jsonl", [{**LINE, "ranks": [1, 1]}])
    scored = write_lines("s.jsonl", [{**LINE, "logprobs": [-1.0, -2.5], "ranks": [1, 4]}])
    done = ndcheck_here("score", recorded, "--file", scored, "--json")
    (arm,) = json.loads(done.stdout)["arms"]
    assert (arm["n_ranked"], arm["n_rank_changes"], arm["first_parting"]) == (2, 1, 1)
    assert arm["ratio_percentiles"]["1"] == pytest.approx(np.exp(-0.5))
