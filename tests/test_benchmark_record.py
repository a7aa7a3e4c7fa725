"""How the benchmark keeps results: CSV and JSON, row by row."""

import csv
import io
import json

import pytest
from rich.console import Console

from benchmark import flash, memory, operators
from benchmark.record import ORIGIN, Record, TimeLimit, keep, within

COLUMNS = ("n", "operator", "ms", "status")
ROWS = [{"n": 8, "operator": "a", "ms": 0.5, "status": "ok"}, {"n": 8, "operator": "b", "status": "out of memory"}]


def quiet():
    return Console(file=io.StringIO())


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_the_columns_and_the_origin_of_every_row(tmp_path):
    record = Record(tmp_path / "new" / "x.csv", COLUMNS)
    assert keep(ROWS, record, str, quiet())
    lines = read_csv(tmp_path / "new" / "x.csv")
    assert list(lines[0]) == [*COLUMNS, *ORIGIN]
    assert [line["status"] for line in lines] == ["ok", "out of memory"]
    assert (lines[0]["ms"], lines[1]["ms"]) == ("0.5", "")
    assert all(line["device"] and line["date"] for line in lines)
    assert json.loads((tmp_path / "new" / "x.json").read_text())["rows"] == ROWS


@pytest.mark.parametrize("module", [operators, flash, memory], ids=lambda module: module.__name__.split(".")[-1])
def test_columns_of_every_command(module):
    assert len(set(module.COLUMNS)) == len(module.COLUMNS)
    assert {"n", "status", "dtype", "beyond_mb"} <= set(module.COLUMNS)
    assert not set(module.COLUMNS) & set(ORIGIN)


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    def rows():
        yield ROWS[0]
        raise KeyboardInterrupt

    record = Record(tmp_path / "x", COLUMNS)
    assert not keep(rows(), record, str, quiet())
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == ROWS[:1]
    assert len(read_csv(tmp_path / "x.csv")) == 1


def test_resume_takes_rows_over(tmp_path):
    first = Record(tmp_path / "x", COLUMNS)
    keep(ROWS, first, str, quiet())
    second = Record(tmp_path / "x", COLUMNS)
    second.resume()
    assert [{name: row[name] for name in COLUMNS if name in row} for row in second.rows] == ROWS
    second.add({"n": 16, "operator": "a", "status": "ok"})
    assert len(read_csv(tmp_path / "x.csv")) == 3


def test_resume_refuses_other_columns(tmp_path):
    keep(ROWS, Record(tmp_path / "x", COLUMNS), str, quiet())
    with pytest.raises(ValueError, match="other columns"):
        Record(tmp_path / "x", (*COLUMNS, "more")).resume()


def test_nothing_new_begins_after_the_time_limit():
    said, limit = [], TimeLimit(100)
    cells = within(limit, "abc", said.append)
    assert next(cells) == "a"
    limit.start -= 200
    assert list(cells) == []
    assert "2 of 3 not begun" in said[0]
    assert list(within(TimeLimit(0), "abc", said.append)) == list("abc")
