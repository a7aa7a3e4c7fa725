"""What the Hugging Face integration computes beside the public sums: masks by KV head, and sums without pad queries."""

import pytest
import torch
from helpers import Case, make_qkv

from flash_attention_with_scores.masked_sums import attention_weights, masked_attention
from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.setting import Setting

CASE = Case(2, 4, 2, 6, 19, 16, True)
SINKS = torch.tensor([0.5, 2.0, -1.0, 1.0])


def oracle(q, k, v, key_mask, own_keys, queries, **options):
    """Return output, weights and column sums by query head in float64, one KV head after the other."""
    q, k, v = q.double(), k.double(), v.double()
    sinks = options.pop("sinks", None)
    parts = []
    for h in range(2):
        rows = slice(2 * h, 2 * h + 2)
        own = {"key_padding_mask": key_mask if key_mask.ndim == 2 else key_mask[:, h]}
        if sinks is not None:
            own["sinks"] = sinks[rows].double()
        parts.append(naive_attention(q[:, rows], k[:, h, None], v[:, h, None], **own, **options))
    weights = torch.cat([part.weights for part in parts], 1)
    counted = weights
    if own_keys:
        is_real = key_mask[..., -6:] if key_mask.ndim == 2 else key_mask[..., -6:].repeat_interleave(2, 1)
        counted = weights * (is_real[:, None, :, None] if key_mask.ndim == 2 else is_real[..., None])
    return torch.cat([part.output for part in parts], 1), weights, counted[:, :, slice(*queries)].sum(2)


@pytest.mark.parametrize("by_kv_head", [False, True])
@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize(("sinks", "queries"), [(None, (0, 6)), (SINKS, (2, 5))])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_under_masks(by_kv_head, own_keys, sinks, queries, causal):
    q, k, v = make_qkv(CASE)
    key_mask = torch.rand(2, 2, 19) < 0.7
    key_mask = key_mask if by_kv_head else key_mask[:, 0]
    options = {"causal": causal, "sm_scale": 0.3, "softcap": 5.0, "window": (12, 0) if causal else None, "sinks": sinks}
    output, weights, sums = oracle(q, k, v, key_mask, own_keys, queries, **options)
    setting = Setting(**options, key_padding_mask=key_mask)
    for per_query_head in (False, True):
        actual = masked_attention(
            *(q, k, v, setting, None), own_keys=own_keys, queries=queries, per_query_head=per_query_head
        )
        torch.testing.assert_close(actual[0].double(), output, rtol=1e-5, atol=1e-6)
        expected = sums if per_query_head else sums.unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(actual[1].double(), expected, rtol=1e-5, atol=1e-6)
    dense = attention_weights(q, k, v, setting)
    torch.testing.assert_close(dense.double(), weights, rtol=1e-5, atol=1e-6)
    assert masked_attention(q, k, v, setting, None)[1] is None


def test_kernels_under_masks(device):
    """A KV head's own mask, and the infinite lse that takes pad queries out, go through the kernels as well."""
    q, k, v = make_qkv(CASE, device=device)
    key_mask = torch.rand(2, 2, 19, device=device) < 0.7
    output, _, sums = oracle(q, k, v, key_mask, True, (1, 6), causal=True)
    actual = masked_attention(q, k, v, Setting(True, key_padding_mask=key_mask), "triton", queries=(1, 6))
    torch.testing.assert_close(actual[0].double(), output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[1].double(), sums.unflatten(1, (2, 2)).sum(2), rtol=1e-5, atol=1e-6)
