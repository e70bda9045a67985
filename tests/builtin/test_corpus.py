"""The corpus is a function of a standard-library directory, without what teaches nothing."""

import pytest

from ndcheck.builtin.corpus import (
    Document,
    corpus_sha256,
    drop_tables,
    is_excluded,
    join_docstrings,
    parse,
    read_corpus,
)
from ndcheck.builtin.options import RUNNING_STDLIB
from ndcheck.errors import UsageError

TOPICS = "topics = {'raise': 'The raise statement.', 'del': 'Deletion is recursive.'}\n"
MODULE = '"""Reads things."""\n\ndef read():\n    """Return a thing."""\n'


@pytest.fixture
def stdlib(tmp_path):
    files = {
        "pydoc_data/topics.py": TOPICS,
        "things.py": MODULE,
        "copied.py": MODULE,
        "test/test_things.py": "assert 1\n",
        "json/tests/case.py": "assert 2\n",
        "encodings/cp437.py": "table = 1\n",
        "site-packages/other.py": "import other\n",
        "_sysconfigdata__linux.py": "build_time_vars = 1\n",
        "config-3.11-linux/python-config.py": "import config\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_documents_are_topics_sources_and_docstrings_without_duplicates(stdlib):
    documents = read_corpus(stdlib)
    assert {document.name: document.text for document in documents} == {
        "topics/del": "Deletion is recursive.",
        "topics/raise": "The raise statement.",
        "copied.py": MODULE,
        "copied.py:docstrings": "Reads things.\n\n\nread\n\nReturn a thing.\n\n\n",
    }


def test_the_corpus_is_the_same_every_time(stdlib):
    assert corpus_sha256(read_corpus(stdlib)) == corpus_sha256(read_corpus(stdlib))


def test_the_digest_sees_text_and_the_held_out_choice():
    documents = [
        Document("a", "text", False),
        Document("a", "text", True),
        Document("a", "t", True),
    ]
    assert len({corpus_sha256([document]) for document in documents}) == 3


def test_the_running_standard_library_keeps_prose_and_drops_tests_and_tables():
    names = {path.name for path in RUNNING_STDLIB.iterdir()}
    assert "json" in names
    assert not is_excluded("json/decoder.py")
    assert is_excluded("site-packages/torch/nn.py")
    assert is_excluded("unittest/test/testmock/support.py")
    assert is_excluded("idlelib/idle_test/htest.py")


def test_long_literal_tables_are_cut_and_calls_are_kept(tmp_path):
    path = tmp_path / "tables.py"
    rows = "".join(f"    {number},\n" for number in range(40))
    kept = f"opcodes = [\n{'    opcode(doc=1),' * 40}\n]\n"
    path.write_text(f"before = 1\ntable = [\n{rows}]\nafter = 2\n{kept}")
    assert drop_tables(*parse(path)) == f"before = 1\nafter = 2\n{kept}"


def test_docstrings_come_in_source_order_and_once(tmp_path):
    path = tmp_path / "order.py"
    path.write_text(
        'class A:\n    def f(self):\n        """First."""\n'
        'def g():\n    """Second."""\ndef h():\n    """First."""\n'
    )
    tree, _ = parse(path)
    assert join_docstrings(tree) == "f\n\nFirst.\n\n\ng\n\nSecond.\n\n\n"


def test_a_directory_without_topics_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no pydoc_data/topics\.py"):
        read_corpus(tmp_path)


def test_a_module_that_cannot_be_parsed_is_named(stdlib):
    (stdlib / "things.py").write_text("def (:\n")
    with pytest.raises(UsageError, match=r"things\.py cannot be read"):
        read_corpus(stdlib)
