"""The mutant gate: every known mistake must be caught by its named test, by assertion and not by a crash."""

import pytest

from course.mistakes import MISTAKES
from course.mutants import outcomes

PACKAGES = list(dict.fromkeys(mistake.file.split("/")[0] for mistake in MISTAKES))  # in the order of the course


def test_names_are_unique():
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("package", PACKAGES, ids=range(1, len(PACKAGES) + 1))
def test_every_mistake_is_caught(package):
    if package != "stage1_pytorch_tiled":
        pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    names = [mistake.name for mistake in MISTAKES if mistake.file.startswith(package)]
    results = outcomes(names)
    assert [result["name"] for result in results] == names
    not_caught = [result for result in results if result["outcome"] != "caught"]
    assert not not_caught, "\n".join(f"{r['name']} {r['outcome']}:\n{r['said'][-2000:]}" for r in not_caught)
