"""Scores, sums and statistics beside plain attention, naive PyTorch and PyTorch's attention with separate scores."""

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmark.cases import Shape, sdpa
from benchmark.measure import captured, side_by_side, spread
from course.grader import compare, max_error
from stage1_pytorch_tiled.dense import naive_attention
from stage2_triton_forward.hook import in_order, make_hook
from stage2_triton_forward.launch import forward
from stage2_triton_forward.split_kv import attention_forward
from stage3_scores_and_sums import hooks, launch
from stage3_scores_and_sums.linear_sums import linear_col_sum, linear_row_sum

LENGTHS = (1024, 2048, 4096, 8192)
N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 128
PLAIN = "attention"


def operators(q: Tensor, k: Tensor, v: Tensor, split: int) -> dict:
    """Return {name: (call, field of NaiveAttention that its last result is)} of everything that is timed."""
    region = {"q_begin": split, "k_stop": split}
    attend = (q, k, v, True)
    softmax_sum = launch.attention_with_softmax_col_sum
    return {
        PLAIN: (lambda: attention_forward(*attend), "lse"),
        "scores": (lambda: launch.attention_with_scores(*attend), "scores"),
        "scores alone": (lambda: (launch.compute_attention_scores(q, k, True),), "scores"),
        "row sum": (lambda: launch.attention_with_row_sum(*attend), "row_sum"),
        "column sum": (lambda: launch.attention_with_col_sum(*attend), "col_sum"),
        "softmax column sum": (lambda: softmax_sum(*attend), "softmax_col_sum"),
        "total attention": (lambda: softmax_sum(*attend, per_query_head=True), "total_attention"),
        "cross-token qk": (lambda: launch.attention_with_col_sum(*attend, **region), "cross_token_qk_sum"),
        "cross-token softmax": (lambda: softmax_sum(*attend, **region), "cross_token_softmax_sum"),
        "cross-token softmax, buffered": (
            lambda: softmax_sum(*attend, **region, buffered=True),
            "cross_token_softmax_sum",
        ),
        "row sum, Kahan": (lambda: launch.attention_with_row_sum(*attend, algorithm="kahan"), "row_sum"),
        "column sum, atomic reverse": (
            lambda: launch.attention_with_col_sum(*attend, algorithm="atomic_reverse"),
            "col_sum",
        ),
        "column sum, atomic round robin": (
            lambda: launch.attention_with_col_sum(*attend, algorithm="atomic_round_robin"),
            "col_sum",
        ),
        "stats": (lambda: launch.attention_with_stats(*attend), "mean_distance"),
    }


def peers(q: Tensor, k: Tensor, v: Tensor) -> dict:
    """Return what else computes attention, or attention and scores."""
    group = N_HEADS // N_KV_HEADS
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()

    def scores():
        return (q * HEAD_DIM**-0.5 @ k.repeat_interleave(group, 1).mT).masked_fill_(~visible, 0)

    def naive():
        logits = q * HEAD_DIM**-0.5 @ k.repeat_interleave(group, 1).mT
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        return weights @ v.repeat_interleave(group, 1), logits.masked_fill_(~visible, 0)

    def with_cudnn():
        return sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, True)

    return {
        "cuDNN alone": with_cudnn,
        "naive PyTorch with scores": naive,
        "SDPA + separate scores": lambda: (with_cudnn(), scores()),
    }


def score_rows(dtype: torch.dtype = torch.float16) -> list[dict]:
    """Time every operator at every length: replays of a CUDA graph, and (`eager_ms`) calls from Python."""
    rows = []
    for n in track(LENGTHS, "scores"):
        q, k, v = Shape(1, N_HEADS, N_KV_HEADS, n, HEAD_DIM, True).tensors(dtype)
        split = 3 * n // 4
        ours = operators(q, k, v, split)
        right = {name: all(_right(call()[-1], field, q, k, v, split)) for name, (call, field) in ours.items()}
        calls = {name: call for name, (call, _) in ours.items()} | peers(q, k, v)
        replays = {name: captured(call) for name, call in calls.items()}
        from_python = side_by_side(calls, rounds=1, rep_ms=30)
        for name, replay in replays.items():  # each in turn with plain attention: what ran before heats the chip
            times = side_by_side({PLAIN: replays[PLAIN], name: replay}, rep_ms=30)
            row = {"n": n, "operator": name, **spread(times[name]), "eager_ms": from_python[name][0]}
            row["ratio"] = row["ms"] / spread(times[PLAIN])["ms"]
            rows.append(row | {"right": right[name]} if name in right else row)
        del calls, ours
        torch.cuda.empty_cache()
    return rows


def _right(actual: Tensor, field: str, q: Tensor, k: Tensor, v: Tensor, split: int):
    """Compare the first and the last head group with the oracle; the whole matrix would not fit."""
    group = N_HEADS // N_KV_HEADS
    for head in (0, N_KV_HEADS - 1):
        parts = q[:, head * group : (head + 1) * group], k[:, head, None], v[:, head, None]
        heads = slice(head, head + 1) if actual.shape[1] == N_KV_HEADS else slice(head * group, (head + 1) * group)
        oracle = getattr(naive_attention(*(x.double() for x in parts), True, split=split), field).cpu()
        naive = getattr(naive_attention(*parts, True, split=split), field)
        yield compare(actual[:, heads], oracle, naive).ok


def contention_rows(lengths: tuple[int, ...] = (2048, 8192), dtype: torch.dtype = torch.float16) -> list[dict]:
    """Time column sums by atomics in each order of keys, beside the same loop without them."""
    rows = []
    for n in lengths:
        for causal in (True, False):
            q, k, v = Shape(1, N_HEADS, N_KV_HEADS, n, HEAD_DIM, causal).tensors(dtype)
            sums = torch.zeros(1, N_KV_HEADS, n, device="cuda")

            def attend(order, sums=sums, qkv=(q, k, v), causal=causal, n=n):
                args = (sums, N_HEADS // N_KV_HEADS, 0, n)
                hook = make_hook(args, order=order, on_logits=hooks.add_col_sum_atomic)
                return forward(*qkv, causal, hook=hook)

            calls = {
                "no sums": lambda qkv=(q, k, v), causal=causal: forward(*qkv, causal),
                "in order": lambda attend=attend: attend(in_order),
                "reverse": lambda attend=attend: attend(hooks.reversed_order),
                "round robin": lambda attend=attend: attend(hooks.round_robin),
            }
            times = side_by_side({name: captured(call) for name, call in calls.items()}, rep_ms=40)
            rows += [{"n": n, "causal": causal, "order": name, **spread(times[name])} for name in calls]
    return rows


def accuracy_rows(n: int = 65536, head_dim: int = 128, block: int = 4096) -> list[dict]:
    """Measure the error of raw sums of one head against float64, relative to the largest sum."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = Shape(1, 1, 1, n, head_dim, True).tensors(dtype)
        exact = {"row": torch.zeros(n, dtype=torch.float64, device="cuda")}
        exact["column"] = exact["row"].clone()
        plain = {name: x.float() for name, x in exact.items()}
        for start in range(0, n, block):  # the dense matrix, some rows at a time
            scores = (q[0, 0, start : start + block].double() @ k[0, 0].double().T * head_dim**-0.5).tril(start)
            exact["row"][start : start + block] = scores.sum(1)
            exact["column"] += scores.sum(0)
            scores = scores.float()
            plain["row"][start : start + block] = scores.sum(1)
            plain["column"] += scores.sum(0)
        with_rows, with_columns = launch.attention_with_row_sum, launch.attention_with_col_sum
        results = {
            ("row", "linear"): linear_row_sum(q, k, True),
            ("row", "kahan"): with_rows(q, k, v, True, algorithm="kahan")[2],
            ("row", "dense scores in fp32, torch.sum"): plain["row"],
            ("column", "linear"): linear_col_sum(q, k, True),
            ("column", "atomic_reverse"): with_columns(q, k, v, True, algorithm="atomic_reverse")[2],
            ("column", "dense scores in fp32, torch.sum"): plain["column"],
        }
        for (name, algorithm), actual in results.items():
            largest = exact[name].abs().max().item()
            error = max_error(actual.flatten(), exact[name])
            row = {"n": n, "sum": name, "algorithm": algorithm, "dtype": str(dtype).removeprefix("torch.")}
            rows.append(row | {"max_error": error, "largest": largest, "relative": error / largest})
    return rows


def memory_rows(n: int = 131072, dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Measure the most memory that a call holds beyond its inputs and its output."""
    q, k, v = Shape(1, N_HEADS, N_KV_HEADS, n, HEAD_DIM, True).tensors(dtype)
    calls = {
        PLAIN: lambda: attention_forward(q, k, v, True),
        "row sum": lambda: launch.attention_with_row_sum(q, k, v, True),
        "column sum": lambda: launch.attention_with_col_sum(q, k, v, True),
        "softmax column sum": lambda: launch.attention_with_softmax_col_sum(q, k, v, True),
        "stats": lambda: launch.attention_with_stats(q, k, v, True),
    }
    rows = []
    for name, call in calls.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        beyond = torch.cuda.max_memory_allocated() - before - results[0].numel() * results[0].element_size()
        row = {"n": n, "operator": name, "beyond_mb": beyond / 1e6, "scores_mb": N_HEADS * n * n * 2 / 1e6}
        if name == "softmax column sum":  # each of the group's rows gives away a weight of 1
            expected = n * N_HEADS / N_KV_HEADS
            row["sum_error"] = (results[2].double().sum(-1) - expected).abs().max().item() / expected
        rows.append(row)
        del results
    return rows
