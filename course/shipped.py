"""Tells which exercise files differ from those that the course ships, by the digests in `shipped.json`.

After a skeleton has been changed, added or removed:

    uv run python -m course.shipped

With `--check` nothing is written; the exit code is 1 where the digests are out of step.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from course.tasks import EXERCISES, ROOT, all_tasks

DIGESTS = "course/shipped.json"
COMMAND = "uv run python -m course.shipped"


def exercise_files() -> dict[str, Path]:
    """Return the exercise files that are here, by their path relative to the repository."""
    files = sorted(file for folder in EXERCISES for file in ROOT.glob(f"{folder}/*.py"))
    return {file.relative_to(ROOT).as_posix(): file for file in files}


def digests() -> dict[str, str]:
    """Return the SHA-256 of each exercise file that is here; Windows' line ends count as any other's."""
    texts = {name: file.read_bytes().replace(b"\r\n", b"\n") for name, file in exercise_files().items()}
    return {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}


def edited() -> list[str]:
    """Return the exercise files that are not as shipped: changed, added or removed.

    What git thinks does not matter: a solution that has been committed is an edit too.
    """
    shipped, present = json.loads((ROOT / DIGESTS).read_text(encoding="utf-8")), digests()
    return sorted(name for name in {*shipped, *present} if shipped.get(name) != present.get(name))


def solved() -> list[str]:
    """Return the numbers of the tasks whose placeholder is gone."""
    texts = {name: file.read_text(encoding="utf-8") for name, file in exercise_files().items()}
    return [task.id for task in all_tasks() if f'"Task {task.id}: ' not in texts.get(task.path, "")]


def listed(names: list[str]) -> str:
    """Return files for a message, by folder: "stage1_pytorch_tiled/exercise (hooks.py, tiled_forward.py)"."""
    folders: dict[str, list[str]] = {}
    for folder, _, file in (name.rpartition("/") for name in names):
        folders.setdefault(folder, []).append(file)
    return ", ".join(f"{folder} ({', '.join(files)})" for folder, files in folders.items())


def main(arguments: list[str] | None = None) -> None:
    """Write the digests, or check them."""
    parser = argparse.ArgumentParser(prog="python -m course.shipped", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where they are out of step")
    if parser.parse_args(arguments).check:
        if names := edited():
            sys.exit(f"not as shipped: {listed(names)}\nif that is how they shall be shipped, run {COMMAND}")
        print("every exercise is as shipped")
    elif tasks := solved():
        sys.exit(f"nothing written: solutions are not shipped, and these tasks have no placeholder: {', '.join(tasks)}")
    else:
        (ROOT / DIGESTS).write_text(json.dumps(digests(), indent=1) + "\n", encoding="utf-8", newline="\n")
        print(f"{len(digests())} digests written to {DIGESTS}")


if __name__ == "__main__":
    main()
