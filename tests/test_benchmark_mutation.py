"""The mutation tool: every operator makes its change and no other, and a change that no test sees is reported."""

import pytest

from benchmark import mutation
from benchmark.mutation_cases import EQUIVALENT, TESTS

SOURCE = '''"""A module, 1 + 1."""

from x import y


def f(a: int | None, b=2, *, flag: bool = True):
    """Return a < b."""
    total = -a + b
    total += 3
    g(total, key=flag)
    if a is None:
        raise ValueError(f"a is {a + 1}")
    if a < b and flag:
        return min(a, b)
    return 1.5 if "a" not in y else None
'''
MADE = {  # (kind, the line, what it becomes)
    ("arithmetic", "total = -a + b", "total = -a - b"),
    ("assignment", "total += 3", "total = 3"),
    ("comparison", "if a < b and flag:", "if a <= b and flag:"),
    ("comparison", "if a is None:", "if a is not None:"),
    ("comparison", 'return 1.5 if "a" not in y else None', 'return 1.5 if "a" in y else None'),
    ("condition", "if a < b and flag:", "if (not (a < b and flag)):"),
    ("condition", "if a is None:", "if (not (a is None)):"),
    ("condition", 'return 1.5 if "a" not in y else None', 'return 1.5 if (not ("a" not in y)) else None'),
    ("constant", "total += 3", "total += 2"),
    ("constant", "total += 3", "total += 4"),
    ("constant", 'return 1.5 if "a" not in y else None', 'return 0.5 if "a" not in y else None'),
    ("constant", 'return 1.5 if "a" not in y else None', 'return 2.5 if "a" not in y else None'),
    ("constant", 'return 1.5 if "a" not in y else None', 'return 1.5 if "a" not in y else 0'),
    ("dropped argument", "g(total, key=flag)", "g(total)"),
    ("dropped statement", "g(total, key=flag)", "pass"),
    ("dropped statement", "total += 3", "pass"),
    ("dropped statement", 'raise ValueError(f"a is {a + 1}")', "pass"),
    ("dropped statement", "return min(a, b)", "pass"),
    ("logic", "if a < b and flag:", "if a < b or flag:"),
    ("min and max", "return min(a, b)", "return max(a, b)"),
    ("sign", "total = -a + b", "total = (a) + b"),
}
DEFAULTS = {"b=1", "b=3", "flag: bool = False"}


def test_every_operator_makes_its_change_and_no_other():
    found = mutation.mutants("toy.py", SOURCE)
    for mutant in found:
        compile(mutant.source, "toy.py", "exec")
        changed = [i for i, pair in enumerate(zip(SOURCE.split("\n"), mutant.source.split("\n"), strict=True), 1)
                   if pair[0] != pair[1]]  # fmt: skip
        assert changed == [mutant.line]
        assert mutant.function == "f"
    of_signature = {m.became for m in found if m.was.startswith("def")}
    assert of_signature == {f"def f(a: int | None, {x}):".replace("b=2, *, b", "b") for x in _signatures()}
    assert {(m.kind, m.was, m.became) for m in found if not m.was.startswith("def")} == MADE


def _signatures():
    for default in DEFAULTS:
        b, flag = (default, "flag: bool = True") if default.startswith("b") else ("b=2", default)
        yield f"{b}, *, {flag}"


def test_an_argument_goes_with_its_comma():
    made = {
        m.became for m in mutation.mutants("toy.py", "f(a, b=c, *d, e=g)\nh(i=j)\n") if m.kind == "dropped argument"
    }
    assert made == {"f(a, *d, e=g)", "f(a, b=c, *d)", "h()"}


def test_a_sample_depends_on_its_seed_only():
    files = ["stage4_backward/linear_grad_kernel.py", "flash_attention_with_scores/validation.py"]
    first = mutation.sampled(files, 20, 3)
    assert len(first) == len(set(first)) == 20
    assert first == mutation.sampled(files, 20, 3) != mutation.sampled(files, 20, 4)
    assert len(mutation.sampled(files, 0, 3)) > 100


def test_listed_tests_and_equivalent_mutants_exist():
    for file, tests in TESTS.items():
        for test in tests:
            name, _, function = test.partition("::")
            assert f"def {function.split('[')[0]}" in (mutation.ROOT / "tests" / name).read_text()
        made = {(m.function, m.was, m.became) for m in mutation.mutants(file, (mutation.ROOT / file).read_text())}
        assert not [x for x in EQUIVALENT if x[0] == file and x[1:4] not in made]
    assert {x[0] for x in EQUIVALENT} <= set(TESTS)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Return a package of one module, and the tests of it."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from toy.sign import sign\n\ndef test_sign():\n    assert sign(2) == 1\n"
    )
    monkeypatch.setattr("benchmark.mutation.ROOT", tmp_path)
    monkeypatch.setattr("course.mutants.ROOT", tmp_path)
    return {"toy/sign.py": ["test_toy.py"]}


@pytest.mark.thorough
def test_what_becomes_of_a_mutant(toy, monkeypatch):
    source = "def sign(x):\n    while x < 0:\n        x = 1\n    return 1 if x > 0 else 0\n"
    made = {m.became: m for m in mutation.mutants("toy/sign.py", source)}
    expected = {
        "return 1 if (not (x > 0)) else 0": "killed by assertion",
        "return 1 if x >= 0 else 0": "survived",
        "return 1 if x > 0 else 1": "equivalent",
        "while (not (x < 0)):": "timeout",
    }
    crash = made["while x <= 0:"]._replace(source="raise OSError")
    survivor = made["return 1 if x > 0 else 1"]
    monkeypatch.setattr("benchmark.mutation.EQUIVALENT", [(*survivor[:2], survivor.was, survivor.became, "a reason")])
    chosen = [*(made[became] for became in expected), crash]
    results = [(mutant, outcome) for mutant, outcome, _ in mutation.attempt_all(chosen, toy, jobs=2, cpu_seconds=6)]
    assert {m.became: outcome for m, outcome in results} == expected | {crash.became: "killed otherwise"}
    (row,) = mutation.counts(results)
    assert row == {"file": "toy/sign.py", "mutants": 5} | {x.replace(" ", "_"): 1 for x in mutation.OUTCOMES}
    assert "- return 1 if x > 0 else 0\n  + return 1 if x >= 0 else 0" in str(made["return 1 if x >= 0 else 0"])


def test_survivors_are_tried_again_and_records_joined(toy, monkeypatch):
    source = "def sign(x):\n    return 1 if x > 0 else 0\n"
    (mutation.ROOT / "toy" / "sign.py").write_text(source)
    monkeypatch.setattr("benchmark.mutation.TESTS", toy)
    dead, survivor = mutation.mutants("toy/sign.py", source)[:2]
    key = {name: getattr(survivor, name) for name in (*mutation.KEY, "line")}
    rows = mutation.counts([(dead, "killed by assertion"), (survivor, "survived")])
    others = mutation.counts([(dead._replace(file="other.py"), "survived")])
    records = [{"rows": rows, "survivors": [key]}, {"rows": others, "survivors": []}]
    assert [mutation.key_of(m) for m in mutation.survivors(records)] == [mutation.key_of(survivor)]
    other, row = mutation.joined(records, [(survivor, "equivalent")])
    assert other == others[0]
    assert row == rows[0] | {"survived": 0, "equivalent": 1}
    assert rows[0]["survived"] == 1
    assert mutation.joined(records[1:] * 2, [])[0]["mutants"] == 2
