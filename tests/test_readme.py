"""What the documents say, held against the program; `python tests/test_readme.py` writes its part.

Help texts, columns, metrics and layers are the program's own. What a column means is written by
hand in its row and kept. Every link, and every file that a recipe names, leads somewhere.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, REFERENCE = ROOT / "README.md", ROOT / "ndcheck" / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = sorted(
    file
    for pattern in ("*.md", "ndcheck/**/*.md", "kernels/**/*.md", "results/**/README.md")
    for file in ROOT.glob(pattern)
)
MOST_LINES = 350


ALL_HELP = """
import sys
from ndcheck.cli.app import run_command_line
for command in sys.argv[1:]:
    assert run_command_line([*command.split(), "--help"]) == 0
    print(chr(0))
"""


def help_of(commands: list[str]) -> list[str]:
    """What each prints, in one process: a start for each takes long."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NDCHECK_")}
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP, *commands],
        env={**kept, "COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    texts = done.stdout.split("\0")[: len(commands)]
    return ["\n".join(map(str.rstrip, text.strip().splitlines())) for text in texts]


def commands() -> list[str]:
    from ndcheck.cli.app import app

    found = [
        c.name or c.callback.__name__.replace("_", "-")
        for c in app.registered_commands
        if not c.hidden
    ]
    for group in app.registered_groups:
        name = group.typer_instance.info.name
        found += [f"{name} {c.callback.__name__}" for c in group.typer_instance.registered_commands]
    return found


def help_texts() -> str:
    names = commands()
    return "".join(
        f"\n<details>\n<summary><code>ndcheck {command} --help</code></summary>\n\n"
        f"```text\n{text}\n```\n\n</details>\n"
        for command, text in zip(names, help_of(names), strict=True)
    )


def columns() -> str:
    """A table a CSV file: name and dtype are the program's, the meaning is kept from the text."""
    from ndcheck.reports.exports import columns

    shown = written("columns", REFERENCE.read_text(encoding="utf-8"))
    text = ""
    for name, found in (
        ("samples", columns.SAMPLE_COLUMNS),
        ("completions", columns.COMPLETION_COLUMNS),
        ("loads", columns.LOAD_COLUMNS),
        ("properties", columns.PROPERTY_COLUMNS),
        ("summary", columns.SUMMARY_COLUMNS),
    ):
        section = shown.partition(f"### {name}.csv\n")[2].partition("\n### ")[0]
        meanings = dict(re.findall(r"^\| `(\w+)` \| \w+ \| (.*) \|$", section, re.MULTILINE))
        text += f"\n### {name}.csv\n\n| column | dtype | what it holds |\n|---|---|---|\n"
        for column, dtype in found.items():
            kind = "text" if dtype == "object" else dtype
            text += f"| `{column}` | {kind} | {meanings.get(column, '')} |\n"
    return text + "\n"


def metrics() -> str:
    """Published names, as `--json` has them, and the docstrings of `Metrics`."""
    from ndcheck.reports.document import METRIC_NAMES

    tree = ast.parse((ROOT / "ndcheck" / "analysis" / "summary.py").read_text(encoding="utf-8"))
    (found,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Metrics"
    )
    text = "\n| metric | what it is |\n|---|---|\n"
    for field, said in zip(found.body, found.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(said, ast.Expr):
            meaning = " ".join(said.value.value.split()).replace("|", r"\|")
            text += f"| `{METRIC_NAMES[field.target.id]}` | {meaning} |\n"
    return text + "\n"


def layers() -> str:
    """Those of import-linter, from top to bottom."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    found = ["\n".join(c["layers"]) for c in contracts if c["type"] == "layers"]
    return "```text\n" + "\n\n".join(found) + "\n```\n"


GENERATED = {
    "columns": (REFERENCE, columns),
    "metrics": (REFERENCE, metrics),
    "help": (REFERENCE, help_texts),
    "layers": (CONTRIBUTING, layers),
}


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by tests/test_readme.py -->\n", f"<!-- end of {name} -->"


def written(name: str, text: str) -> str:
    start, end = markers(name)
    assert text.count(start) == text.count(end) == 1, name
    return text.partition(start)[2].partition(end)[0]


@pytest.mark.parametrize("name", GENERATED)
def test_the_documents_show_what_the_program_has(name):
    file, generate = GENERATED[name]
    shown = written(name, file.read_text(encoding="utf-8"))
    assert len(shown.splitlines()) > 5
    assert shown == generate(), "run: python tests/test_readme.py"


def test_every_column_is_explained():
    shown = written("columns", REFERENCE.read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| (.*) \|$", shown, re.MULTILINE)
    assert len(rows) > 50
    assert not [column for column, meaning in rows if not meaning]


def test_every_command_is_in_the_table():
    text = REFERENCE.read_text(encoding="utf-8")
    for command in commands():
        assert f"| `ndcheck {command}" in text, command


def test_the_exit_codes_are_those_of_the_program():
    from ndcheck.cli.app import app
    from ndcheck.errors import NdcheckError, UsageError

    table = REFERENCE.read_text(encoding="utf-8").partition("\n## Exit codes\n")[2]
    shown = re.findall(r"^\| `(\d+)` \|", table.partition("\n## ")[0], re.MULTILINE)
    assert {NdcheckError.exit_code, UsageError.exit_code} <= set(map(int, shown))
    assert shown == re.findall(r"\d+", app.info.epilog)


def test_the_commands_of_the_guide_are_understood(tmp_path, warm_python):
    text = README.read_text(encoding="utf-8")
    guide = text.partition("## Why are my outputs nondeterministic?")[2].partition("\n## ")[0]
    found = re.findall(r"`ndcheck (run [^`]*)`", guide)
    assert len(found) >= 4
    for command in found:
        arguments = [*shlex.split(command), "--model", "scripted:clean", "--dry-run"]
        done = subprocess.run(
            [warm_python(), "-m", "ndcheck", *arguments],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)


def test_the_readme_stays_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def prose(text: str) -> str:
    """Without code blocks and comments, where links and headings are none."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub forms them; a heading that comes again gets a number."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} (.*)$", prose(text), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        n = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{n}" if n else slug)
    return set(found)


def broken_links(file: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path).resolve() if path else file
        is_known = place.exists() and place.is_relative_to(ROOT)
        if is_known and anchor:
            is_known = anchor in anchors(text if place == file else place.read_text("utf-8"))
        if not is_known:
            yield target


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    assert not list(broken_links(file, file.read_text(encoding="utf-8")))


def test_a_link_that_leads_nowhere_is_seen():
    text = "# One\n## One\n[a](#one-1) [b](#two) [c](gone.md) [d](pyproject.toml) [e](../x)"
    assert list(broken_links(README, text)) == ["#two", "gone.md", "../x"]
    assert list(broken_links(README, "[a](ndcheck/README.md#nowhere)")) == [
        "ndcheck/README.md#nowhere"
    ]
    assert {README, REFERENCE, CONTRIBUTING} <= set(DOCUMENTS)


def named_files(text: str) -> list[str]:
    """Files and folders in code quotes; a part in capitals (VERB.py) stands for a name."""
    quoted = re.findall(r"`([\w./-]+/[\w./-]*)`", text)
    return [path for path in quoted if not re.search(r"\b[A-Z]{2,}\b(?!\.md)", path)]


def test_the_files_of_the_recipes_exist():
    recipes = CONTRIBUTING.read_text(encoding="utf-8").partition("\n## Recipes\n")[2]
    for recipe in re.split(r"^### ", recipes, flags=re.MULTILINE)[1:]:
        title = recipe.splitlines()[0]
        files = named_files(recipe)
        assert len(files) >= 3, title
        assert not [path for path in files if not (ROOT / path).exists()], title


def test_a_file_that_is_gone_is_seen():
    text = "`ndcheck/gone.py`, `ndcheck/samplers/NAME/`, `ndcheck/README.md`, `a / b`, `--option`"
    assert named_files(text) == ["ndcheck/gone.py", "ndcheck/README.md"]


if __name__ == "__main__":
    for name, (file, generate) in GENERATED.items():
        start, end = markers(name)
        before, _, rest = file.read_text(encoding="utf-8").partition(start)
        after = rest.partition(end)[2]
        file.write_text(before + start + generate() + end + after, encoding="utf-8")
