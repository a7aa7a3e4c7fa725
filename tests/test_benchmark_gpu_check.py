"""The run on a CUDA machine, with commands that are only played: counts, outcomes, and what is said of the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark import gpu_check, record

TESTS = """
import pytest

def test_right(): pass
def test_wrong(): assert {right}
@pytest.mark.skip(reason="no such machine")
def test_elsewhere(): pass
"""
ALL_PASS = {"suite": (0, ""), "fuzz": (0, ""), "memcheck": (0, "")}


class Commands:
    """Plays the commands that a run starts: exit code and output by check, and pytest's report."""

    def __init__(self, report='<testsuite><testcase name="a"/></testsuite>', cases=9, disagreements=(), **played):
        self.report, self.played, self.commands = report, ALL_PASS | played, []
        self.found = {"cases": cases, "disagreements": disagreements}

    def __call__(self, command, log):
        self.commands.append(command)
        code, said = self.played[
            "memcheck" if "compute-sanitizer" in command else "fuzz" if "fuzz" in command else "suite"
        ]
        log.write_text(said)
        for argument in command:
            if argument.startswith("--junitxml=") and self.report:
                Path(argument.partition("=")[2]).write_text(self.report)
        if "fuzz" in command:
            (Path(command[command.index("--out") + 1]) / "fuzz.json").write_text(json.dumps(self.found))
        return code


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Run the checks with commands that are played; return exit code, rows by check and what was printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "provenance", dict)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("COLUMNS", "200")

    def run(commands, *arguments):
        code = gpu_check.main(["--out", str(tmp_path), "--workers", "2", *arguments], commands)
        rows = {row["check"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
        return code, rows, capsys.readouterr().out

    return run


def test_everything_passes(check):
    commands = Commands()
    code, rows, said = check(commands, "--seconds", "5")
    assert code == 0
    assert {row["outcome"] for row in rows.values()} == {"passed"}
    assert [rows[name].get("passed") for name in gpu_check.CHECKS] == [1, 9, 3]
    assert commands.commands[1][3:10] == ["fuzz", "--device", "cuda", "--cases", "0", "--seconds", "5"]
    assert [command[-1] for command in commands.commands[2:]] == ["2", "3", "4"]
    assert "notebooks" in said


@pytest.mark.parametrize(
    ("played", "bad"),
    [
        ({"suite": (3, "internal error")}, "suite"),
        ({"suite": (1, "")}, "suite"),
        ({"report": ""}, "suite"),
        ({"report": '<testsuite><testcase name="a"><skipped message="b"/></testcase></testsuite>'}, "suite"),
        ({"report": '<testsuite><testcase/><testcase><error message="b"/></testcase></testsuite>'}, "suite"),
        ({"fuzz": (1, "a case failed")}, "fuzz"),
        ({"disagreements": [{"case": 3}]}, "fuzz"),
        ({"cases": 0}, "fuzz"),
        ({"memcheck": (1, "ERROR SUMMARY: 1 error")}, "memcheck"),
    ],
    ids=["crash", "failure", "no report", "skips alone", "error", "fuzz", "disagreement", "no case", "memcheck"],
)
def test_one_failure_fails_the_run(check, played, bad):
    code, rows, _ = check(Commands(**played))
    assert code == 1
    assert [name for name, row in rows.items() if row["outcome"] != "passed"] == [bad]
    assert rows[bad]["outcome"] == "failed"
    assert ".log" in rows[bad]["note"]


def test_a_missing_fuzzer_fails_the_run(check):
    code, rows, _ = check(Commands(fuzz=(2, "Error: No such command 'fuzz'.")))
    assert code == 1
    assert rows["fuzz"]["outcome"] == "missing"


def test_what_is_not_run_is_said_and_counts_neither_way(check, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_check, "why_not_interpreted", lambda: "numpy is too new")
    code, rows, said = check(Commands(), "--only", "suite", "memcheck")
    assert code == 0
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "suite": "passed",
        "fuzz": "not run",
        "memcheck": "not run",
    }
    for reason in (
        "not asked for",
        "compute-sanitizer is not installed",
        "numpy is too new",
        "packages of other versions",
    ):
        assert reason in said


def test_without_a_gpu_nothing_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    commands = Commands()
    assert gpu_check.main(["--out", str(tmp_path)], commands) == 2
    assert commands.commands == []
    assert "no" in capsys.readouterr().out


@pytest.mark.parametrize("has_xdist", [True, False], ids=["xdist", "file by file"])
def test_counts_of_real_tests(has_xdist, tmp_path):
    if has_xdist:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    tests = {"test_good.py": True, "test_bad.py": False}
    for name, right in tests.items():
        (tmp_path / name).write_text(TESTS.format(right=right))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  thorough\n")
    options = gpu_check.Options(tmp_path, 2, 1, [], [str(tmp_path / name) for name in tests])

    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin" if has_xdist else ""}

    def run(command, log):
        with log.open("wb") as file:
            return subprocess.run(
                command, cwd=tmp_path, env=os.environ | plugins, stdout=file, stderr=subprocess.STDOUT
            ).returncode

    row = gpu_check.suite(options, run, has_xdist)
    assert (row["outcome"], row["passed"], row["failed"], row["skipped"]) == ("failed", 3, 1, 2)
    assert row["reasons"] == {"no such machine": 2}
    assert "test_wrong" in (tmp_path / "suite.log").read_text()


def test_commands_run_compiled_and_are_logged(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ask = "import os, sys; print(os.environ.get('TRITON_INTERPRET'), file=sys.stderr); sys.exit(7)"
    assert gpu_check.run_logged([sys.executable, "-c", ask], tmp_path / "log") == 7
    assert (tmp_path / "log").read_text() == "None\n"
