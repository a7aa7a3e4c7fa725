"""Raw sums: what contended atomics cost, and how exact each algorithm is."""

from collections.abc import Iterator

import torch

from benchmark.cases import QWEN3_HEADS, Shape
from benchmark.measure import captured, side_by_side, spread
from course.grader import max_error
from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward.hook import in_order, make_hook
from stage2_triton_forward.launch import forward
from stage3_scores_and_sums import hooks, launch
from stage3_scores_and_sums.linear_sums import linear_col_sum, linear_row_sum


def contention_rows(lengths: tuple[int, ...] = (2048, 8192), dtype: torch.dtype = torch.float16) -> Iterator[dict]:
    """Time column sums by atomics in each order of keys, beside the same loop without them."""
    for n in lengths:
        for causal in (True, False):
            q, k, v = Shape(**(QWEN3_HEADS | {"n": n, "causal": causal})).tensors(dtype)
            n_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
            sums = torch.zeros(1, n_kv_heads, n, device="cuda")

            def attend(order, sums=sums, qkv=(q, k, v), causal=causal, n=n, group=group):
                args = hooks.ColSum(sums, group, 0, n)
                hook = make_hook(args, order=order, on_logits=hooks.add_col_sum_atomic)
                return forward(*qkv, Setting(causal), hook=hook)

            calls = {
                "no sums": lambda qkv=(q, k, v), causal=causal: forward(*qkv, Setting(causal)),
                "in order": lambda attend=attend: attend(in_order),
                "reverse": lambda attend=attend: attend(hooks.reversed_order),
                "round robin": lambda attend=attend: attend(hooks.round_robin),
            }
            times = side_by_side({name: captured(call) for name, call in calls.items()}, rep_ms=40)
            yield from ({"n": n, "causal": causal, "order": name, **spread(times[name])} for name in calls)


def accuracy_rows(n: int = 65536, head_dim: int = 128, block: int = 4096) -> Iterator[dict]:
    """Measure the error of raw sums of one head against float64, relative to the largest sum."""
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
        setting = Setting(causal=True)
        with_rows, with_columns = launch.attention_with_row_sum, launch.attention_with_col_sum
        results = {
            ("row", "linear"): linear_row_sum(q, k, setting),
            ("row", "kahan"): with_rows(q, k, v, setting, algorithm="kahan")[2],
            ("row", "dense scores in fp32, torch.sum"): plain["row"],
            ("column", "linear"): linear_col_sum(q, k, setting),
            ("column", "atomic_reverse"): with_columns(q, k, v, setting, algorithm="atomic_reverse")[2],
            ("column", "dense scores in fp32, torch.sum"): plain["column"],
        }
        for (name, algorithm), actual in results.items():
            largest = exact[name].abs().max().item()
            error = max_error(actual.flatten(), exact[name])
            row = {"n": n, "sum": name, "algorithm": algorithm, "dtype": str(dtype).removeprefix("torch.")}
            yield row | {"max_error": error, "largest": largest, "relative": error / largest}
