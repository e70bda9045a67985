"""What a hybrid's benchmark writes when it is cut short, or an arm has no memory left."""

import pytest

from bench.models import hybrids
from bench.table import Table, rows_of


class Sampler:
    class _device:
        type = "cpu"


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "times.csv", echo=False)


@pytest.fixture
def other_table(tmp_path):
    return Table(tmp_path / "other.csv", echo=False)


def test_the_time_of_one_arm_is_kept_where_the_other_has_none(tmp_path, table, monkeypatch):
    def prefill_ms(sampler, arm, n_rows, n_tokens):
        if (arm, n_rows, n_tokens) == ("stock", 8, 2048):
            raise RuntimeError("CUDA out of memory. Tried to allocate\nmore")
        return {"invariant": 1.0, "stock": 2.0}[arm]

    monkeypatch.setattr(hybrids, "prefill_ms", prefill_ms)
    monkeypatch.setattr(hybrids, "step_ms", lambda *_: 3.0)
    hybrids.measure_times(Sampler, "a", table)
    rows = {
        (row["what"], int(row["rows"]), int(row["tokens"])): row
        for row in rows_of(tmp_path / "times.csv")
    }
    assert len(rows) == len(hybrids.BATCHES) + len(hybrids.PREFILLS)
    alone = rows["prefill", 8, 2048]
    assert (alone["invariant_ms"], alone["stock_ms"], alone["slowdown"]) == ("1.0", "", "")
    assert alone["note"] == "stock: CUDA out of memory. Tried to allocate"
    assert rows["prefill", 1, 512]["slowdown"] == "0.5"


def test_what_is_known_is_not_measured_again(tmp_path, table, other_table, monkeypatch):
    measured = []

    def arm_ms(sampler, arm, what, n_rows, n_tokens):
        measured.append((arm, what, n_rows, n_tokens))
        return 1.0, ""

    monkeypatch.setattr(hybrids, "arm_ms", arm_ms)
    hybrids.measure_times(Sampler, "a", table)
    measured.clear()
    rows = rows_of(tmp_path / "times.csv")
    for row in rows[:-1]:  # The last cell was not reached.
        other_table.add(**row)
    hybrids.measure_times(Sampler, "a", other_table)
    assert measured == [(arm, "prefill", *hybrids.PREFILLS[-1]) for arm in hybrids.ARMS]
    assert rows_of(tmp_path / "other.csv") == rows

    def never():
        raise AssertionError("nothing is missing")

    hybrids.measure_times(never, "a", other_table)
