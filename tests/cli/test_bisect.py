"""Which change flips a verdict: the search, lock files, and real environments."""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.errors import UsageError
from ndcheck.stack.bisection import bisect
from ndcheck.stack.locks import Change, changes, read_lock


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_the_one_that_matters_is_found_in_as_many_steps_as_halving_takes(case):
    n, guilty = case
    tested = []

    def test(applied):
        tested.append(applied)
        return "bad" if guilty in applied else "good"

    found = bisect(n, test)
    assert (found.suspects, found.alone) == ((guilty,), "bad")
    assert len(tested) <= 3 + math.ceil(math.log2(n))


@given(
    st.integers(2, 30).flatmap(
        lambda n: st.tuples(
            st.just(n), st.integers(0, n - 1), st.sets(st.integers(1, n - 1), max_size=n)
        )
    )
)
def test_what_cannot_be_tested_is_stepped_around_and_never_acquits(case):
    n, guilty, broken = case

    def test(applied):
        if len(applied) in broken and applied == frozenset(range(len(applied))):
            return "unknown"
        return "bad" if guilty in applied else "good"

    suspects = bisect(n, test).suspects
    assert guilty in suspects
    between = set(range(suspects[0] + 1, suspects[-1] + 1))
    assert between <= broken


def test_two_that_only_matter_together_are_said_to():
    found = bisect(4, lambda applied: "bad" if {1, 3} <= applied else "good")
    assert (found.suspects, found.alone) == ((3,), "good")


@pytest.mark.parametrize(
    ("always", "problem"), [("bad", "the good lock is bad"), ("good", "the bad lock is good"),
                            ("unknown", "the good lock is unknown")]
)  # fmt: skip
def test_locks_that_do_not_differ_in_the_verdict_name_nobody(always, problem):
    found = bisect(3, lambda applied: always)
    assert found.suspects == ()
    assert found.problem.startswith(problem)


def test_lock_files_are_read_as_pip_reads_them(tmp_path):
    file = tmp_path / "lock.txt"
    file.write_text(
        "# made by hand\n--find-links wheels\nA_b==1.0 \\\n    --hash=sha256:00\n"
        "c==2 ; python_version < '3'\nd[extra]==3 # why\ne @ file:///e-1.whl\n"
    )
    lock = read_lock(file)
    assert lock.packages == {"a-b": "A_b==1.0", "d": "d[extra]==3", "e": "e @ file:///e-1.whl"}
    assert lock.options == ("--find-links", "wheels")
    other = tmp_path / "other.txt"
    other.write_text("a-b==1.0\nd[extra]==4\nf==1\n")
    found = {change.name: (change.good, change.bad) for change in changes(lock, read_lock(other))}
    assert found["d"] == ("d[extra]==3", "d[extra]==4")
    assert found["e"] == ("e @ file:///e-1.whl", None)
    assert found["f"] == (None, "f==1")
    assert str(Change("f", None, "f==1")) == "absent -> f==1"


def test_the_password_of_an_address_is_in_nothing_that_is_said(tmp_path):
    place = "https://me:half@s3cret@host.example"
    change = Change("a", f"a @ {place}/a-1.whl", None)
    assert str(change) == "a @ https://host.example/a-1.whl -> absent"
    assert change.shown.good == "a @ https://host.example/a-1.whl"
    for line in (f"--trusted-host {place}", f"a b @ {place}", f"a>1 # {place}\n{place}"):
        (tmp_path / "lock.txt").write_text(line)
        with pytest.raises(UsageError) as caught:
            read_lock(tmp_path / "lock.txt")
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a>=1\n", "not pinned"),
        ("a==1.*\n", "not pinned"),
        ("a\n", "not pinned"),
        ("a==1\nA==2\n", "there twice"),
        ("-e ./a\n", "give packages"),
        ("a b\n", "no requirement"),
        ("# nothing\n", "pins no package"),
    ],
)
def test_what_is_no_lock_is_refused_in_one_line(tmp_path, text, reason):
    file = tmp_path / "lock.txt"
    file.write_text(text)
    with pytest.raises(UsageError, match=reason) as caught:
        read_lock(file)
    assert "\n" not in str(caught.value)


def test_a_lock_of_another_tool_is_told_how_to_become_one(tmp_path):
    with pytest.raises(UsageError, match="uv export"):
        read_lock(tmp_path / "uv.lock")


def wheel(folder, name, version, code):
    """A package of one module, as pip installs it without a network."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", code)
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


CHECK = """
import sys
import alpha, beta, gamma, delta
total = delta.total([1e16, 1.0, -1e16])  # The 1 is lost, unless it comes last.
print(total)
sys.exit(total != 0.0)
"""


def test_a_package_that_changes_bits_is_named_in_real_environments(ndcheck, tmp_path):
    """Of five that differ one adds in another order; one is new and one is gone."""
    ndcheck = functools.partial(ndcheck, python=sys.executable)
    adding = "def total(x):\n    t = 0.0\n    for v in {}: t += v\n    return t\n"
    orders = {1: adding.format("x"), 2: adding.format("sorted(x, reverse=True)[::2] + [1.0]")}
    for version in (1, 2):
        names = ["alpha", "beta", "gamma", "delta", "late" if version == 2 else "gone"]
        lines = [
            f"{name} @ {wheel(tmp_path, name, version, orders[version]).as_uri()}\n"
            for name in names
        ]
        (tmp_path / f"lock{version}.txt").write_text("".join(lines))
    (tmp_path / "check.py").write_text(CHECK)
    options = ("bisect", "--good", "lock1.txt", "--bad", "lock2.txt", "--", "python", "check.py")
    done = ndcheck(*options)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("delta @ file:")
    assert first.endswith("flips the verdict")
    assert second.startswith("the good lock with this one change fails too; ")
    assert second.endswith("6 packages changed")
    # Again: nothing is tested anew, and another command is refused.
    state = (tmp_path / "ndcheck-bisect" / "bisect.json").read_bytes()
    kept = state + (tmp_path / "ndcheck-bisect" / "installed.json").read_bytes()
    assert not any(word in kept for word in (b"check.py", b"file:"))  # They may hold secrets.
    logs = len(list((tmp_path / "ndcheck-bisect" / "logs").iterdir()))
    assert ndcheck(*options).stdout == done.stdout
    assert (tmp_path / "ndcheck-bisect" / "bisect.json").read_bytes() == state
    assert len(list((tmp_path / "ndcheck-bisect" / "logs").iterdir())) == logs
    other = ndcheck(*options[:-1], "other.py")
    assert (other.returncode, "another command" in other.stderr) == (2, True)
    # What crashes is neither good nor bad. To make an environment takes the longest of all.
    made, again = tmp_path / "ndcheck-bisect", tmp_path / "broken"
    shutil.copytree(made / "environment", again / "environment", symlinks=True)
    shutil.copy(made / "installed.json", again)
    broken = ndcheck(*options[:5], "--out", "broken", "--json", "--", "python", "missing.py")
    assert broken.returncode == 3, broken.stderr
    assert "the good lock is unknown" in json.loads(broken.stdout)["problem"]
