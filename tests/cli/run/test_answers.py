"""Answers beside tokens, from a prompts file to every report."""

from __future__ import annotations

import csv
import io
import json
import re


def read_table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_answers_are_judged_beside_tokens_and_repeated(ndcheck_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [{"id": f"q{i}", "prompt": f"What is {i}?", "answer": "when"} for i in (1, 2)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    options = ("--loads", "1,2,4", "-n", "23", "--max-tokens", "24", "--answer-pattern", r"(\w+)")
    done = ndcheck_here(
        "run", "--model", "scripted:batch-dependent", "--prompts-file", "asked.jsonl", *options,
        "--out", "run",
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"answers: 2 unique in \d+ completions", done.stdout)
    assert re.search(r"tokens +answer\n.*flipped +flipped\n", done.stdout)
    assert "% right (" in done.stdout
    assert "ndcheck run --prompt 'What is 1?' " in done.stdout
    rows = read_table(tmp_path / "run" / "loads.csv")
    flips = [(int(row["answer_flips"]), int(row["n_diverged_trials"])) for row in rows]
    # An answer flips only where tokens do.
    assert all(answer <= tokens for answer, tokens in flips)
    assert any(answer for answer, _ in flips)
    summary = read_table(tmp_path / "run" / "summary.csv")
    assert [int(row["n_answers"]) > 1 for row in summary] == [True, True]
    kept = (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()
    assert list(map(json.loads, kept)) == asked
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Answer flipped" in report
    assert "% right (" in report


def test_answers_are_looked_for_in_one_way(ndcheck_here):
    done = ndcheck_here("run", "--answer", "number", "--answer-pattern", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("ndcheck: --answer: --answer-pattern says where")
    done = ndcheck_here("run", "--answer", "letter")
    assert "choose from json, number, choice, code" in done.stderr
