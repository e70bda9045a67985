"""The text the embedded model learns from: what ships with CPython.

A corpus is a function of a standard-library directory and nothing else: the same directory
gives the same documents, in the same order, with the same ones held out.
"""

import ast
import hashlib
import tokenize
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ndcheck.errors import UsageError

EXCLUDED_FOLDERS = frozenset(
    {
        "site-packages",  # not CPython
        "test", "tests", "idle_test",  # assertions, not prose
        "encodings",  # generated character tables
        "pydoc_data",  # its texts are read as topics
        "__pycache__",
    }
)  # fmt: skip
TABLE_LINES = 30
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and whether it is kept away from training."""

    name: str
    text: str
    held_out: bool


def read_corpus(stdlib: Path) -> list[Document]:
    """Every document of a standard-library directory, in a fixed order, without duplicates."""
    if not (stdlib / "pydoc_data" / "topics.py").is_file():
        raise UsageError(f"{stdlib} is no standard library: it has no pydoc_data/topics.py")
    documents: dict[str, Document] = {}
    for group, name, text in (*read_topics(stdlib), *read_modules(stdlib)):
        if text.strip():
            documents.setdefault(text, Document(name, text, is_held_out(group)))
    return list(documents.values())


def is_held_out(group: str) -> bool:
    """Chooses whole files: a module and the prose taken from it are on the same side."""
    return hashlib.sha256(group.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def corpus_sha256(documents: list[Document]) -> str:
    """Identifies a corpus: names, texts and the held-out choice."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.held_out}\0{document.text}\0".encode())
    return digest.hexdigest()


def read_topics(stdlib: Path) -> Iterator[tuple[str, str, str]]:
    """The language reference as `help()` shows it: one document a topic."""
    tree, _ = parse(stdlib / "pydoc_data" / "topics.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node).items()):
                yield f"topics/{topic}", f"topics/{topic}", text


def read_modules(stdlib: Path) -> Iterator[tuple[str, str, str]]:
    """Each module twice: its source, and its docstrings as plain prose.

    Sources are mostly code. The second reading gives a small model enough prose to write some.
    """
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        if not is_excluded(name):
            tree, source = parse(path)
            yield name, name, drop_tables(tree, source)
            yield name, f"{name}:docstrings", join_docstrings(tree)


def is_excluded(name: str) -> bool:
    """Whether a module's path says it is a test, a table, or made for one platform."""
    *folders, file = name.split("/")
    return (
        not EXCLUDED_FOLDERS.isdisjoint(folders)
        or name.startswith("config-")
        or file.startswith(("_sysconfigdata", "test_"))
    )


def parse(path: Path) -> tuple[ast.Module, str]:
    """A module's syntax tree and source."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in sources of another version
            source = file.read()
            return ast.parse(source), source
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read by this Python: {error}") from error


def walk_statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, but for expressions: they are most of a tree, and hold no statement."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        waiting.extend(
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        )


def drop_tables(tree: ast.Module, source: str) -> str:
    """The source without its long literal tables: names and numbers that teach no language."""
    lines = source.splitlines(keepends=True)
    tables = {
        (node.lineno, node.end_lineno)
        for node in walk_statements(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Dict | ast.List | ast.Set | ast.Tuple)
        and (node.end_lineno or 0) - node.lineno >= TABLE_LINES
        and not any(isinstance(child, ast.Call) for child in ast.walk(node.value))
    }
    for first, last in sorted(tables, reverse=True):
        del lines[first - 1 : last]
    return "".join(lines)


def join_docstrings(tree: ast.Module) -> str:
    """A module's docstrings in source order, each once, under the name of what it describes."""
    described = [
        node
        for node in walk_statements(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    paragraphs: dict[str, str] = {}
    for node in sorted(described, key=lambda node: getattr(node, "lineno", 0)):
        docstring = ast.get_docstring(node)
        if docstring:
            heading = "" if isinstance(node, ast.Module) else f"{node.name}\n\n"
            paragraphs.setdefault(docstring, f"{heading}{docstring}\n\n\n")
    return "".join(paragraphs.values())
