"""A table's rows are in its file at once, and nothing is left open."""

import csv

from bench.table import Table


def test_rows_are_in_the_file_as_they_come(tmp_path, capsys):
    path = tmp_path / "times.csv"
    path.write_text("of an earlier run")
    table = Table(path)
    assert path.read_text() == ""
    for count, us in ((1, 1.23456), (2, 7.0)):
        table.add(shape="a, b", us=us)
        with path.open(newline="") as file:
            assert len(list(csv.DictReader(file))) == count
    with path.open(newline="") as file:
        assert [*csv.reader(file)] == [["shape", "us"], ["a, b", "1.2346"], ["a, b", "7.0"]]
    assert table.rows == [{"shape": "a, b", "us": 1.23456}, {"shape": "a, b", "us": 7.0}]
    assert capsys.readouterr().out == "a, b 1.2346\na, b 7.0\n"
