"""Stage 3: raw column sums inside of the forward loop, by atomics, and the orders that keep programs apart."""

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, flat, make_qkv, references
from test_stage2_features import FEATURES, options_of

triton = pytest.importorskip("triton", reason="Triton has no wheels for this platform")
tl = triton.language

from stage2_triton_forward.hook import Place  # noqa: E402

ALGORITHMS = ["atomic_reverse", "atomic_round_robin"]
SELF = Case(2, 2, 1, 40, 70, 16, True)
CACHE = Case(1, 4, 2, 21, 130, 16, True)
BLOCK = 16

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
