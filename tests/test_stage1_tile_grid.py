"""Stage 1: the grid of tiles by itself, without the loop around it."""

import math

import pytest
import torch
from helpers import Case, flat, make_qkv

from stage1_pytorch_tiled.dense import naive_attention, visible_keys

WINDOWS = [None, 0, 5, 20, (3, None), (None, 2), (17, 4), (40, 40)]


@pytest.fixture
def tiled_forward(graded):
    return flat(graded("stage1_pytorch_tiled", "tiled_forward"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(64, 64), (37, 37), (21, 70), (70, 21)])
def test_visibility_of_every_tile(tiled_forward, n_q, n_k, window, causal):
    q, k, _ = make_qkv(Case(1, 1, 1, n_q, n_k, 1, causal))
    grid = tiled_forward.TileGrid(q, k, causal, window=window)
    expected = visible_keys(n_q, n_k, causal, window, None, "cpu")[0, 0]
    for q_rows in tiled_forward.blocks(n_q, 16):
        for k_cols in tiled_forward.blocks(n_k, 16):
            seen, mask = grid.visibility(q_rows, k_cols), expected[q_rows, k_cols]
            if not mask.any():
                assert seen is False
            elif mask.all():
                assert seen is True
            else:
                assert seen.dtype == torch.bool
                assert torch.equal(seen, mask)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_make_up_the_logits(tiled_forward, causal, softcap, padding):
    q, k, v = make_qkv(Case(2, 4, 2, 33, 50, 8, causal), torch.float64)
    mask = torch.rand(2, 50) > 0.4 if padding else None
    grid = tiled_forward.TileGrid(q, k, causal, 0.3, softcap=softcap, key_padding_mask=mask)
    scores = torch.zeros(2, 2, 2, 33, 50, dtype=torch.float64)
    logits = torch.full_like(scores, -math.inf)
    for q_rows in tiled_forward.blocks(33, 16):
        starts = []
        for tile in grid.tiles_of(q_rows):
            assert tile.q_rows == q_rows
            starts.append(tile.k_cols.start)
            scores[..., q_rows, tile.k_cols] = tile.scores
            logits[..., q_rows, tile.k_cols] = tile.logits
        assert starts == [n for n in range(0, 50, 16) if not causal or n <= q_rows.stop - 1 + 17]

    visible = visible_keys(33, 50, causal, None, mask, "cpu")
    expected = naive_attention(q, k, v, causal, 0.3, key_padding_mask=mask).scores
    torch.testing.assert_close(scores.flatten(1, 2).masked_fill(~visible, 0), expected)
    expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
    torch.testing.assert_close(logits.flatten(1, 2), expected.masked_fill(~visible, -math.inf))


def test_tiles_of_carry_no_mask_where_all_is_visible(tiled_forward):
    q, k, _ = make_qkv(Case(1, 2, 1, 48, 48, 8, True))
    grid = tiled_forward.TileGrid(q, k, True)
    for q_rows in tiled_forward.blocks(48, 16):
        for tile in grid.tiles_of(q_rows):
            assert (tile.visible is None) == (tile.k_cols.start < q_rows.start)
