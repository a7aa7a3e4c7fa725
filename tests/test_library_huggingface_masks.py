"""What transformers' masks become: the kernels' terms say what the mask said, and what they cannot say is refused."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_models import eager_model, padding  # noqa: E402
from transformers.masking_utils import causal_mask_function  # noqa: E402

from flash_attention_with_scores import naive_attention  # noqa: E402
from flash_attention_with_scores.huggingface import replace_attention_with_flash  # noqa: E402
from flash_attention_with_scores.huggingface.masks import make_mask, new_tokens, read_mask  # noqa: E402


def bidirectional_mask_function(batch, head, q, k):
    return q >= 0


def seen(sight, n_q, n_k, batch=2):
    """Return [B, n_q, n_k], what queries see by these terms."""
    behind = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)
    visible = torch.ones(batch, n_q, n_k, dtype=torch.bool)
    if sight.key_mask is not None:
        visible = visible & sight.key_mask[:, None]
    if sight.causal:
        visible = visible & (behind >= 0)
    if sight.window is not None:
        left, right = sight.window
        visible = visible & (behind <= left) & ((behind >= -right) if right is not None else True)
    return visible


@pytest.mark.parametrize("bias", [None, -torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(("n_q", "n_k", "width"), [(5, 5, 5), (4, 9, 9), (3, 7, 10), (1, 6, 8), (2, 3, 3)])
def test_a_mask_for_every_query_is_kept(n_q, n_k, width, bias):
    behind = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)
    for left, right in ((2, 0), (3, 1), (1, 2), (0, 0), (20, 0), (0, 20)):
        for keys in (torch.ones(2, n_k, dtype=torch.bool), torch.rand(2, n_k) > 0.3):
            visible = (behind <= left) & (behind >= -right) & keys[:, None]
            mask = torch.nn.functional.pad(visible[:, None], (0, width - n_k))
            given = mask if bias is None else torch.where(mask, 0.0, bias)
            for mask in (given, given[..., :n_k], given.expand(-1, 3, -1, -1)):
                sight = read_mask(mask, n_q, n_k, width, True, None)
                assert torch.equal(seen(sight, n_q, n_k), visible)


def test_masks_without_queries():
    assert read_mask(None, 4, 6, 6, True, None) == (True, None, None)
    assert read_mask(None, 4, 6, 6, True, 3) == (True, (2, 0), None)
    assert read_mask(None, 4, 6, 6, False, 3) == (False, None, None)
    mask = padding("left", length=6)
    assert read_mask(mask, 4, 6, 6, False, None) == (True, None, mask)
    assert read_mask(mask, 4, 6, 6, False, 3) == (True, (2, 0), mask)
    with pytest.raises(ValueError, match="the mask is for 6 keys, but there are 7"):
        read_mask(mask, 4, 7, 7, True, None)
    with pytest.raises(ValueError, match="the mask is for 6 keys, but there are 8"):
        read_mask(torch.ones(2, 1, 4, 6).bool(), 4, 7, 8, True, None)


def test_small_numbers_are_a_bias():
    bias = torch.zeros(1, 1, 3, 3)
    bias[..., 2] = torch.finfo(torch.float32).min / 4
    with pytest.raises(ValueError, match="adds a bias"):
        read_mask(bias, 3, 3, 3, True, None)


def test_which_new_tokens_are_padding():
    assert new_tokens(None, 3) is None
    mask = padding("left", length=6).bool()
    assert torch.equal(new_tokens(mask, 4), mask[:, 2:])
    assert torch.equal(new_tokens(mask[:, None, None, :3], 1), mask[:, 2:3])
    with pytest.raises(ValueError, match="does not go with a cache that evicts"):
        new_tokens(mask[:, None, None].expand(-1, 1, 2, -1), 2)


@pytest.mark.parametrize("old", [False, True], ids=["sizes", "positions"])
def test_causal_masks_name_the_keys_that_are_real(old):
    def made(kv_length, mask, n_q, begin, **options):
        sizes = {"cache_position": torch.arange(begin, begin + n_q)} if old else {"q_length": n_q, "q_offset": begin}
        return make_mask(2, kv_length, causal_mask_function, mask, **sizes, **options)

    real = padding("left", length=8)
    assert made(8, None, 4, 4) is None
    assert made(8, torch.ones(2, 8), 4, 4) is None
    assert torch.equal(made(8, real, 4, 4), real.bool())
    assert torch.equal(made(20, real, 4, 4), real.bool())  # a static cache has room for more
    assert torch.equal(made(20, None, 4, 4), torch.ones(2, 8).bool())
    assert made(20, None, 4, 4).dtype == made(20, real, 4, 4).dtype == torch.bool
    assert torch.equal(made(5, real, 4, 4, kv_offset=3), real[:, 3:].bool())  # a sliding layer has dropped three
    short = made(8, real[:, :6], 4, 4)  # what the mask does not reach is not there
    assert torch.equal(short, torch.nn.functional.pad(real[:, :6], (0, 2)).bool())
    assert made(8, real, 4, 4, device=torch.device("meta")).device.type == "meta"


def test_masks_of_encoders_are_never_none():
    real = padding("right", length=7)
    for mask, expected in ((None, torch.ones(2, 7)), (real, real)):
        made = make_mask(2, 7, bidirectional_mask_function, mask, q_length=4)
        assert made.dtype == torch.bool
        assert torch.equal(made, expected.bool()[:, None, None].expand(2, 1, 4, 7))
    made = make_mask(2, 3, bidirectional_mask_function, real, q_length=4, kv_offset=2)
    assert torch.equal(made[:, 0, 0], real[:, 2:5].bool())
    assert make_mask(2, 7, bidirectional_mask_function, q_length=4, device=torch.device("meta")).device.type == "meta"


def test_a_module_that_passes_no_scale():
    model = replace_attention_with_flash(copy.deepcopy(eager_model("llama: grouped heads")))
    attention = model.model.layers[1].self_attn
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    for scale, of_module in (
        (0.25, {}),
        (1.0, {"scale_attn_weights": False}),
        (0.125, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": True}),
    ):
        vars(attention).update(of_module)
        output, _ = transformers.AttentionInterface()["attn_with_scores"](attention, q, k, v, None)
        expected = naive_attention(q, k, v, True, scale).output.transpose(1, 2)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_module_says_whether_it_is_causal():
    model = replace_attention_with_flash(copy.deepcopy(eager_model("llama: grouped heads")))
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    for says, causal in (({}, True), ({"is_causal": True}, True), ({"is_causal": False}, False)):
        attend = transformers.AttentionInterface()["attn_with_scores"]
        output, _ = attend(model.model.layers[0].self_attn, q, k, v, None, **says)
        expected = naive_attention(q, k, v, causal).output.transpose(1, 2)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["head_mask", "position_bias"])
def test_biases_are_refused(name):
    model = replace_attention_with_flash(copy.deepcopy(eager_model("llama: grouped heads")))
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    attend = transformers.AttentionInterface()["attn_with_scores"]
    with pytest.raises(ValueError, match=f"LlamaAttention passes {name}, which attention with scores cannot apply"):
        attend(model.model.layers[0].self_attn, q, k, k, None, **{name: torch.ones(4)})


def test_causal_masks_of_a_cache_that_has_dropped_keys():
    """Keys 6 to 13 are there, and queries 10 to 12: of room for eight keys, seven are written."""
    mask = make_mask(2, 8, q_length=3, q_offset=10, kv_offset=6)
    assert mask.shape == (2, 7)
    assert mask.all()


def test_one_query_that_sees_everything_needs_no_mask():
    sizes = {"q_length": 1, "q_offset": 7, "device": torch.device("cpu"), "dtype": torch.float32}
    assert make_mask(2, 8, **sizes) is None
    assert make_mask(2, 8, allow_is_causal_skip=False, **sizes) is not None


def test_queries_that_see_only_what_follows_are_refused():
    mask = torch.ones(4, 9, dtype=torch.bool).triu(1 + 5)[None, None]  # the kernels' windows hold the query's own key
    with pytest.raises(ValueError, match="neither that of causal order and padding"):
        read_mask(mask, 4, 9, 9, True, None)
