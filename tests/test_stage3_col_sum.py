"""Stage 3: raw column sums inside of the forward loop, by atomics, and the orders that keep programs apart."""

import math

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, flat, make_qkv, references
from test_stage2_features import FEATURES, options_of
from test_stage3_linear_sums import of_region

triton = pytest.importorskip("triton", reason="Triton has no wheels for this platform")
tl = triton.language

from stage2_triton_forward.hook import Place  # noqa: E402
from stage2_triton_forward.tile_config import TileConfig, choose  # noqa: E402
from stage3_scores_and_sums.tile_config import LinearSumConfig  # noqa: E402

ALGORITHMS = ["atomic_reverse", "atomic_round_robin"]
SELF = Case(2, 2, 1, 40, 70, 16, True)
CACHE = Case(1, 4, 2, 21, 130, 16, True)
BLOCK = 16
TILES = {  # of queries, and the rows that linear sums take at once: neither are these a part of those, nor otherwise
    "tiles in chunks": (TileConfig(16, 64, 4, 2), LinearSumConfig(32, 4, 2)),
    "chunks in tiles": (TileConfig(32, 64, 4, 2), LinearSumConfig(16, 4, 2)),
}
LONG = Case(1, 2, 1, 277, 37, 16, False)  # 18 tiles of 16 queries
WIDE = Case(1, 2, 1, 91, 100, 20, False)
TALL = Case(1, 2, 1, 110, 50, 16, False)
HEADS = Case(2, 4, 2, 53, 40, 16, False)
FROM_TILES = {
    "no mask": ("tiles in chunks", LONG, {}),
    "region": ("chunks in tiles", LONG, {"q_begin": 21, "k_stop": 35}),
    "a region within one tile": ("chunks in tiles", TALL, {"q_begin": 107, "k_stop": 5}),
    "causal": ("tiles in chunks", HEADS, {"causal": True, "key_padding_mask": True, "sm_scale": -0.7}),
    "causal, M > N": ("chunks in tiles", TALL, {"causal": True, "sm_scale": -0.3}),
    "causal region": ("tiles in chunks", WIDE, {"causal": True, "q_begin": 37, "k_stop": 77}),
    "window": ("chunks in tiles", WIDE, {"window": (50, 20)}),
    "narrow window": ("chunks in tiles", TALL, {"window": (2, 3)}),
    "window to the left": ("tiles in chunks", TALL, {"window": (70, None), "sm_scale": 0.0}),
    "window to the right": ("tiles in chunks", WIDE, {"window": (None, 40), "q_begin": 19}),
    "causal window": ("chunks in tiles", TALL, {"causal": True, "window": (50, None), "q_begin": 33, "k_stop": 45}),
}

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture
def launch(graded):
    return flat(graded("stage3_scores_and_sums", "launch"))


def check(launch, algorithm, q, k, v, *args, **options):
    output, lse, col_sum = launch.attention_with_col_sum(q, k, v, *args, algorithm=algorithm, **options)
    oracle, naive = references(q, k, v, *args, **options)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)
    assert_right("col_sum", col_sum, oracle, naive, dtype=torch.float32)


@each_algorithm
@pytest.mark.parametrize("case", [CASES[0], CASES[2], *CASES[8:12]], ids=str)
def test_matches_oracle(launch, device, case, algorithm):
    check(launch, algorithm, *make_qkv(case, device=device), case.causal)


@each_algorithm
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(launch, device, dtype, algorithm):
    check(launch, algorithm, *make_qkv(SELF, dtype, device), True)


@pytest.mark.parametrize("name", ["window", "causal window", "right window", "softcap", "padding", "negative scale"])
@pytest.mark.parametrize("case", [CACHE, Case(2, 2, 1, 70, 50, 16, True)], ids=["M < N", "M > N"])
def test_features(launch, device, case, name):
    options = options_of(FEATURES[name], case, device)
    check(launch, "atomic_reverse", *make_qkv(case, device=device), **options)


@pytest.mark.parametrize(
    ("algorithm", "window"), list(zip(ALGORITHMS, [None, (40, None)], strict=True)), ids=ALGORITHMS
)
def test_region(launch, device, algorithm, window):
    q, k, v = make_qkv(CACHE, device=device)
    for split in (0, 17, 20):
        oracle, naive = references(q, k, v, True, split=split, window=window)
        region = {"q_begin": split, "k_stop": split}
        output, _, sums = launch.attention_with_col_sum(q, k, v, True, algorithm=algorithm, window=window, **region)
        assert_right("output", output, oracle, naive)
        assert_right("cross_token_qk_sum", sums, oracle, naive, dtype=torch.float32)


def test_dropout_leaves_the_sums_alone(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    arguments = {"causal": True, "algorithm": "atomic_round_robin"}
    output, _, col_sum = launch.attention_with_col_sum(q, k, v, **arguments)
    dropped, _, same_sum = launch.attention_with_col_sum(q, k, v, dropout_p=0.5, seed=7, **arguments)
    torch.testing.assert_close(col_sum, same_sum)  # atomics add up in any order
    assert not torch.allclose(output, dropped)


def test_a_reused_result_is_not_added_to(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    oracle, naive = references(q, k, v)
    room = torch.full((1, 2, 130), 1e6, device=device)
    _, _, col_sum = launch.attention_with_col_sum(q, k, v, algorithm="atomic_reverse", col_sum=room)
    assert col_sum is room
    assert_right("col_sum", col_sum, oracle, naive)


@pytest.mark.parametrize(("tiles", "case", "options"), FROM_TILES.values(), ids=FROM_TILES)
def test_sums_of_query_tiles(launch, device, tiles, case, options):
    """Column sums of few queries: of whole tiles the loop has left the sum, rows beside them are added up again."""
    q, k, v = make_qkv(case, device=device)
    options = options_of(options, case, device)
    region = {"q_begin": options.pop("q_begin", 0), "k_stop": options.pop("k_stop", case.n_k)}
    forward, linear_sum = TILES[tiles]
    with choose(forward=forward, linear_sum=linear_sum):
        output, _, col_sum = launch.attention_with_col_sum(q, k, v, **options, **region)
    oracle, naive = references(q, k, v, **options)
    assert_right("output", output, oracle, naive)
    expected = (of_region(result, case.n_kv_heads, **region) for result in (oracle, naive))
    rounding = 32 * torch.finfo(torch.float32).eps * oracle.scores.abs().max().item()  # of scores taken away again
    assert_right("col_sum", col_sum, *expected, dtype=torch.float32, atol=rounding)


def test_sums_of_query_tiles_are_taken_as_given(graded, device):
    linear_col_sum = flat(graded("stage3_scores_and_sums", "linear_sums")).linear_col_sum
    q, k, _ = make_qkv(Case(1, 2, 1, 64, 20, 16, False), device=device)
    sums = torch.zeros(1, 2, 4, 16, device=device)  # those of other queries: q itself is not summed up
    assert not linear_col_sum(q, k, tile_sums=(sums, 16)).any()


@pytest.fixture
def ran(graded, monkeypatch):
    """Notes the hooks of the loops and the linear sums that run, in their order; of these, whether tiles are given."""
    stage, noted = graded("stage3_scores_and_sums", "launch"), []

    def note(name, of_call):
        function = getattr(stage, name)

        def call(*args, **options):
            noted.append(of_call(options))
            return function(*args, **options)

        monkeypatch.setattr(stage, name, call)

    note("forward", lambda options: options["hook"])
    note("linear_row_sum", lambda options: "rows")
    note("linear_col_sum", lambda options: "columns" if options.get("tile_sums") is None else "columns of tiles")
    with choose(nothing=None):  # which keeps calls from being replayed
        yield noted


@pytest.mark.parametrize("causal", [False, True])
def test_what_an_algorithm_runs(launch, graded, device, ran, causal):
    """All algorithms give the same sums; only this tells them apart."""
    hooks = graded("stage3_scores_and_sums", "hooks")
    q, k, v = make_qkv(SELF._replace(n_q=20, n_k=20), device=device)
    for algorithm in ("linear", "auto", "kahan"):
        launch.attention_with_row_sum(q, k, v, causal, algorithm=algorithm)
    assert [ran[0], *(hook.ON_LOGITS for hook in ran[1:])] == ["rows", *[hooks.ROW_SUM.ON_LOGITS] * 2]
    ran.clear()
    launch.attention_with_col_sum(q, k, v, causal)
    launch.attention_with_col_sum(q[:, :, :1], k, v, causal)
    assert [ran[0].START, *ran[1:]] == [hooks.QUERY_SUMS.START, "columns of tiles", "columns"]
    ran.clear()
    for algorithm in ALGORITHMS:
        launch.attention_with_col_sum(q, k, v, causal, algorithm=algorithm)
    backwards, forwards = hooks.COL_SUM_ATOMIC_REVERSE.ORDER, hooks.COL_SUM_ATOMIC_ROUND_ROBIN.ORDER
    assert [hook.ORDER for hook in ran] == [backwards if causal else forwards, forwards]


@pytest.mark.parametrize("n_q", [1, 21])
@pytest.mark.parametrize("algorithm", ["linear", "kahan", *ALGORITHMS])
def test_output_and_lse_go_where_they_are_told_to(launch, device, algorithm, n_q):
    q, k, v = make_qkv(CACHE._replace(n_q=n_q), device=device)
    room = {"out": torch.full_like(q, math.nan), "lse": torch.full(q.shape[:3], math.nan, device=device)}
    names = {"linear": ("row", "col"), "kahan": ("row",)}.get(algorithm, ("col",))
    for name in names:
        attend = getattr(launch, f"attention_with_{name}_sum")
        output, lse, _ = attend(q, k, v, True, algorithm=algorithm, **room)
        assert output.data_ptr() == room["out"].data_ptr()
        assert lse.data_ptr() == room["lse"].data_ptr()
        oracle, naive = references(q, k, v, True)
        assert_right("output", output, oracle, naive)
        assert_right("lse", lse, oracle, naive)


@triton.jit
def order_kernel(visits_ptr, begin, stop, most, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr):
    q_start = tl.program_id(0) * BLOCK_M
    place = Place(0, 0, 0, q_start, q_start + tl.arange(0, BLOCK_M), 0, 0, 0, 0)
    visits_ptr += tl.program_id(0) * most
    for k_start in range(begin, stop, BLOCK_N):
        visited = ORDER((), k_start, begin, stop, place, BLOCK_N)
        tl.store(visits_ptr + (k_start - begin) // BLOCK_N, visited)


def visits(order, begin, stop, device, n_programs=7):
    """Return which key tiles each tile of queries visits, in order."""
    most = max(triton.cdiv(stop - begin, BLOCK), 1)
    found = torch.full((n_programs, most), -1, dtype=torch.int32, device=device)
    order_kernel[(n_programs,)](found, begin, stop, most, BLOCK_M=BLOCK, BLOCK_N=BLOCK, ORDER=order)
    return found.tolist()


@pytest.mark.parametrize("name", ["reversed_order", "round_robin"])
@pytest.mark.parametrize(("begin", "stop"), [(0, 64), (16, 64), (0, 57), (32, 33), (48, 131)])
def test_orders_visit_every_tile_once(graded, device, name, begin, stop):
    order = getattr(graded("stage3_scores_and_sums", "hooks"), name)
    for found in visits(order, begin, stop, device):
        assert sorted(found) == list(range(begin, stop, BLOCK))


def test_reversed_order_starts_at_the_end(graded, device):
    order = graded("stage3_scores_and_sums", "hooks").reversed_order
    for found in visits(order, 16, 57, device):
        assert found == [48, 32, 16]


def test_round_robin_keeps_programs_apart(graded, device):
    order = graded("stage3_scores_and_sums", "hooks").round_robin
    found = visits(order, 16, 121, device)  # seven tiles of keys, for seven tiles of queries
    for turn in zip(*found, strict=True):
        assert len(set(turn)) == 7, f"two programs meet: {turn}"
    assert found[2] == [48, 64, 80, 96, 112, 16, 32]
