"""Prompt files as people keep them: the right values are those of json, csv and pyarrow."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndcheck.errors import UsageError
from ndcheck.plan.conversations import as_messages, as_text, continued
from ndcheck.plan.prompts import read_prompts, typed_prompts
from ndcheck.probe import Message
from ndcheck.request import make_probes

SYSTEM, USER = Message("system", "Be terse."), Message("user", "What is 6 x 7?")
TURNS = [{"role": m.role, "content": m.content} for m in (SYSTEM, USER)]
ANSWER = {"role": "assistant", "content": "42"}
SHARED = [{"from": "human", "value": "What is 6 x 7?"}, {"from": "gpt", "value": "42"}]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
prompts = texts.filter(lambda text: text.strip())
shared = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(tmp_path, name, content, column=None):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(file, column)


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


CONVERSATIONS = {
    "messages": ("a.jsonl", lines({"messages": TURNS}), None),
    "an answer at the end": ("a.jsonl", lines({"messages": [*TURNS, ANSWER]}), None),
    "an id": ("a.jsonl", lines({"id": 7, "messages": TURNS}), "7"),
    "a list a line": ("a.jsonl", lines(TURNS, TURNS), None),
    "a list a line without a suffix": ("a", lines(TURNS, TURNS), None),
    "one conversation": ("a.json", json.dumps(TURNS, indent=1), None),
    "prompt of messages": ("a.json", json.dumps([{"prompt": TURNS, "chosen": [ANSWER]}]), None),
    "parts": (
        "a.jsonl",
        lines({"messages": [TURNS[0], {"role": "user", "content": [
            {"type": "text", "text": "What is "}, {"type": "text", "text": "6 x 7?"}]}]}),
        None,
    ),
    "batch": (
        "a.jsonl",
        lines({"custom_id": "r", "method": "POST", "url": "/v1/chat/completions",
               "body": {"model": "m", "messages": TURNS, "max_tokens": 16, "tools": []}}),
        "r",
    ),
    "sharegpt": (
        "a.json",
        json.dumps([{"id": "c", "system": SYSTEM.content, "conversations": SHARED}]),
        "c",
    ),
    "sharegpt without tools": (
        "a.json",
        json.dumps([{"system": SYSTEM.content, "conversations": SHARED, "tools": "[]"}]),
        None,
    ),
    "sharegpt lines": ("a.jsonl", lines({"conversations": [
        {"from": "system", "value": SYSTEM.content}, *SHARED]}), None),
    "system of a prompt": ("a.ndjson", lines({"system": SYSTEM.content, "prompt": USER.content}),
        None),
    "system column": ("a.csv", f"prompt,system\n{USER.content},{SYSTEM.content}\n", None),
    "system prompt of a question": ("a.jsonl", lines({"system_prompt": SYSTEM.content,
        "question": USER.content, "response": "x"}), None, "question"),
    "system prompt column": ("a.csv", f"system_prompt,prompt\n{SYSTEM.content},{USER.content}\n",
        None),
    "thoughts of the answer": ("a.jsonl", lines({"messages": [
        *TURNS, {**ANSWER, "reasoning_content": "hm"}]}), None),
    "documents beside a column": ("a.jsonl", lines({"system": SYSTEM.content, "q": USER.content,
        "documents": ["x"], "input": "y"}), None, "q"),
    "batch of responses": (
        "a.jsonl",
        lines({"custom_id": "r", "url": "/v1/responses",
               "body": {"instructions": SYSTEM.content, "input": USER.content}}),
        "r",
    ),
    "batch of responses to messages": (
        "a.jsonl",
        lines({"custom_id": "r", "url": "/v1/responses", "body": {"input": [TURNS[0], {
            "role": "user", "content": [{"type": "input_text", "text": USER.content}]}]}}),
        "r",
    ),
    "JSON in a cell": ("a.csv", 'id,messages,prompt\n7,"{}",\n'.format(
        json.dumps(TURNS).replace('"', '""')), "7", "messages"),
    "without a suffix": ("a", lines({"messages": TURNS}), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_keep_their_system_prompt(tmp_path, name):
    file, content, entry_id, *column = CONVERSATIONS[name]
    entries = read(tmp_path, file, content, *column)
    assert entries[0] == (entry_id, (SYSTEM, USER), None)
    (probe, *_) = make_probes([], tmp_path / file, *column)
    assert probe.prompt == USER.content
    assert probe.content == (SYSTEM, USER)


TEXTS = {
    "array": ("a.json", json.dumps(["a", {"id": "x", "prompt": "b\nc"}]), None, ["a", "b\nc"]),
    "one object": ("a.json", '{\n "prompt": "a"\n}\n', None, ["a"]),
    "lines in .json": ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', None, ["a", "b"]),
    "array in .jsonl": ("a.jsonl", '[\n "a",\n "b"\n]', None, ["a", "b"]),
    "array in a line": ("a.jsonl", '["a", "b"]\n', None, ["a", "b"]),
    "a field": ("a.jsonl", lines({"question": "a", "prompt": "b"}), "question", ["a"]),
    "batch of completions": ("a.jsonl", lines({"custom_id": "x", "body": {"prompt": "a"}}), None,
        ["a"]),
    "bom and crlf": ("a.txt", b"\xef\xbb\xbfa\r\n\r\nb c\r\n", None, ["a", "b c"]),
    "u2028": ("a.jsonl", '{"id":"a","prompt":"one\u2028two\x85"}\n"b"', None,
        ["one\u2028two\x85", "b"]),
    "a bracket": ("a", "[INST] hi [/INST]\n{x}\n", None, ["[INST] hi [/INST]", "{x}"]),
    "a bracket in .txt": ("a.txt", "[x for x in y]\n", None, ["[x for x in y]"]),
    "quoted": ("a.csv", 'id,prompt\r\na,"x, ""y""\r\nz"\r\n\r\nb,w', None, ['x, "y"\r\nz', "w"]),
    "bom of a table": ("a.csv", b"\xef\xbb\xbfprompt\r\na\r\n", None, ["a"]),
    "semicolons": ("a.csv", "id;question\n1;a, b\n", "question", ["a, b"]),
    "tabs": ("a.tsv", "id\tprompt\n1\ta, b\n", None, ["a, b"]),
    "a table without a suffix": ("a", "id,prompt\n1,a\n", None, ["a"]),
    "its column": ("a", "id\tq\n1\ta, b\n", "q", ["a, b"]),
    "long": ("a.csv", "prompt\n" + "x" * 200_000, None, ["x" * 200_000]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts(tmp_path, name):
    file, content, column, expected = TEXTS[name]
    assert [prompt for _, prompt, _ in read(tmp_path, file, content, column)] == expected


REFUSED = {
    "no prompt": ("a.jsonl", '"a"\n{"text": "b"}', "line 2: give a string"),
    "no prompt in an array": ("a.json", '["a", 1]', "entry 2: 1 is no prompt"),
    "broken line": ("a.jsonl", '"a"\n\n{"prompt": }', "line 3: Expecting value at character 12"),
    "cut line": ("a.jsonl", '{"prompt": "a', "line 1: Unterminated string starting at character"),
    "broken line, no suffix": ("a", '{"prompt": "a"\n{"prompt": "b"}', "line 1: Expecting ','"),
    "broken document without a suffix": ("a", '[\n{"prompt": "a"},\n{]', "line 3: Expecting"),
    "half a line in .txt": ("a.txt", '{"messages": [{"role": "us', r"name it \.jsonl"),
    "broken document": ("a.json", '[\n"a",\n]', "line 3: Expecting value"),
    "two prompts": ("a.jsonl", lines({"prompt": "a", "messages": TURNS}), "choose one with"),
    "a tool": ("a.jsonl", lines({"messages": TURNS, "tools": [{}]}), "line 1: tools"),
    "a tool of a batch": ("a.jsonl", lines({"body": {"messages": TURNS, "tools": [{}]}}), "tools"),
    "a tool call": ("a.jsonl", lines({"messages": [{**ANSWER, "tool_calls": [{}]}, *TURNS]}),
        "tool_calls"),
    "a picture": ("a.jsonl", lines({"messages": [
        {"role": "user", "content": [{"type": "image_url"}]}]}), "more than a text"),
    "a role": ("a.jsonl", lines({"messages": [{"role": "tool", "content": "x"}]}), "role 'tool'"),
    "an answer alone": ("a.json", json.dumps([{"conversations": SHARED[1:]}]),
        "entry 1: no message"),
    "an answer to go on with": ("a.jsonl", lines({"body": {"messages": [*TURNS, ANSWER]}}),
        "gone on"),
    "no turns": ("a.json", '[{"conversations": []}]', "entry 1"),
    "a text of messages": ("a.jsonl", '{"messages": "hi"}', "no list of messages"),
    "two systems": ("a.jsonl", lines({"system": "x", "messages": TURNS}), "system prompt already"),
    "embeddings": ("a.jsonl", lines({"custom_id": "x", "body": {"input": "a"}}), "line 1: give"),
    "token ids": ("a.jsonl", '{"prompt": [1, 2]}', "1 is no message"),
    "half a character": ("a.jsonl", r'"\ud800"', "not valid UTF-8"),
    "blank": ("a.csv", 'prompt\na\n" "\n', "line 3: the prompt is empty"),
    "no column": ("a.csv", "id,text\n1,a\n", "no column 'prompt', but id, text: name one with"),
    "another column": ("a.csv", "id,text\n1,a\n", "no column 'q'", "q"),
    "cells": ("a.csv", "id,prompt\n1,a\n2,b,c\n", "line 3: it has 3 cells"),
    "quotes": ("a.csv", 'prompt\na\n"b', "line 3: a quotation mark opens that nothing closes"),
    "quotes in the midst": ("a.tsv", 'prompt\n"a\nb\nc\n', "line 2: a quotation mark opens"),
    "Excel's separator": ("a.csv", "sep=;\nid;prompt\n1;a\n", "line 1: leave out Excel's"),
    "files joined": ("a.txt", "a\n\ufeffb\n", "line 2: it begins with a byte order mark"),
    "names": ("a.csv", "prompt,prompt\na,b\n", "same name"),
    "JSON in .txt": ("a.txt", lines({"prompt": "a"}), r"name it \.jsonl"),
    "an array in .txt": ("a.txt", '[\n{"prompt": "a"}\n]', r"name it \.jsonl"),
    "a column of text": ("a.txt", "a\n", "this is text", "prompt"),
    "a column of strings": ("a.jsonl", '"a"', "line 1: it has no field 'q'", "q"),
    "suffix": ("a.yaml", "a: b", r"\.parquet"),
    "no Parquet": ("a.parquet", "x", "no Parquet file"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08", "packed"),
    "a sheet": ("a.csv", b"PK\x03\x04...", "packed"),
    "UTF-16": ("a.csv", "prompt\na".encode("utf-16"), "line 1: it is no UTF-8"),
    "Latin-1": ("a.txt", b"a\ncaf\xe9\n", "line 2: it is no UTF-8"),
    "NUL": ("a.txt", "a\nb\0", "line 2: it holds a NUL"),
    "carriage returns": ("a.txt", "a\rb\r", "line 1: it holds a carriage return"),
    "a table in .txt": ("a.txt", "id\tprompt\n1\ta\n", r"name it \.csv"),
    "Python in a cell": ("a.csv", "id,m\n1,\"[{'role': 'user', 'content': 'a'}]\"\n",
        "line 2: m: a conversation that is no JSON", "m"),
    "an end": ("a.jsonl", lines({"body": {"prompt": "a", "suffix": "b"}}), "line 1: body: suffix"),
    "an end beside": ("a.jsonl", lines({"prompt": "a", "suffix": "b"}), "line 1: suffix"),
    "turns beside": ("a.jsonl", lines({"prompt": "a", "history": [["b", "c"]]}), "line 1: history"),
    "a request without its template": ("a.jsonl",
        lines({"messages": TURNS, "chat_template": "x"}), "line 1: chat_template"),
    "documents": ("a.jsonl", lines({"messages": TURNS, "documents": [{"text": "x"}]}),
        "line 1: documents"),
    "an effort": ("a.jsonl", lines({"body": {"messages": TURNS, "reasoning_effort": "low"}}),
        "line 1: reasoning_effort"),
    "an effort of responses": ("a.jsonl", lines({"url": "/v1/responses", "body": {
        "input": "a", "reasoning": {"effort": "low"}}}), "line 1: body: reasoning"),
    "half of Alpaca": ("a.json", json.dumps([{"instruction": "Add", "input": "1 + 1"}]),
        "entry 1: input", "instruction"),
    "half of Alpaca in a table": ("a.csv", "instruction,input\nName a color.,\nAdd,1 + 1\n",
        "line 3: input", "instruction"),
    "two system fields": ("a.jsonl", lines({"system": "x", "system_prompt": "y", "prompt": "a"}),
        "two system prompts"),
    "an answer that is begun": ("a.jsonl", lines({"messages": [
        *TURNS, {**ANSWER, "prefix": True}]}), "line 1: prefix"),
    "thoughts of an earlier turn": ("a.jsonl", lines({"messages": [
        *TURNS, {**ANSWER, "reasoning_content": "hm"}, TURNS[-1]]}), "line 1: reasoning_content"),
    "an empty system prompt": ("a.jsonl", lines({"messages": [
        {"role": "system", "content": ""}, TURNS[-1]]}), "line 1: the system message is empty"),
    "a picture beside": ("a.jsonl", lines({"prompt": "a", "image": "x.png"}), "line 1: image"),
    "an array broken late": ("a.json", '[{"prompt": "a"},\n{"prompt" "b"}]',
        "line 2: Expecting ':'"),
    "large": ("a.txt", b"x" * (64 * 2**20 + 1), "larger than 64 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_in_one_line(tmp_path, name):
    file, content, reason, *column = REFUSED[name]
    with pytest.raises(UsageError, match=reason) as caught:
        read(tmp_path, file, content, *column)
    assert str(caught.value).startswith(f"--prompts-file {tmp_path / file}: ")
    assert "\n" not in str(caught.value)


@given(st.lists(prompts, min_size=1), st.sampled_from(["a.json", "a.jsonl", "a"]), st.booleans())
@shared
def test_json_says_what_json_says(tmp_path, values, name, is_ascii):
    fields = [{"prompt": value} for value in values]
    content = "\n".join(json.dumps(each, ensure_ascii=is_ascii) for each in fields)
    if name == "a.json":
        content = json.dumps(fields, ensure_ascii=is_ascii, indent=1)
    assert [prompt for _, prompt, _ in read(tmp_path, name, content)] == values


@given(
    st.lists(st.tuples(prompts, st.text("\r\n,;\"' ab")), min_size=1),
    st.booleans(),
)
@shared
def test_tables_say_what_csv_says(tmp_path, rows, is_excel):
    written = io.StringIO(newline="")
    # With line feeds alone, csv writes a bare carriage return without quotes.
    style = {} if is_excel else {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}
    csv.writer(written, **style).writerows([("prompt", "note"), *rows])
    assert [prompt for _, prompt, _ in read(tmp_path, "a.csv", written.getvalue())] == [
        p for p, _ in rows
    ]


@given(
    st.lists(st.tuples(st.integers(0, 2**40), prompts), min_size=1, unique_by=lambda row: row[0])
)
@shared
def test_parquet_says_what_pyarrow_says(tmp_path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ids, values = zip(*rows, strict=True)
    messages = [[{"role": "user", "content": value}] for value in values]
    table = pyarrow.table(
        {"id": ids, "text": values, "messages": messages, "other": [b"\xff"] * len(ids)}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    named = [(str(i), value) for i, value in rows]
    assert [entry[:2] for entry in read(tmp_path, "a.parquet", content, "text")] == named
    # Its content tells it, on standard input too.
    chats = [(i, (Message("user", value),)) for i, value in named]
    assert [entry[:2] for entry in read(tmp_path, "a", content)] == chats


def test_parquet_that_is_none_of_prompts(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    file = tmp_path / "a.parquet"
    for column, reason in ((None, "no column 'prompt', but text, n"), ("q", "no column 'q'"),
                           ("n", "row 1: 1 is no prompt"), ("text", "row 2: None")):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            read_prompts(file, column)
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        read(tmp_path, "half.parquet", "PAR1 and so on")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt"] * 2)
    parquet.write_table(twice, file)
    with pytest.raises(UsageError, match="same name"):
        read_prompts(file)
    # A few bytes of a dictionary stand for very many of text.
    parquet.write_table(pyarrow.table({"prompt": ["x" * 2**20] * 100}), file)
    assert file.stat().st_size < 2**21
    with pytest.raises(UsageError, match="more than 64 MiB"):
        read_prompts(file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ndcheck\[parquet\]'"):
        read_prompts(file)


@given(
    st.binary(max_size=64),
    st.sampled_from(["a", "a.txt", "a.json", "a.jsonl", "a.csv", "a.parquet"]),
)
@shared
def test_anything_else_is_a_line(tmp_path, content, name):
    for start in (b"", b"PAR1", b'{"prompt": ', b"[", b"prompt\n"):
        with contextlib.suppress(UsageError):
            read(tmp_path, name, start + content)


def test_standard_input(monkeypatch):
    def feed(content):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    feed(lines({"id": "a", "messages": TURNS}).encode())
    assert [probe.probe_id for probe in make_probes([], Path("-"))] == ["a"]
    feed(b"one\ntwo\n")
    assert [probe.prompt for probe in make_probes([], Path("-"))] == ["one", "two"]
    feed(b"one\ntwo\r\n")
    assert typed_prompts(["x", "-"], None) == ["x", "one\ntwo"]
    for both in (["-", "-"], None), (["-"], Path("-")):
        with pytest.raises(UsageError, match="once only"):
            typed_prompts(*both)
    feed(b"\xff")
    with pytest.raises(UsageError, match="utf-8"):
        typed_prompts(["-"], None)
    with pytest.raises(UsageError, match="give --prompts-file"):
        make_probes(["x"], None, "text")


def test_a_data_set_of_the_hub_is_fetched_first():
    with pytest.raises(UsageError, match="hf download --repo-type dataset"):
        read_prompts(Path("hf://datasets/a/b.parquet"))


def test_a_prompt_in_other_forms():
    assert as_messages("hi") == [{"role": "user", "content": "hi"}]
    assert as_messages((SYSTEM, USER)) == TURNS
    assert as_text("hi") == "hi"
    assert as_text((SYSTEM, USER)) == "system: Be terse.\nuser: What is 6 x 7?"
    assert continued("hi", "there") == "hi there"
    assert as_messages(continued((SYSTEM, USER), "Now!"))[-1]["content"] == "What is 6 x 7? Now!"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines({"prompt": "a", "answer": "42"}, {"prompt": "b", "answer": 42})),
        ("a.jsonl", lines({"messages": TURNS, "answer": " 42 "}, {"prompt": "b", "answer": 42})),
        ("a.csv", "prompt,answer\na,42\nb,42\n"),
    ],
)
def test_right_answers_are_read(tmp_path, name, content):
    assert [entry.answer for entry in read(tmp_path, name, content)] == ["42", "42"]
    assert [probe.answer for probe in make_probes([], tmp_path / name)] == ["42", "42"]


def test_what_is_no_answer_is_none(tmp_path):
    values = [None, "", True, ["42"], {"text": "42"}]
    content = lines(*({"prompt": "a", "answer": value} for value in values))
    assert {entry.answer for entry in read(tmp_path, "a.jsonl", content)} == {None}
    # Where the prompt is in that column, it is no answer.
    assert read(tmp_path, "a.jsonl", lines({"answer": "a"}), "answer")[0] == (None, "a", None)
