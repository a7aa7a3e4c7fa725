"""Tile configs that a search chooses reach the kernel, and the bytes that kernels move are counted."""

import json

import pytest
import torch
from conftest import TRITON_MODE
from typer.testing import CliRunner

if TRITON_MODE == "missing":
    pytest.skip("Triton has no wheels for this platform", allow_module_level=True)

from benchmark import run, search
from benchmark.cases import SHARED_MEMORY_LIMIT, Shape
from benchmark.record import TimeLimit
from benchmark.render import load
from course import shipped
from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward.launch import forward, simple_forward
from stage2_triton_forward.tile_config import TileConfig, choose, forward_config
from stage3_scores_and_sums import launch as stage3
from stage3_scores_and_sums.column_sums import softmax_col_sum

CAUSAL = Setting(causal=True)
interpreted = pytest.mark.skipif(TRITON_MODE != "interpreted", reason="counts in Triton's interpreter")
FITS = {"registers": 128, "stack_bytes": 0, "shared_bytes": 1000}


def qkv(n=64, heads=1, head_dim=64):
    return (torch.randn(1, heads, n, head_dim).half() for _ in range(3))


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (FITS, None),
        (None, "does not compile"),
        (FITS | {"stack_bytes": 8}, "spills 8 bytes"),
        (FITS | {"shared_bytes": SHARED_MEMORY_LIMIT[90] + 1}, "shared memory"),
    ],
    ids=["fits", "no code", "spills", "too large"],
)
def test_search_prunes(needs, reason):
    found = search.reason_to_prune(needs, SHARED_MEMORY_LIMIT[90])
    assert found is None if reason is None else reason in found


@interpreted
def test_search_times_the_config_that_it_records():
    from benchmark.traffic import counted

    shape = Shape(1, 1, 1, 64, 64, True)
    configs = search.candidates(64)
    resources = dict.fromkeys(configs[:3], FITS) | {configs[3]: None, configs[4]: FITS | {"stack_bytes": 4}}
    programs, pruned = [], []

    def measure(call, *times):
        with counted() as traffic:
            call()
        programs.append(traffic.programs["forward_kernel"])
        return 1.0

    args = (TimeLimit(0), print, pruned, [shape], torch.float16)
    compiled = {"compiled": lambda *args: resources, "device": "cpu", "measure": measure}
    rows = list(search.search_rows(*args, **compiled))
    assert [row["config"] for row in rows] == [list(config) for config in configs[:3]]
    assert programs == [-(-64 // config.block_m) for config in configs[:3]]
    assert {entry["reason"] for entry in pruned} >= {"does not compile", "spills 4 bytes"}


@interpreted
@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_a_chosen_config_reaches_the_kernels(block_m):
    from benchmark.traffic import counted

    q, k, v = qkv()
    config = TileConfig(block_m, 32, 4, 2)
    with choose(forward=config, column_sum=config._replace(block_n=block_m)), counted() as traffic:
        _, lse = forward(q, k, v, CAUSAL)
        softmax_col_sum(q, k, lse, CAUSAL)
    assert traffic.programs == {"forward_kernel": 64 // block_m, "column_sum_kernel": 64 // block_m}
    assert forward_config(q, 64, False, False) != config, "it outlived the block"


@pytest.mark.parametrize(("loop", "best"), [("forward", 1), ("column_sum", 4), ("forward", None)])
def test_a_search_for_a_hook_measures_under_each_config(loop, best):
    from stage2_triton_forward.tile_config import chosen

    seen = []

    def measure(call):
        seen.append(chosen(loop))
        assert chosen("other") == search.OF_A_HOOK[0]
        if len(seen) == 4:
            raise RuntimeError("out of resource: shared memory")
        return 0.5 if best is not None and seen[-1] == search.OF_A_HOOK[best] else 1.0

    found = search.search_config(lambda: None, loop, {"other": search.OF_A_HOOK[0]}, 1, 0, measure)
    assert seen == [None, *search.OF_A_HOOK]
    assert found == (None if best is None else search.OF_A_HOOK[best])


def test_the_recorded_search_speaks_for_the_table():
    lines = search.table_rows(load("search")["rows"])
    assert lines[0].startswith("plain=TileConfig(64, 128, 4, 2),  # D = 64:")
    assert lines[1].startswith("plain=TileConfig(128, 64, 4, 2),  # D = 128:")


TILE = 64 * 64 * 2  # bytes of a tile of q, k, v or the output


@interpreted
@pytest.mark.parametrize(
    ("call", "n", "read", "written"),
    [
        (simple_forward, 64, 3 * TILE, TILE + 64 * 4),
        (simple_forward, 128, (2 + 4 + 4) * TILE, 2 * (TILE + 64 * 4)),
        (simple_forward, 40, 3 * 40 * 64 * 2, 40 * 64 * 2 + 40 * 4),
        (forward, 64, 3 * TILE, TILE + 64 * 4),
        (lambda q, k, v: forward(q, k, v, CAUSAL), 128, (2 + 3 + 3) * TILE, 2 * (TILE + 64 * 4)),
        (lambda q, k, v: stage3.compute_attention_scores(q, k), 64, 2 * TILE, TILE),
        (
            lambda q, k, v: stage3.attention_with_col_sum(q, k, v, algorithm="atomic_reverse"),
            64,
            3 * TILE + 64 * 4,
            TILE + 64 * 4 + 64 * 4,
        ),
    ],
    ids=["one tile", "two by two", "ragged", "loop", "loop, causal", "scores", "atomics"],
)
def test_bytes_are_those_counted_by_hand(call, n, read, written):
    from benchmark.traffic import counted

    with counted() as traffic:
        call(*qkv(n))
    assert (traffic.read, traffic.written) == (read, written)


@interpreted
def test_counting_ends_with_its_block():
    from benchmark.traffic import counted

    with counted() as traffic:
        pass
    simple_forward(*qkv())
    assert traffic.read == traffic.written == 0


@interpreted
@pytest.mark.parametrize("impl", ["reference", "exercise"])
def test_bytes_command(impl, tmp_path):
    edited = [name for name in shipped.edited() if name.startswith("stage")]
    if impl == "exercise" and edited:
        pytest.skip(f"edited, grade with --impl exercise: {shipped.listed(edited)}")
    arguments = ["bytes", "--impl", impl, "--n", "64", "--heads", "2", "--tile", "32x64", "--out", str(tmp_path)]
    result = CliRunner().invoke(run.app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / f"bytes_{impl}.json").read_text())["rows"]
    assert {row["stage"] for row in rows} == {2, 3, 4}
    if impl == "exercise":
        assert all(row["status"].startswith(f"not written yet: Task {row['stage']}.") for row in rows)
        return
    for row in rows:
        assert row["right"]
        assert row["ratio"] == (row["read"] + row["written"]) / row["least"] >= 0.9
    by_name = {row["operator"]: row for row in rows}
    loop = by_name["forward loop"]
    assert loop["least"] == (2 * 2 + 1 + 1) * TILE + 2 * 64 * 4
    assert loop["read"] == 2 * (1 + 2 * 2) * TILE, "two tiles of queries read all keys and values"
