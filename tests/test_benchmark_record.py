"""How the benchmark keeps results: CSV and JSON, row by row."""

import csv
import io
import json

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from benchmark import counters, flash, memory, operators, plots, render
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


ABOUT = {"device": "NVIDIA X", "torch": "2", "triton": "3", "commit": "c" * 40, "date": "2026-01-02"}
OPERATORS = [
    {"n": 8, "operator": render.NAIVE, "ms": 4.0, "status": "ok"},
    {
        "n": 8,
        "operator": "attention",
        "ms": 2.0,
        "ratio": 1.0,
        "status": "ok",
        "rate": 50,
        "unit": "GB/s",
        "share": 0.5,
    },
    {"n": 16, "operator": render.NAIVE, "status": "out of memory"},
    {"n": 16, "operator": "attention", "ms": 9.0, "ratio": 1.0, "status": "ok"},
]
MEMORY = [
    {"n": n, "operator": name, "pass": kind, "scores_mb": 2e6, **cell}
    for n in (8, 16)
    for name, kind, cell in (
        ("naive PyTorch", "forward", {"beyond_mb": 4.0 * n * n} if n == 8 else {"status": "out of memory"}),
        ("attention", "forward", {"beyond_mb": 1.0 * n}),
        ("attention", "backward", {"beyond_mb": 2.0 * n}),
    )
]
FLASH = [
    {"n": n, "head_dim": 16, "dtype": "bfloat16", "method": method, **cell}
    for n in (8, 16)
    for method, cell in (
        ("plain PyTorch", {"end_to_end_ms": 1.5 * n}),
        ("ours, tiled PyTorch", {"end_to_end_ms": 3.0} if n == 8 else {"status": "skipped: would take 7.0 s"}),
    )
]


@pytest.mark.parametrize(
    ("name", "rows", "lines"),
    [
        ("operators", OPERATORS, ["| attention | 2.000 | 9.000 | 2.0× | 1.00× | 50 GB/s (50%) |", "out of memory"]),
        ("memory", MEMORY, ["| naive PyTorch | out of memory | – |", "| attention | 16.0 MB | 32.0 MB |", "2.0 TB"]),
        ("flash", FLASH, ["| bfloat16, 16 | 24.000 | skipped: would take 7.0 s |"]),
    ],
    ids=["operators", "memory", "flash"],
)
def test_results_become_tables_and_pictures(name, rows, lines, monkeypatch, tmp_path):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    result = {"provenance": ABOUT, "rows": rows}
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    page = render.render(f"<!-- table: {name} -->\nold<!-- /table -->")
    for line in [*lines, "NVIDIA X, torch 2, triton 3, 2026-01-02, commit cccccccccc"]:
        assert line in page
    assert render.stale_pictures() == [name]
    plots.draw(name, result, tmp_path / f"{name}.png")
    assert render.stale_pictures() == []
    result["rows"][0]["n"] = 9
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert render.stale_pictures() == [name], "other figures need another picture"


def test_pictures_name_the_machine_and_the_date():
    assert "NVIDIA X, 2026-01-02" in plots.origin({"provenance": ABOUT})
    shown = []
    for name, rows in (("operators", OPERATORS), ("memory", MEMORY), ("flash", FLASH)):
        figure = Figure()
        plots.PICTURES[name](figure, {"provenance": ABOUT, "rows": rows})
        title = figure.get_suptitle() or figure.axes[0].get_title()
        shown.append("NVIDIA X, 2026-01-02" in title)
    assert shown == [True] * 3


def test_counters_of_a_profiler_are_kept(tmp_path, monkeypatch):
    """Nsight Compute's raw page: a warning, a header, a row of units, and then a row for each launch."""
    page = [
        "==WARNING== unmodified clocks",
        '"ID","Kernel Name","Grid Size","gpu__time_duration.sum","launch__registers_per_thread"',
        '"","","","us","register/thread"',
        '"0","void at::fill<float>(int)","(1, 1, 1)","1.5","16"',
        '"1","forward_kernel","(64, 8, 1)","1,250.5","254"',
    ]
    (tmp_path / "page.csv").write_text("\n".join(page))
    monkeypatch.setattr("sys.argv", ["counters", "--read", str(tmp_path / "page.csv"), str(tmp_path)])
    counters.main()
    (row,) = json.loads((tmp_path / "counters.json").read_text())["rows"]
    assert row == {"kernel": "forward_kernel", "grid": "(64, 8, 1)", "ms": pytest.approx(1.2505), "registers": 254}
