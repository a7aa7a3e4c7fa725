"""The one place where implementations are registered; the tour runs, grades and lists whatever stands here."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor

from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.hooks import AddColSum, AddRowSum
from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.tiled_forward import tiled_attention, tiled_softmax_col_sum

CAUSAL = Setting(causal=True)
Outputs = dict[str, Tensor]  # by the field's name in NaiveAttention


class Implementation(NamedTuple):
    """Something that computes attention from q [B, Hq, N, D], k and v [B, Hk, N, D], causally."""

    name: str
    stage: str
    backend: str
    run: Callable[[Tensor, Tensor, Tensor], Outputs]


def implementations(triton_mode: str) -> Iterator[Implementation]:
    """Yield every implementation that can run here.

    Args:
        triton_mode: what `use_interpreter_without_gpu` returned: "compiled", "interpreted" or "missing".
    """
    yield Implementation("naive attention", "0", "PyTorch", _naive)
    yield Implementation("tiled 16×16", "1", "PyTorch", partial(_tiled, block_m=16, block_n=16))
    yield Implementation("tiled sums", "1", "PyTorch", _tiled_sums)
    if triton_mode == "missing":
        return
    backend = f"Triton {triton_mode}"
    yield Implementation("simple kernel", "2", backend, _simple_kernel)
    yield Implementation("attention", "2", backend, _attention)
    yield Implementation("attention, split keys", "2", backend, _split_keys)
    yield Implementation("attention_with_scores", "3", backend, _with_scores)
    yield Implementation("compute_attention_scores", "3", backend, _scores_alone)
    yield Implementation("raw sums, linear", "3", backend, _linear_sums)
    yield Implementation("raw sums, in the loop", "3", backend, _sums_in_the_loop)
    yield Implementation("softmax column sums", "3", backend, _softmax_sums)
    yield Implementation("attention_with_stats", "3", backend, _stats)


def _naive(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    result = naive_attention(q, k, v, causal=True)
    return {"output": result.output, "lse": result.lse, "scores": result.scores}


def _tiled(q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> Outputs:
    output, lse = tiled_attention(q, k, v, CAUSAL, block_m=block_m, block_n=block_n)
    return {"output": output, "lse": lse}


def _tiled_sums(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    rows, columns = AddRowSum(q, k), AddColSum(q, k)

    def on_logits(tile):
        rows(tile)
        columns(tile)

    _, lse = tiled_attention(q, k, v, CAUSAL, on_logits=on_logits)
    softmax_col_sum = tiled_softmax_col_sum(q, k, lse, CAUSAL)
    return {"row_sum": rows.row_sum, "col_sum": columns.col_sum, "softmax_col_sum": softmax_col_sum}


def _simple_kernel(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    from stage2_triton_forward.launch import simple_forward

    output, lse = simple_forward(q, k, v, causal=True)
    return {"output": output, "lse": lse}


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    from flash_attention_with_scores import attention

    output, lse = attention(q, k, v, causal=True, return_lse=True, backend="triton")
    return {"output": output, "lse": lse}


def _split_keys(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    from stage2_triton_forward.split_kv import attention_forward

    output, lse = attention_forward(q, k, v, CAUSAL, n_splits=3)
    return {"output": output, "lse": lse}


def _with_scores(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    from flash_attention_with_scores import attention_with_scores

    output, scores = attention_with_scores(q, k, v, causal=True, backend="triton")
    return {"output": output, "scores": scores}


def _scores_alone(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    from flash_attention_with_scores import compute_attention_scores

    return {"scores": compute_attention_scores(q, k, causal=True, backend="triton")}


def _linear_sums(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return _raw_sums(q, k, v, "linear", "linear")


def _sums_in_the_loop(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return _raw_sums(q, k, v, "kahan", "atomic_reverse")


def _raw_sums(q: Tensor, k: Tensor, v: Tensor, of_rows: str, of_columns: str) -> Outputs:
    from flash_attention_with_scores import attention_with_col_sum, attention_with_row_sum

    attend = {"causal": True, "backend": "triton"}
    output, row_sum = attention_with_row_sum(q, k, v, algorithm=of_rows, **attend)
    _, col_sum = attention_with_col_sum(q, k, v, algorithm=of_columns, **attend)
    return {"output": output, "row_sum": row_sum, "col_sum": col_sum}


def _softmax_sums(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    from flash_attention_with_scores import attention, attention_with_softmax_col_sum

    attend = {"causal": True, "backend": "triton"}
    output, col_sum = attention_with_softmax_col_sum(q, k, v, **attend)
    _, total = attention(q, k, v, return_total_attention=True, **attend)
    return {"output": output, "softmax_col_sum": col_sum, "total_attention": total}


def _stats(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    from flash_attention_with_scores import attention_with_stats

    return attention_with_stats(q, k, v, causal=True, backend="triton")._asdict()
