"""The exercises as shipped: skeletons in step with the reference, every task described, graded, and still to be done.

What a learner has edited, committed or not, is left out and named: that is told by the digests of what was shipped.
Test ids carry a stage's bare number, so that selecting the tests of a stage by name does not select these.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from course import shipped
from course.cli import app
from course.tasks import ROOT, all_tasks, find_task, render_task

TASKS = all_tasks()
STAGES = {task.id.split(".")[0]: ROOT / task.folder for task in TASKS}
SKELETONS = {f"{n}-{file.stem}": file for n, folder in STAGES.items() for file in sorted(folder.glob("*.py"))}
GIVEN = {"1": {"philox"}}  # modules of a stage's reference that its exercises may import: no task lies there
# Modules that an exercise package finds in its stage's folder, and runs as its own: they import the learner's files.
FOUND_IN_STAGE = {
    "1": {"dense", "philox", "second_pass", "setting", "visibility"},
    "2": {
        "describe",
        "hook",
        "interpreter",
        "launch",
        "launcher",
        "quick_interpreter",
        "replay",
        "split_kv",
        "tile_config",
    },
    "3": {"column_sums", "launch", "linear_sums", "tile_config"},
    "4": {"differentiable", "gradients", "hooks", "launch", "linear_grads", "operators", "statistics", "tile_config"},
}
SEARCHES_STAGE = {"from pathlib import Path", "__path__.append(str(Path(__file__).parent.parent))"}
PLACEHOLDER = re.compile(
    r"""\s*(?:raise NotImplementedError\(|tl\.static_assert\(False, )"Task (?P<id>\d+\.\d+): [^"]+"\)"""
)
PYTEST = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
ENVIRONMENT["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"


EDITED = shipped.edited()
GRADE = "grade with --impl exercise"


def unless_edited(*names):
    """Skip where any of these files is not the one that was shipped."""
    found = [name for name in names if name in EDITED]
    return pytest.mark.skipif(bool(found), reason=f"edited, {GRADE}: {shipped.listed(found)}")


def files_of(number):
    """Return the names of a stage's exercise files: those that are here, and those that were removed."""
    folder = STAGES[number].relative_to(ROOT).as_posix()
    return sorted({name for name in (*shipped.exercise_files(), *EDITED) if name.startswith(f"{folder}/")})


each_stage = pytest.mark.parametrize("number", sorted(STAGES))
each_stage_as_shipped = pytest.mark.parametrize(
    "number", [pytest.param(number, marks=unless_edited(*files_of(number)), id=number) for number in sorted(STAGES)]
)
each_skeleton = pytest.mark.parametrize(
    "skeleton",
    [
        pytest.param(file, marks=unless_edited(file.relative_to(ROOT).as_posix()), id=name)
        for name, file in SKELETONS.items()
    ],
)
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)


def reference_of(skeleton):
    return skeleton.parent.parent / skeleton.name


def definitions(path):
    """Return {qualified name: node} of every class and function in a file, the module itself under ''."""
    found = {"": ast.parse(path.read_text())}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[prefix + child.name] = child
                walk(child, f"{prefix}{child.name}.")

    walk(found[""], "")
    return found


def interface(node):
    """Return what a caller sees of a class or function: signature, decorators and docstring."""
    decorators = [ast.unparse(x) for x in getattr(node, "decorator_list", [])]
    bases = [ast.unparse(x) for x in getattr(node, "bases", [])]
    signature = [ast.unparse(x) for x in (getattr(node, "args", None), getattr(node, "returns", None)) if x]
    return type(node).__name__, decorators, bases, signature, ast.get_docstring(node)


def placeholders(path):
    """Yield (task id, qualified name of the innermost definition around it) of every placeholder in a file."""
    spans = {name: (node.lineno, node.end_lineno) for name, node in definitions(path).items() if name}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if match := PLACEHOLDER.fullmatch(line):
            yield match["id"], max((name for name, (a, b) in spans.items() if a <= number <= b), key=spans.get)


def test_exercises_are_those_that_were_shipped():
    if EDITED and not os.environ.get("CI"):
        pytest.skip(f"edited, {GRADE}: {shipped.listed(EDITED)}")
    assert not EDITED, f"out of step with course/shipped.json; if they shall be shipped so, run {shipped.COMMAND}"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Copy the exercises, with digests of these copies, to where they may be written; return them by name."""
    for name, file in shipped.exercise_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / name)
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    (tmp_path / shipped.DIGESTS).parent.mkdir()
    (tmp_path / shipped.DIGESTS).write_text(json.dumps(shipped.digests()))
    return shipped.exercise_files()


def test_edits_are_told_without_git(copied):
    (changed, first), (removed, second), (_, third), *_ = copied.items()
    assert shipped.edited() == []
    first.write_bytes(first.read_bytes().replace(b"\n", b"\r\n"))
    assert shipped.edited() == [], "a checkout on Windows is no edit"
    first.write_text(first.read_text() + "# a note\n")
    second.unlink()
    added = third.with_name("helpers.py")
    added.touch()
    assert shipped.edited() == sorted([changed, removed, added.relative_to(shipped.ROOT).as_posix()])


def test_digests_are_checked_and_renewed(copied, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "solved", list)
    shipped.main(["--check"])
    file = next(iter(copied.values()))
    file.write_text(file.read_text() + "# a new skeleton\n")
    with pytest.raises(SystemExit, match=rf"{file.name}.*\n.*{shipped.COMMAND}"):
        shipped.main(["--check"])
    shipped.main([])
    shipped.main(["--check"])
    assert capsys.readouterr().out.endswith("every exercise is as shipped\n")


def test_solutions_are_not_recorded_as_shipped(copied):
    task = TASKS[0]
    copied[task.path].write_text(copied[task.path].read_text().replace(f"Task {task.id}: ", "Done: "))
    before = (shipped.ROOT / shipped.DIGESTS).read_text()
    with pytest.raises(SystemExit, match=f" {task.id}"):
        shipped.main([])
    assert (shipped.ROOT / shipped.DIGESTS).read_text() == before


@each_skeleton
def test_skeleton_is_the_reference_minus_lines(skeleton):
    assert reference_of(skeleton).exists(), f"no reference file is named {skeleton.name}"
    remaining = iter(reference_of(skeleton).read_text().splitlines())
    for number, line in enumerate(skeleton.read_text().splitlines(), 1):
        if not line.strip() or PLACEHOLDER.fullmatch(line):
            continue
        if skeleton.name == "__init__.py" and (line in SEARCHES_STAGE or line.startswith("#")):
            continue
        assert line in remaining, f"{skeleton.name}:{number} is not in the reference, or not in this order"


@each_skeleton
def test_skeleton_has_the_interface_of_the_reference(skeleton):
    actual, expected = (definitions(path) for path in (skeleton, reference_of(skeleton)))
    assert list(actual) == list(expected)
    for name in expected:
        assert interface(actual[name]) == interface(expected[name]), name or "the module's docstring"


@each_skeleton
def test_skeleton_imports_no_solution(skeleton):
    package = skeleton.parent.parent.name
    number = next(number for number, folder in STAGES.items() if folder == skeleton.parent)
    for node in ast.walk(ast.parse(skeleton.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} reaches out of the exercise folder"
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in set(names) - FOUND_IN_STAGE.get(number, set()):
                assert (skeleton.parent / f"{name}.py").exists(), f"line {node.lineno}: no exercise file {name}.py"
            continue
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top, *rest = module.split(".")
            if match := re.match(r"stage(\d+)_", top):
                own_and_given = top == package and rest and rest[0] in GIVEN.get(number, ())
                assert own_and_given or int(match[1]) < int(number), f"line {node.lineno} imports {module}"
            else:
                assert top not in ("flash_attention_with_scores", "course", "benchmark", "tests"), module


@each_stage
def test_only_given_modules_are_found_in_the_stage(number):
    folder = STAGES[number]
    init = folder / "__init__.py"
    if not init.exists() or not SEARCHES_STAGE & {*init.read_text().splitlines()}:
        assert number not in FOUND_IN_STAGE
        return
    own = {file.stem for file in folder.glob("*.py")} - FOUND_IN_STAGE[number]  # a learner may write a given module too
    found = {file.stem for file in folder.parent.glob("*.py")} - own
    assert found == FOUND_IN_STAGE[number], "the reference would be graded in the place of a missing exercise file"


@each_stage_as_shipped
def test_every_task_is_a_placeholder_and_every_placeholder_a_task(number):
    folder = STAGES[number]
    placed = {(id, file.name, name) for file in folder.glob("*.py") for id, name in placeholders(file)}
    described = {(task.id, task.file, task.function) for task in TASKS if task.id.startswith(f"{number}.")}
    assert placed == described
    ids = [task.id for task in TASKS if task.folder == folder.relative_to(ROOT).as_posix()]
    assert ids == [f"{number}.{k}" for k in range(1, len(ids) + 1)]


@each_task
def test_task_is_described(task):
    assert all(isinstance(x, str) and x.strip() for x in task if not isinstance(x, int | list))
    assert len({*task.hints}) == len(task.hints) == 3
    assert all(hint.strip() for hint in task.hints)
    assert task.points > 0
    assert task.minutes > 0
    assert task.function in definitions(ROOT / task.folder / ".." / task.file)


@each_stage
def test_points_add_up_to_100(number):
    assert sum(task.points for task in TASKS if task.id.startswith(f"{number}.")) == 100


@each_task
def test_lesson_lists_the_task(task):
    lesson = (ROOT / task.folder).parent.joinpath("README.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lesson.splitlines() if line[:1] == "|"]
    row = next((row for row in rows if row[0] == task.id), None)
    assert row is not None, f"no row of a table in the lesson begins with {task.id}"
    for expected in (f"`{task.function}`", f"`{task.file}`", str(task.points), str(task.minutes), f'`"{task.test}"`'):
        assert expected in row


@each_task
@pytest.mark.parametrize("level", [1, 2, 3])
def test_hint_shows_the_task(task, level):
    result = CliRunner().invoke(app, ["hint", task.id, "--level", str(level)])
    assert result.exit_code == 0
    assert task.command in result.output  # on one line, to be copied
    console = Console(width=10_000)
    with console.capture() as capture:
        render_task(task, level, console)
    shown = capture.get()
    for text in (task.title, task.function, task.path, " ".join(task.goal.split()), task.source, *task.hints[:level]):
        assert text in shown
    for line in (task.shapes + "\n" + task.equation).split("\n"):
        assert line in shown
    assert not any(text in shown for text in task.hints[level:])


def test_hint_for_an_unknown_task():
    assert find_task("0.7") is None
    assert CliRunner().invoke(app, ["hint", "0.7"]).exit_code == 2


COLLECT = """
import json, sys
import pytest
from _pytest.mark import deselect_by_keyword

out, expressions, arguments = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
selected = {}

class Select:  # collects once, then applies every expression as -k would
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items, config):
        for expression in expressions:
            chosen, config.option.keyword = items[:], expression
            deselect_by_keyword(chosen, config)
            selected[expression] = [item.nodeid for item in chosen]

pytest.main([*arguments, "--collect-only", "-q", "tests"], plugins=[Select()])
with open(out, "w") as file:
    json.dump(selected, file)
"""


@pytest.mark.thorough
def test_every_task_is_graded_and_every_test_grades_a_task(tmp_path):
    stages = {f"stage{number}": [] for number in STAGES}
    for task in TASKS:
        stages[f"stage{task.id.split('.')[0]}"].append(task.test)
    expressions = list({*stages, *(test for tests in stages.values() for test in tests)})
    out = tmp_path / "selected.json"
    command = [sys.executable, "-c", COLLECT, str(out), json.dumps(expressions), json.dumps(PYTEST)]
    process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert out.exists(), process.stdout[-2000:] + process.stderr[-2000:]
    selected = json.loads(out.read_text())
    for stage, tests in stages.items():
        assert all(id.startswith(f"tests/test_{stage}_") for id in selected[stage]), f"-k {stage} picks other files too"
        for test in tests:
            assert selected[test], f"-k '{test}' selects nothing"
        graded = {id for test in tests for id in selected[test]}
        assert graded == set(selected[stage]), f"{stage}: tests that grade no task, or tasks that reach beyond it"


@pytest.mark.parametrize(
    "which", [pytest.param(["--first-cases"], id="first cases"), pytest.param([], id="all", marks=pytest.mark.thorough)]
)
def test_every_test_fails_as_shipped_with_its_task(which, tmp_path):
    """In one process for all stages that nobody has edited, since half of the time goes into imports."""
    numbers = [number for number in sorted(STAGES) if not set(files_of(number)) & set(EDITED)]
    if not numbers:
        pytest.skip(f"edited, {GRADE}: every stage")
    report = tmp_path / "report.xml"
    files = sorted(str(file) for number in numbers for file in (ROOT / "tests").glob(f"test_stage{number}_*.py"))
    command = [sys.executable, "-m", "pytest", *PYTEST, "-q", "--tb=line", "--impl", "exercise", *which]
    command += [f"--junitxml={report}", *files]
    process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert report.exists(), process.stdout[-2000:] + process.stderr[-2000:]
    failed, outcomes = [], Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        number = re.search(r"test_stage(\d+)_", case.get("classname"))[1]
        results = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes.update([(number, child.tag) for child in results] or [(number, "passed")])
        for result in results:
            text = f"{result.get('message') or ''}\n{result.text or ''}"
            if result.tag == "skipped":
                assert result.get("message"), f"{case.get('name')} is skipped without a reason"
            elif not re.search(rf"Task {number}\.\d+: ", text):
                failed.append(f"{case.get('name')}: {text[:300]}")
    assert not failed, failed
    for number in numbers:
        assert outcomes[number, "failure"] > 0
        assert outcomes[number, "error"] == outcomes[number, "passed"] == 0, f"{dict(outcomes)}"
