"""Scores, sums and statistics of the Qwen3-8B head layout, beside naive PyTorch and PyTorch's own attention."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import flash_attention_with_scores as library
from benchmark.cases import QWEN3_HEADS, Shape, hidden_keys, naive, naive_logits, sdpa
from benchmark.measure import captured, empty_cache, failure, median_ms, n_bytes, side_by_side, spread
from benchmark.oracle import StatisticsOracle
from benchmark.peak import bytes_beyond
from benchmark.record import TimeLimit, within
from benchmark.search import search_config
from stage2_triton_forward.tile_config import choose

COLUMNS = ("n", "operator", "dtype", "status", "ms", "min", "max", "speedup", "ratio", "rate", "unit", "share")
COLUMNS += ("eager_ms", "beyond_mb", "configs")
PLAIN, NAIVE = "attention", "naive PyTorch with scores"
LENGTHS = {"cuda": (1024, 2048, 4096, 8192, 16384), "cpu": (256, 512, 1024)}


class Method(NamedTuple):
    """Something that is timed."""

    call: Callable[[], tuple[Tensor | None, Tensor | None]]  # output and statistic, None where it has none
    field: str | None = None  # of NaiveAttention, that the statistic is
    products: float = 2  # M×N matrix products that it needs
    stores: bool = False  # whether it writes every score: bound by memory then, and measured in GB/s
    loops: tuple[str, ...] = ()  # whose tile configs a search may choose


class Timing(NamedTuple):
    """How long to time."""

    warmup_ms: float = 50
    rep_ms: float = 200
    num_runs: int = 3
    search: bool = False
    search_trials: int = 3
    search_warmup: int = 5


def methods(q: Tensor, k: Tensor, v: Tensor, split: int, sum_ops: bool = True) -> dict[str, Method]:
    """Return everything that is timed, by name; the first two are what all others are compared with."""
    attend = (q, k, v, True)
    cross = (q, k, v, split, True)
    hidden = hidden_keys(q, k)
    backend = SDPBackend.CUDNN_ATTENTION if q.is_cuda else None
    loop = ("forward",)

    def masked_scores():
        return naive_logits(q, k).masked_fill_(hidden, 0)

    def everything():
        output, logits = naive(q, k, v, hidden)
        return output, logits.masked_fill_(hidden, 0)

    found = {
        NAIVE: Method(everything, "scores"),
        PLAIN: Method(lambda: library.attention(*attend, return_lse=True), "lse", loops=loop),
        "SDPA + separate scores": Method(lambda: (sdpa(backend, *attend), masked_scores()), "scores"),
        ("cuDNN" if q.is_cuda else "SDPA") + " alone": Method(lambda: (sdpa(backend, *attend), None)),
        "scores": Method(lambda: library.attention_with_scores(*attend), "scores", stores=True, loops=loop),
        "scores alone": Method(
            lambda: (None, library.compute_attention_scores(q, k, True)), "scores", 1, stores=True, loops=loop
        ),
    }
    if not sum_ops:
        return found
    row_sum = partial(library.attention_with_row_sum, *attend)
    col_sum = partial(library.attention_with_col_sum, *attend)
    cross_softmax = library.attention_cross_token_softmax_sum

    def output_and_distance():  # one statistic that depends on all weights
        stats = library.attention_with_stats(*attend)
        return stats.output, stats.mean_distance

    region = (q.shape[2] - split) * split / (q.shape[2] ** 2 / 2)  # of the visible matrix, that cross-token sums add up
    both = ("forward", "column_sum")
    return found | {
        "row sum": Method(row_sum, "row_sum", loops=loop),
        "column sum": Method(col_sum, "col_sum", loops=loop),
        "softmax column sum": Method(
            lambda: library.attention_with_softmax_col_sum(*attend), "softmax_col_sum", 3, loops=both
        ),
        "total attention": Method(
            lambda: library.attention(*attend, return_total_attention=True), "total_attention", 3, loops=both
        ),
        "cross-token qk": Method(
            lambda: library.attention_cross_token_qk_sum(*cross), "cross_token_qk_sum", loops=loop
        ),
        "cross-token softmax": Method(lambda: cross_softmax(*cross), "cross_token_softmax_sum", 2 + region, loops=both),
        "cross-token softmax, buffered": Method(
            lambda: library.attention_cross_token_softmax_sum_buffered(*cross), "cross_token_softmax_sum", loops=both
        ),
        "row sum, Kahan": Method(lambda: row_sum(algorithm="kahan"), "row_sum", loops=loop),
        "column sum, atomic reverse": Method(lambda: col_sum(algorithm="atomic_reverse"), "col_sum", loops=loop),
        "column sum, atomic round robin": Method(
            lambda: col_sum(algorithm="atomic_round_robin"), "col_sum", loops=loop
        ),
        "stats": Method(output_and_distance, "mean_distance", loops=loop),
    }


def operator_rows(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    timing: Timing,
    limit: TimeLimit,
    say: Callable[[str], None],
    ceiling: dict[str, float],
    sum_ops: bool = True,
    make_methods: Callable[..., dict[str, Method]] = methods,
    heads: dict = QWEN3_HEADS,
) -> Iterator[dict]:
    """Check and time every method at every length; what is wrong or does not fit becomes a row that says so."""
    naive_ms = {}
    for n in within(limit, lengths, say):
        shape = Shape(**heads, n=n)
        q, k, v = shape.tensors(dtype, device=device)
        split = 3 * n // 4
        found = make_methods(q, k, v, split, sum_ops)
        oracle = StatisticsOracle(q, k, v, split)
        plain = None
        for name in within(limit, found, say):
            method = found[name]
            row = {"n": n, "operator": name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                row |= _checked_and_timed(name, method, oracle, plain, device, timing)
                plain = row.pop("replay", None) if name == PLAIN else plain
                if row["status"] == "ok":
                    naive_ms |= {n: row["ms"]} if name == NAIVE else {}
                    row |= {"speedup": naive_ms[n] / row["ms"]} if n in naive_ms else {}
                    row |= _rate(method, shape, (q, k, v), row["ms"], ceiling)
            except Exception as error:
                row["status"] = failure(error)
            row.pop("replay", None)
            empty_cache()
            yield row
        del found, oracle, plain, q, k, v
        empty_cache()


def _checked_and_timed(name, method, oracle, plain, device, timing) -> dict:
    """Return the status of a method and, if it is right, its times."""
    configs = _search(method, device, timing) if timing.search and device != "cpu" else {}
    with choose(**configs):
        if not _right(method, oracle):
            return {"status": "wrong", "right": False}
        times = {"warmup_ms": timing.warmup_ms, "rep_ms": timing.rep_ms, "device": device}
        empty_cache()
        if device == "cpu":
            replay, eager_ms = method.call, None
        else:
            eager_ms = median_ms(method.call, 10, 30)
            replay = captured(method.call)
    calls = {name: replay} if plain is None else {PLAIN: plain, name: replay}  # in turn: what ran before heats the chip
    measured = {x: spread(ms) for x, ms in side_by_side(calls, timing.num_runs, **times).items()}
    row = {"status": "ok", "right": True, **measured[name]}
    if plain is not None or name == PLAIN:
        row["ratio"] = row["ms"] / measured[PLAIN]["ms"]
    if eager_ms is not None:
        row["eager_ms"] = eager_ms
    with choose(**configs):
        row["beyond_mb"] = bytes_beyond(lambda: [x for x in method.call() if x is not None], device) / 1e6
    if configs:
        row["configs"] = str({loop: tuple(config) for loop, config in configs.items()})
    return row | ({"replay": replay} if name == PLAIN else {})


def _right(method: Method, oracle: StatisticsOracle) -> bool:
    """Compare what a method returns with the oracle; everything that it returns is freed again."""
    output, statistic = method.call()
    right = output is None or oracle.agrees("output", output)
    return right and (statistic is None or oracle.agrees(method.field, statistic))


def _search(method: Method, device: str, timing: Timing) -> dict:
    """Choose the tile configs of a method's own loops, one loop after the other."""
    configs = {}
    for loop in method.loops:
        best = search_config(method.call, loop, configs, timing.search_trials, timing.search_warmup)
        configs |= {loop: best} if best is not None else {}
    return configs


def _rate(method: Method, shape: Shape, inputs: tuple[Tensor, ...], ms: float, ceiling: dict[str, float]) -> dict:
    """Return how much a method computes or writes in a second, and its share of what the machine can do."""
    if method.stores:
        written = shape.batch * shape.n_heads * shape.n**2 * inputs[0].element_size()
        rate, unit, most = (n_bytes(*inputs) + written) / ms / 1e6, "GB/s", ceiling["copy_gbs"]
    else:
        rate, unit, most = method.products / 2 * shape.flops / ms / 1e9, "TFLOP/s", ceiling["matmul_tflops"]
    return {"rate": rate, "unit": unit, "share": rate / most}
