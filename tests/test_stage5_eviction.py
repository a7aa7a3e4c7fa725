"""Stage 5: the kept set of every policy, against one that Python's lists choose head by head."""

import pytest
import torch

SHAPE = (2, 3, 24)  # B, Hk, N
N_PADDING = 9  # in front of the second sequence
BUDGETS = [1, 2, 5, 10, 23, 24]
POLICIES = {
    "StreamingLLM": [{}, {"sinks": 0}, {"sinks": 40}],
    "H2O": [{}, {"recent": 0.0}, {"recent": 0.25}],
    "CAB": [{}, {"local": 0.0, "bridge": 1.0, "importance": 0.0}, {"local": 0.2, "bridge": 0.5, "importance": 0.3}],
    "SnapKV": [{"window": 4}, {"window": 3, "kernel": 7}, {"window": 1, "kernel": 1}],
}


@pytest.fixture
def policies(graded):
    return graded("flash_attention_with_scores.eviction", "policies")


def scores_and_positions(positions):
    """Draw scores [B, Hk, N], 0 for padding, no two of a head alike, and shape positions like them."""
    positions = positions.expand(SHAPE).contiguous()
    return torch.rand(SHAPE).masked_fill(positions == -1, 0.0), positions


def after_eviction():
    """Positions with gaps, those of the second sequence behind padding."""
    positions = torch.arange(SHAPE[-1]) * 3 + torch.arange(SHAPE[-1]) % 2
    padding = torch.arange(SHAPE[-1]) < N_PADDING
    return torch.stack([positions, positions.masked_fill(padding, -1)])[:, None]


def rounded(share, budget):
    return int(share * budget + 0.5)


def chosen(key, indices, count):
    return sorted(indices, key=key, reverse=True)[:count]


def by_lists(policy, scores, positions, budget):
    """Return the indices of the tokens that one head keeps: all, where there are no more than the budget."""
    tokens = [i for i, position in enumerate(positions) if position != -1]
    return set(tokens if len(tokens) <= budget else EXPECTED[type(policy).__name__](policy, scores, tokens, budget))


def streaming(policy, scores, tokens, budget):
    recent = max(budget - policy.sinks, 1)
    return tokens[-recent:] + tokens[: budget - recent]


def heavy_hitters(policy, scores, tokens, budget):
    recent = rounded(policy.recent, budget)
    older = tokens[: len(tokens) - recent]
    return tokens[len(older) :] + chosen(scores.__getitem__, older, budget - recent)


def three_components(policy, scores, tokens, budget):
    n_local = rounded(policy.local, budget)
    n_bridge = min(rounded(policy.bridge, budget), budget - n_local)
    older = tokens[: len(tokens) - n_local]
    important = chosen(scores.__getitem__, older, budget - n_local - n_bridge)
    left = [i for i in older if i not in important]
    median = sorted(scores[i] for i in left)[(len(left) - 1) // 2]
    return tokens[len(older) :] + important + chosen(lambda i: -abs(scores[i] - median), left, n_bridge)


def observed(policy, scores, tokens, budget):
    recent = max(min(policy.window, budget - 1), 1)
    older = tokens[: len(tokens) - recent]

    def pooled(i):
        return sum(scores[j] for j in older if abs(i - j) <= policy.kernel // 2)

    return tokens[len(older) :] + chosen(pooled, older, budget - recent)


EXPECTED = {"StreamingLLM": streaming, "H2O": heavy_hitters, "CAB": three_components, "SnapKV": observed}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, arguments) for name, each in POLICIES.items() for arguments in each],
    ids=[f"{name}-{i}" for name, each in POLICIES.items() for i in range(len(each))],
)
@pytest.mark.parametrize("padded", [False, True], ids=["fresh", "padded"])
def test_keeps_what_lists_choose(policies, name, arguments, budget, padded):
    policy = getattr(policies, name)(**arguments)
    scores, positions = scores_and_positions(after_eviction() if padded else torch.arange(SHAPE[-1]))
    kept = policy.keep(scores if policy.uses_scores else None, positions, budget)
    assert kept.dtype == torch.int64
    assert kept.shape == (*SHAPE[:2], budget)
    assert (kept.diff(dim=-1) > 0).all(), "indices ascend without repetition"
    for b in range(SHAPE[0]):
        for h in range(SHAPE[1]):
            tokens = {i for i in kept[b, h].tolist() if positions[b, h, i] != -1}
            assert tokens == by_lists(policy, scores[b, h].tolist(), positions[b, h].tolist(), budget)


@pytest.mark.parametrize("name", ["H2O", "CAB", "SnapKV"])
def test_heads_choose_for_themselves(policies, name):
    scores, positions = scores_and_positions(torch.arange(SHAPE[-1]))
    kept = getattr(policies, name)(**POLICIES[name][0]).keep(scores, positions, 8).flatten(0, 1)
    assert len({tuple(head) for head in kept.tolist()}) == len(kept)


def test_bridges_are_of_median_attention_CAB(policies):
    scores = torch.tensor([9.0, 1.0, 2.0, 3.5, 5.0, 4.0, 8.0, 0.0]).view(1, 1, -1)
    positions = torch.arange(8).view(1, 1, -1)
    kept = policies.CAB(local=0.2, bridge=0.4, importance=0.4).keep(scores, positions, 5)
    # the newest; 9 and 8; and of 1, 2, 3.5, 4 and 5, whose median is 3.5, that one and 4
    assert kept.tolist() == [[[0, 3, 5, 6, 7]]]


@pytest.mark.parametrize(("pooling", "kept"), [("avg", [2, 3, 4, 18, 19]), ("max", [7, 8, 9, 18, 19])])
def test_neighbours_of_an_observed_key_stay_SnapKV(policies, pooling, kept):
    scores = torch.zeros(1, 1, 20)
    scores[..., 8] = 1.0
    scores[..., 2:5] = torch.tensor([0.6, 0.9, 0.5])
    policy = policies.SnapKV(window=2, kernel=3, pooling=pooling)
    assert policy.keep(scores, torch.arange(20).view(1, 1, -1), 5).tolist() == [[kept]]


def test_first_tokens_are_behind_the_padding_StreamingLLM(policies):
    positions = torch.tensor([-1, -1, 2, 3, 4, 5, 6, 7]).view(1, 1, -1)
    assert policies.StreamingLLM(sinks=2).keep(None, positions, 4).tolist() == [[[2, 3, 6, 7]]]


def test_attention_outlives_recency_H2O(policies):
    scores = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 0.0]).view(1, 1, -1)
    assert policies.H2O().keep(scores, torch.arange(6).view(1, 1, -1), 4).tolist() == [[[1, 3, 4, 5]]]
