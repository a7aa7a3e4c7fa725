"""Names stay importable from where they have always been, and are the same objects as in the rooms they live in."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attention_with_scores import policies

ROOT = Path(__file__).parent.parent
POLICIES = ["CAB", "H2O", "Full", "Policy", "Random", "SnapKV", "StreamingLLM"]
MODELS = [
    "get_all_cumulative_scores",
    "replace_attention_with_flash",
    "reset_cumulative_scores",
    "restore_attention",
]
PATHS = {  # (where from, where they live): names
    ("policies", "eviction.policies"): [*POLICIES, "PADDING", "largest", "most_recent", "part", "union"],
    ("eviction", "eviction.policies"): [*POLICIES, "PADDING"],
    ("eviction", "eviction.cache"): ["Budget", "Budgets", "EvictingCache", "EvictingLayer"],
    ("huggingface", "huggingface.models"): ["NAME", "WEIGHTS_SLOTS", *MODELS],
    ("heatmap", "heatmap.plots"): [
        "CAUSAL_BOUNDARY",
        "MASKED",
        "MAX_NUMBERED_TILES",
        "plot_heads",
        "plot_scores",
        "plot_tile_order",
    ],
    ("", "eviction.cache"): ["EvictingCache"],
    ("", "huggingface.models"): MODELS,
}
NEEDS = {"eviction.cache": "transformers", "huggingface.models": "transformers", "heatmap.plots": "matplotlib"}
TORCH_ALONE = """
import sys
for name in ("transformers", "matplotlib"):
    sys.modules[name] = None  # importing it raises ImportError
from flash_attention_with_scores.eviction import H2O
from flash_attention_with_scores import eviction, policies
assert policies.H2O is H2O
assert "EvictingCache" in dir(eviction)
for name, error in (("EvictingCache", ImportError), ("Nothing", AttributeError)):
    try:
        getattr(eviction, name)
    except error:
        continue
    raise AssertionError(name)
"""


def module(path):
    return importlib.import_module(f"flash_attention_with_scores.{path}".rstrip("."))


@pytest.mark.parametrize(("path", "home"), PATHS, ids=lambda path: path or "package")
def test_old_paths_lead_to_the_same_objects(path, home):
    if home in NEEDS:
        pytest.importorskip(NEEDS[home], reason=f"{NEEDS[home]} is not installed")
    for name in PATHS[path, home]:
        assert getattr(module(path), name) is getattr(module(home), name)
        assert name in dir(module(path))


@pytest.mark.parametrize("path", ["policies", "eviction", "huggingface", "heatmap"])
def test_all_lists_what_is_promised(path):
    promised = {name for (source, _), names in PATHS.items() if source == path for name in names}
    for (source, home), _ in PATHS.items():
        if source == path and home in NEEDS:
            pytest.importorskip(NEEDS[home], reason=f"{NEEDS[home]} is not installed")
    assert {*module(path).__all__} == promised


def test_policies_need_torch_alone():
    run = subprocess.run([sys.executable, "-c", TORCH_ALONE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_policies_that_were_pickled_by_their_old_path():
    saved = b"\x80\x04cflash_attention_with_scores.policies\nH2O\n."
    assert pickle.loads(saved) is policies.H2O
