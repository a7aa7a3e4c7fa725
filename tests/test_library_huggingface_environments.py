"""The Hugging Face integration in other places: transformers 4, kvpress, and several processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_models import CONFIGS, padding, scoring_model, tokens

from flash_attention_with_scores.huggingface import get_all_cumulative_scores

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).parent.parent
LLAMA = next(iter(CONFIGS))


@pytest.mark.parametrize(
    ("environment", "tests"),
    [
        ("transformers_4", ["tests/test_library_huggingface.py", "tests/test_library_eviction.py"]),
        ("kvpress", ["tests/environments/kvpress/observed_attention.py"]),
    ],
    ids=["transformers_4", "kvpress"],
)
def test_huggingface_in_an_environment_of_its_own(environment, tests):
    if shutil.which("uv") is None:
        pytest.skip("uv is not here")
    if os.environ.get("UV_OFFLINE"):
        pytest.skip("UV_OFFLINE is set, and uv may have to fetch packages")
    project = ["--locked", "--project", f"tests/environments/{environment}", "--python", sys.executable]
    graded = ["python", "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *tests]
    run(["uv", "run", *project, *graded])


def test_huggingface_tensor_parallel(tmp_path):
    model, ids, mask = scoring_model(LLAMA), tokens(), padding("left")
    output = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    scores = get_all_cumulative_scores(model)
    model.save_pretrained(tmp_path)
    torch.save({"ids": ids, "mask": mask, "output": output, "scores": scores}, tmp_path / "expected.pt")
    said = run([sys.executable, "tests/huggingface_tensor_parallel.py", str(tmp_path)], CUDA_VISIBLE_DEVICES="")
    assert all(f"rank {rank} is right" in said for rank in range(2))


def run(command, **variables):
    """Run a command in the repository and return what it said, or fail with that."""
    environment = {name: x for name, x in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTEST_ADDOPTS")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, f"{' '.join(command)} failed:\n{said[-6000:]}"
    return said
