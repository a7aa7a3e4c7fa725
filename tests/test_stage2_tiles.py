"""Stage 2, piece by piece: what happens to one tile, and to the parts of a row, without the loop around it."""

import math

import pytest
import torch
from helpers import Case, make_qkv

triton = pytest.importorskip("triton", reason="Triton has no wheels for this platform")
tl = triton.language

from stage2_triton_forward.describe import describe_mask, descriptor  # noqa: E402
from stage2_triton_forward.forward_kernel import Logits, Loop, Tiles  # noqa: E402
from stage2_triton_forward.hook import PLAIN, Place  # noqa: E402
from stage2_triton_forward.launcher import as_triton_takes_it  # noqa: E402
from stage2_triton_forward.tiles import Dropout, SoftmaxState  # noqa: E402

BLOCK = 16
WINDOWS = {
    "full": (False, None),
    "causal": (True, None),
    "window": (False, 20),
    "causal_window": (True, (33, None)),
    "right": (False, (None, 9)),
    "diagonal": (False, (0, 0)),
}
SIZES = [(16, 16), (40, 40), (20, 90), (90, 20), (1, 50), (33, 64)]

each_window = pytest.mark.parametrize(("causal", "window"), WINDOWS.values(), ids=WINDOWS)
each_size = pytest.mark.parametrize(("n_q", "n_k"), SIZES)


@pytest.fixture
def tiles(graded):
    return graded("stage2_triton_forward", "tiles")


def key_mask(n_q, n_k, causal, window, real=None):
    """Return the Mask that launches give to kernels."""
    mask = describe_mask(n_q, n_k, causal, window, real is not None)
    return mask._replace(padding_ptr=None if real is None else real.to(torch.uint8))


def visible_matrix(n_q, n_k, causal, window):
    """Return the bool matrix [n_q, n_k] from the definition."""
    left, right = (window, window) if window is None or isinstance(window, int) else window
    distance = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)
    right = min(math.inf if right is None else right, 0 if causal else math.inf)
    return (distance <= (math.inf if left is None else left)) & (distance >= -right)


@triton.jit
def tile_kernel(out_ptr, mask, BLOCK: tl.constexpr, VISIBLE_TILE: tl.constexpr):
    idx = tl.arange(0, BLOCK)
    q_idx, k_idx = tl.program_id(1) * BLOCK + idx, tl.program_id(2) * BLOCK + idx
    visible = VISIBLE_TILE(mask, tl.program_id(0), q_idx, k_idx)
    width = tl.num_programs(2) * BLOCK
    rows = tl.program_id(0) * tl.num_programs(1) * BLOCK + q_idx
    tl.store(out_ptr + rows[:, None] * width + k_idx[None, :], visible.to(tl.int8))


@each_window
@each_size
@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
def test_visible_tile(tiles, device, n_q, n_k, causal, window, padded):
    real = torch.rand(2, n_k, device=device) > 0.3 if padded else None
    m_blocks, n_blocks = triton.cdiv(n_q, BLOCK), triton.cdiv(n_k, BLOCK)
    found = torch.full((2, m_blocks * BLOCK, n_blocks * BLOCK), -1, dtype=torch.int8, device=device)
    mask = key_mask(n_q, n_k, causal, window, real)
    tile_kernel[(2, m_blocks, n_blocks)](found, mask, BLOCK=BLOCK, VISIBLE_TILE=tiles.visible_tile)
    found = found[:, :n_q].cpu()  # rows past the last query are nobody's business
    expected = visible_matrix(n_q, n_k, causal, window).expand(2, n_q, n_k)
    assert torch.equal(found[..., :n_k] == 1, expected & real.cpu()[:, None] if padded else expected)
    assert not found[..., n_k:].any(), "a key past the last one is visible"


@triton.jit
def keys_kernel(out_ptr, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VISIBLE_KEYS: tl.constexpr):
    begin, whole_begin, whole_stop, stop = VISIBLE_KEYS(mask, tl.program_id(0) * BLOCK_M, BLOCK_M, BLOCK_N)
    out_ptr += tl.program_id(0) * 4
    tl.store(out_ptr, begin)
    tl.store(out_ptr + 1, whole_begin)
    tl.store(out_ptr + 2, whole_stop)
    tl.store(out_ptr + 3, stop)


@each_window
@each_size
@pytest.mark.parametrize("block_m", [16, 32])
def test_visible_keys(tiles, device, n_q, n_k, causal, window, block_m):
    m_blocks = triton.cdiv(n_q, block_m)
    found = torch.full((m_blocks, 4), -1, dtype=torch.int32, device=device)
    mask = key_mask(n_q, n_k, causal, window)
    keys_kernel[(m_blocks,)](found, mask, BLOCK_M=block_m, BLOCK_N=BLOCK, VISIBLE_KEYS=tiles.visible_keys)
    for rows, ends in zip(visible_matrix(n_q, n_k, causal, window).split(block_m), found.tolist(), strict=True):
        begin, whole_begin, whole_stop, stop = ends
        assert begin % BLOCK == whole_begin % BLOCK == whole_stop % BLOCK == 0
        seen = rows.any(0).nonzero().flatten().tolist()
        assert (begin, stop) == (seen[0] // BLOCK * BLOCK, seen[-1] + 1) if seen else stop <= max(begin, 0)
        whole = [start for start in range(0, n_k - BLOCK + 1, BLOCK) if rows[:, start : start + BLOCK].all()]
        assert list(range(whole_begin, whole_stop, BLOCK)) == whole


@triton.jit
def step_kernel(
    max_ptr, sum_ptr, acc_ptr, logits_ptr, scale_log2, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr
):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    tile = rows[:, None] * N + columns[None, :]
    state = SoftmaxState(tl.load(max_ptr + rows), tl.load(sum_ptr + rows), tl.load(acc_ptr + tile))
    state, weights = STEP(state, tl.load(logits_ptr + tile), scale_log2)
    tl.store(max_ptr + rows, state.row_max)
    tl.store(sum_ptr + rows, state.row_sum)
    tl.store(acc_ptr + tile, state.acc)
    tl.store(logits_ptr + tile, weights)


@pytest.mark.parametrize("magnitude", [1.0, 300.0])
def test_online_softmax_step(tiles, device, magnitude):
    logits = torch.randn(16, 32) * magnitude
    logits[3, 5:] = -math.inf  # a row that sees a part of the tile,
    logits[4:6] = -math.inf  # and two that see nothing of it,
    row_max = torch.randn(16) * magnitude
    row_sum, acc = torch.rand(16) + 1, torch.randn(16, 32)
    row_max[5], row_sum[5], acc[5] = -math.inf, 0, 0  # one of which saw nothing before,
    row_max[6], row_sum[6], acc[6] = -math.inf, 0, 0  # as did one that sees all of it now
    state = [x.to(device, copy=True) for x in (row_max, row_sum, acc, logits)]
    step_kernel[(1,)](*state, 0.7, M=16, N=32, STEP=tiles.online_softmax_step)

    row_max, row_sum, acc, logits = (x.double() for x in (row_max, row_sum, acc, logits * 0.7))
    new_max = torch.maximum(row_max, logits.amax(1))
    shift = new_max.nan_to_num(neginf=0)
    weights, rescale = torch.exp2(logits - shift[:, None]), torch.exp2(row_max - shift)
    expected = (new_max, row_sum * rescale + weights.sum(1), acc * rescale[:, None], weights)
    for name, actual, truth in zip(("row_max", "row_sum", "acc", "weights"), state, expected, strict=True):
        torch.testing.assert_close(
            actual.double().cpu(), truth, rtol=2e-6 * magnitude, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@triton.jit
def loop_kernel(
    q_desc, k_desc, v_desc, max_ptr, sum_ptr, acc_ptr, loop, hook, begin, stop,
    MASKED: tl.constexpr, N_HEADS: tl.constexpr, ATTEND_KEYS: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = loop.tiles.BLOCK_M
    DV: tl.constexpr = loop.tiles.BLOCK_DV
    batch_head = tl.program_id(0)
    batch = batch_head // N_HEADS
    head = batch_head % N_HEADS
    q_idx = tl.arange(0, M)
    q_tile = q_desc.load([batch, head, 0, 0]).reshape(M, loop.tiles.BLOCK_D)
    state = SoftmaxState(
        tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, DV], tl.float32)
    )
    state, _ = ATTEND_KEYS(
        state, (), begin, stop, MASKED,
        loop.to_logits.scale, k_desc, v_desc, loop, hook,
        Place(batch, head, batch_head, 0, q_idx, q_tile, loop.mask.n_q, loop.mask.offset, q_desc), True,
    )  # fmt: skip
    tl.store(max_ptr + batch_head * M + q_idx, state.row_max)
    tl.store(sum_ptr + batch_head * M + q_idx, state.row_sum)
    tl.store(acc_ptr + (batch_head * M + q_idx)[:, None] * DV + tl.arange(0, DV)[None, :], state.acc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("begin", "stop", "masked"), [(0, 48, False), (16, 32, False), (0, 57, True), (32, 57, True)])
def test_attend_keys(graded, device, begin, stop, masked, dtype):
    q, k, v = make_qkv(Case(2, 4, 2, 16, 57, 32, masked), dtype, device)
    row_max, row_sum = torch.empty(2, 2, 4, 16, device=device)
    acc = torch.empty(2, 4, 16, 32, device=device)
    loop_kernel[(8,)](
        *(as_triton_takes_it(descriptor(x, 16)) for x in (q, k, v)),
        row_max,
        row_sum,
        acc,
        Loop(
            key_mask(16, 57, masked, None),
            Logits(0.2, 1.0, *map(tl.constexpr, (False, "ieee"))),
            Dropout(0, 0, 1.0, tl.constexpr(False)),
            Tiles(*map(tl.constexpr, (2, 16, 16, 32, 32))),
        ),
        PLAIN,
        begin,
        stop,
        MASKED=masked,
        N_HEADS=4,
        ATTEND_KEYS=graded("stage2_triton_forward", "forward_kernel").attend_keys,
    )
    logits = 0.2 * q.double() @ k.double().repeat_interleave(2, 1).mT
    if masked:
        logits = logits.masked_fill(~visible_matrix(16, 57, True, None).to(device), -math.inf)
    logits = logits[..., begin:stop]
    seen = logits.amax(-1) > -math.inf
    expected = logits.softmax(-1).nan_to_num(0) @ v.double().repeat_interleave(2, 1)[:, :, begin:stop]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    output = torch.where(seen[..., None], acc / row_sum[..., None], acc).double()
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    lse = (row_max * math.log(2) + row_sum.log()).double()
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "with_a_sink"])
@pytest.mark.parametrize("n_splits", [2, 5])
def test_merge_of_parts(graded, device, n_splits, with_sinks):
    parts, part_lse = torch.randn(n_splits, 2, 3, 4, 20), torch.randn(n_splits, 2, 3, 4) * 20
    empty = torch.zeros(n_splits, 2, 3, 4, dtype=torch.bool)
    empty[0, 1], empty[:, 0, 0, 2] = True, True  # a part that saw no key, and a row of which no part did
    part_lse[empty], parts[empty] = -math.inf, 0
    sinks = torch.tensor([0.3, -math.inf, 25.0]) if with_sinks else None
    merge_splits = graded("stage2_triton_forward", "split_kv").merge_splits
    arguments = (None if x is None else x.to(device) for x in (parts, part_lse, sinks, parts))
    output, lse = merge_splits(*arguments)

    expected = part_lse.double().logsumexp(0)
    if with_sinks:
        joined = torch.logaddexp(expected, sinks.double().view(1, 3, 1))
        expected = torch.where(expected == -math.inf, expected, joined)
    torch.testing.assert_close(lse.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    shares = torch.exp(part_lse.double() - expected.nan_to_num(neginf=0))
    truth = (parts.double() * shares[..., None]).sum(0)
    torch.testing.assert_close(output.double().cpu(), truth, rtol=1e-5, atol=1e-5)
