"""`python -m benchmark.run COMMAND`: measurements on a GPU, kept with machine, versions and commit.

Rows are written as they come; Ctrl-C, or the time limit, keeps what is finished. Without a GPU each command compares
PyTorch with PyTorch on the CPU, and says so.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stage2_triton_forward.interpreter import use_interpreter_without_gpu

app = typer.Typer(add_completion=False, no_args_is_help=True)
HERE = Path(__file__).parent / "results"
Out = Annotated[Path | None, typer.Option(help="Folder for the result; default: benchmark/results on a GPU.")]
Device = Annotated[str, typer.Option(help="cuda or cpu.")]
Limit = Annotated[float, typer.Option(help="Begin nothing new after so many seconds; 0 for no limit.")]
console = Console(width=None if Console().is_terminal else 150, soft_wrap=True)


def say(text: str) -> None:
    """Print a line at once."""
    console.print(text, markup=False, highlight=False)


def place(out: Path | None, device: str) -> Path:
    """Return the folder for results: those of a CPU never take the place of a GPU's."""
    return out or (HERE if device != "cpu" else Path("benchmark_output"))


def choose_device(device: str) -> str:
    """Return "cuda" where a GPU runs compiled kernels, else "cpu", and say what that means."""
    mode = use_interpreter_without_gpu()
    if device not in ("cuda", "cpu"):
        print(f"benchmark: --device must be cuda or cpu, got {device}")
        raise typer.Exit(2)
    if device == "cuda" and mode == "compiled":
        return "cuda"
    from benchmark.cpu import NOTE

    say(NOTE)
    import torch

    torch.set_num_threads(1)  # the steadiest, beside whatever else runs here
    return "cpu"


def need_gpu() -> None:
    """Leave with one line where no GPU is present: the interpreter's speed says nothing about a kernel's."""
    if use_interpreter_without_gpu() != "compiled":
        print("benchmark: this measures kernels on a GPU, and there is none here")
        raise typer.Exit(2)


def cpu_instead(name: str, out: Path | None, **options) -> None:
    """Compare tiled PyTorch with the naive formula on the CPU."""
    from benchmark.cpu import cpu_rows
    from benchmark.record import Record

    finish(Record(place(out, "cpu") / f"{name}_cpu"), cpu_rows(**options), ["method", "M", "N", "ms", "beyond_mb"])


def finish(record, rows: Iterable[dict], columns: list[str], picture: str | None = None) -> bool:
    """Take rows as they come, print a table of all, draw the picture; return False if Ctrl-C ended it early."""
    from benchmark.record import keep
    from benchmark.tables import show, summary

    whole = keep(rows, record, lambda row: summary(row, columns), console)
    record.write()
    show(record.rows, columns, console)
    say(f"written: {record.path('.json')}")
    if picture and record.rows:
        from benchmark.plots import draw

        say(f"drawn: {draw(picture, record.result(), record.path('.png'))}")
    return whole


def on_gpu(name: str, rows: Callable[[], Iterable[dict]], columns: list[str], out: Path | None) -> None:
    """Record rows of a command that makes sense on a GPU only; `rows` is called when there is one."""
    from benchmark.record import Record

    if not finish(Record(place(out, "cuda") / name), rows(), columns):
        raise typer.Exit(130)


@app.command()
def operators(
    warmup_ms: Annotated[float, typer.Option(min=0)] = 50,
    rep_ms: Annotated[float, typer.Option(min=1)] = 200,
    num_runs: Annotated[int, typer.Option(min=1, help="Rounds, of which median, least and most are kept.")] = 3,
    device: Device = "cuda",
    sum_ops: Annotated[bool, typer.Option(help="Whether to time sums and statistics, too.")] = True,
    seq_lens: Annotated[str, typer.Option(help="Such as 1024,2048; default: 1024 to 16384, on a CPU to 1024.")] = "",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32; on a CPU always float32.")] = "float16",
    enable_config_search: Annotated[
        bool, typer.Option("--enable-config-search", help="Choose each operator's tile config by timing a few.")
    ] = False,
    config_search_trials: Annotated[int, typer.Option(min=1, help="Timed calls of each config.")] = 3,
    config_search_warmup: Annotated[int, typer.Option(min=0, help="Calls before those.")] = 5,
    output: Annotated[Path | None, typer.Option(help="FILE.json, FILE.csv and FILE.png are written.")] = None,
    time_limit: Limit = 0,
) -> None:
    """Time scores and sums in the Qwen3-8B head layout beside naive PyTorch and SDPA; each is checked first."""
    lengths = parse_ints("--seq-lens", seq_lens)
    parse_choice("--dtype", dtype, ("float16", "bfloat16", "float32"))
    if enable_config_search and dtype == "float32":
        print("benchmark: --enable-config-search has no configs for float32")
        raise typer.Exit(2)
    device = choose_device(device)
    import torch

    from benchmark import operators as bench
    from benchmark.cases import QWEN3_HEADS
    from benchmark.measure import ceilings
    from benchmark.record import Record, TimeLimit, keep
    from benchmark.tables import operator_summary, show_operators

    on_cpu = device == "cpu"
    heads = QWEN3_HEADS | ({"n_heads": 8, "n_kv_heads": 2} if on_cpu else {})
    dtype = "float32" if on_cpu else dtype
    timing = bench.Timing(warmup_ms, rep_ms, num_runs, enable_config_search, config_search_trials, config_search_warmup)
    ceiling = ceilings(getattr(torch, dtype), device)
    say(f"ceilings: {ceiling['matmul_tflops']:.4g} TFLOP/s (matmul, {dtype}), {ceiling['copy_gbs']:.0f} GB/s (copy)")
    about = {"ceilings": ceiling, "heads": heads, "timing": timing._asdict()}
    record = Record(output or place(None, device) / "operators", bench.COLUMNS, about)
    lengths = lengths or bench.LENGTHS[device]
    limit = TimeLimit(time_limit)
    rows = bench.operator_rows(
        lengths, getattr(torch, dtype), device, timing, limit, say, ceiling, sum_ops, heads=heads
    )
    whole = keep(rows, record, operator_summary, console)
    record.write()
    show_operators(record.rows, console)
    from benchmark.plots import draw

    draw("operators", record.result(), record.path(".png"))
    say(f"written: {record.path('.json')}, .csv and .png")
    if not whole:
        raise typer.Exit(130)


@app.command()
def flash(
    quick: Annotated[bool, typer.Option("--quick", help="Three lengths, D = 64 and 128, bf16.")] = False,
    heads: Annotated[int, typer.Option(min=1)] = 1,
    seq_lens: Annotated[str, typer.Option(help="Such as 128,256; default: 128 to 65536.")] = "",
    head_dims: Annotated[str, typer.Option(help="Such as 64,128; default: 16 to 128.")] = "",
    dtypes: Annotated[str, typer.Option(help="Such as bfloat16,float32.")] = "",
    flex_head_dims: Annotated[str, typer.Option(help="Where FlexAttention is measured; each takes seconds.")] = "",
    cell_seconds: Annotated[float, typer.Option(help="Skip cells whose one call would take longer.")] = 0,
    device: Device = "cuda",
    out: Out = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, in place of going on with the CSV.")] = False,
    time_limit: Limit = 0,
) -> None:
    """Time forward, backward and both together, N = 128 to 65536; goes on where the CSV in the folder ends."""
    given = {
        "lengths": parse_ints("--seq-lens", seq_lens),
        "head_dims": parse_ints("--head-dims", head_dims),
        "dtypes": tuple(name for name in dtypes.split(",") if name),
        "flex_head_dims": parse_ints("--flex-head-dims", flex_head_dims),
        "cell_seconds": cell_seconds,
    }
    for name in given["dtypes"]:
        parse_choice("--dtypes", name, ("float16", "bfloat16", "float32"))
    device = choose_device(device)
    from benchmark import flash as bench
    from benchmark.record import Record, TimeLimit

    sweep = bench.CPU_SWEEP if device == "cpu" else bench.QUICK if quick else bench.GPU_SWEEP
    sweep = sweep._replace(heads=heads, **{name: value for name, value in given.items() if value})
    record = Record(place(out, device) / "flash", bench.COLUMNS, {"sweep": sweep._asdict()})
    if not fresh:
        try:
            record.resume()
            record.rows = [row for row in record.rows if not row["status"].startswith("skipped")]  # found out anew
            say(f"{len(record.rows)} finished rows are taken over from {record.path('.csv')}")
        except ValueError as error:
            print(f"benchmark: {error}")
            raise typer.Exit(2) from error
    rows = bench.flash_rows(sweep, device, list(record.rows), TimeLimit(time_limit), say)
    columns = ["n", "head_dim", "dtype", "method", "status", *(f"{name}_ms" for name in bench.PASSES)]
    if not finish(record, rows, [*columns, "end_to_end_speedup"], "flash"):
        raise typer.Exit(130)


@app.command()
def memory(
    seq_lens: Annotated[str, typer.Option(help="Default: 1024 to 131072, on a CPU 256 to 2048.")] = "",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "",
    device: Device = "cuda",
    out: Out = None,
    time_limit: Limit = 0,
) -> None:
    """Measure peak memory against N, forward and backward, of naive attention, SDPA and ours, and draw it."""
    lengths = parse_ints("--seq-lens", seq_lens)
    parse_choice("--dtype", dtype, ("", "float16", "bfloat16", "float32"))
    device = choose_device(device)
    import torch

    from benchmark import memory as bench
    from benchmark.cases import QWEN3_HEADS
    from benchmark.record import Record, TimeLimit

    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    heads = QWEN3_HEADS | ({"n_heads": 8, "n_kv_heads": 2} if device == "cpu" else {})
    record = Record(place(out, device) / "memory", bench.COLUMNS, {"heads": heads})
    lengths = lengths or bench.LENGTHS[device]
    rows = bench.memory_rows(lengths, getattr(torch, dtype), device, TimeLimit(time_limit), say, heads=heads)
    if not finish(record, rows, ["operator", "pass", "n", "beyond_mb", "scores_mb", "status"], "memory"):
        raise typer.Exit(130)


@app.command()
def search(
    quick: Annotated[bool, typer.Option("--quick", help="One shape for each head dimension.")] = False,
    device: Device = "cuda",
    out: Out = None,
    time_limit: Limit = 0,
) -> None:
    """Search for the forward loop's tile sizes, and print the lines of `tile_config.py` that they speak for."""
    if choose_device(device) == "cpu":
        cpu_instead("search", out, blocks=(16, 32, 64, 128, 256))
        return
    from benchmark import search as bench
    from benchmark.record import Record, TimeLimit

    pruned: list[dict] = []
    record = Record(place(out, "cuda") / "search", extra={"pruned": pruned})
    shapes = list({shape.head_dim: shape for shape in bench.SHAPES}.values()) if quick else bench.SHAPES
    rows = bench.search_rows(TimeLimit(time_limit), say, pruned, shapes)
    whole = finish(record, rows, ["shape", "config", "tflops", "registers", "stack_bytes", "right"])
    record.rows.sort(key=lambda row: (row["shape"], row["ms"]))
    record.extra["tile_config"] = bench.table_rows(record.rows)
    record.write()
    say("for review, the rows of stage2_triton_forward/tile_config.py:")
    for line in record.extra["tile_config"]:
        say("    " + line)
    if not whole:
        raise typer.Exit(130)


@app.command()
def decode(device: Device = "cuda", out: Out = None) -> None:
    """Time one query against long caches, in GB/s and as a share of the machine's copy rate."""
    if choose_device(device) == "cpu":
        cpu_instead("decode", out, n_q=1, n_k=16384)
        return
    from benchmark.forward import decode_rows

    on_gpu("decode", decode_rows, ["n", "ms", "GB/s", "copy GB/s", "share", "right"], out)


@app.command()
def huggingface(
    seq_lens: Annotated[str, typer.Option(help="Default: 512 to 16384, on a CPU 256 to 1024.")] = "",
    device: Device = "cuda",
    out: Out = None,
    time_limit: Limit = 0,
) -> None:
    """Time a Hugging Face layer that keeps cumulative scores beside eager attention with weights, and its memory."""
    lengths = parse_ints("--seq-lens", seq_lens)
    device = choose_device(device)
    from benchmark import huggingface as bench
    from benchmark.record import Record, TimeLimit

    heads = {"n_heads": 32, "head_dim": 128} if device == "cuda" else {"n_heads": 8, "head_dim": 64}
    record = Record(place(out, device) / "huggingface", bench.COLUMNS, {"heads": heads})
    rows = bench.huggingface_rows(lengths or bench.LENGTHS[device], device, TimeLimit(time_limit), say, **heads)
    columns = ["n", "status", "eager_ms", "ours_ms", "speedup", "eager_mb", "ours_mb", "memory_ratio", "layer_speedup"]
    if not finish(record, rows, [*columns, "scores_error"]):
        raise typer.Exit(130)


@app.command()
def forward(out: Out = None) -> None:
    """Time the forward pass beside cuDNN, FlashAttention-2 and FlexAttention, in TFLOP/s."""
    need_gpu()
    from benchmark.forward import forward_rows

    on_gpu("forward", forward_rows, ["shape", "ours", "cuDNN", "SDPA-FA2", "FlexAttention", "right"], out)


@app.command()
def backward(out: Out = None) -> None:
    """Time the backward pass beside cuDNN, FlashAttention-2 and FlexAttention, in TFLOP/s."""
    need_gpu()
    from benchmark.backward import backward_rows

    on_gpu("backward", backward_rows, ["shape", "ours", "cuDNN", "SDPA-FA2", "FlexAttention", "right"], out)


@app.command()
def fp32_tiles(out: Out = None) -> None:
    """Time the fp32 backward pass with several tiles of each of its kernels."""
    need_gpu()
    from benchmark.backward import fp32_tile_rows

    on_gpu("fp32_tiles", fp32_tile_rows, ["head_dim", "kernel", "tile", "ms", "right"], out)


@app.command()
def fp8(out: Out = None) -> None:
    """Measure the error of fp8 inputs against float64."""
    need_gpu()
    from benchmark.forward import fp8_rows

    on_gpu("fp8", fp8_rows, ["dtype", "causal", "kernel_error", "quantisation_error"], out)


@app.command()
def latency(out: Out = None) -> None:
    """Time what a call of each operator costs in Python: plain, compiled, with its backward pass, in decoding."""
    need_gpu()
    from benchmark.latency import called_rows, host_rows

    on_gpu("latency", host_rows, ["way", "name", "host_us", "called_us"], out)
    on_gpu("as_called", called_rows, ["n", "name", "ms", "min", "max"], out)


@app.command()
def sums(out: Out = None) -> None:
    """Measure the raw sums' accuracy at N = 65536, and what contended atomics cost."""
    need_gpu()
    from benchmark.sums import accuracy_rows, contention_rows

    on_gpu("accuracy", accuracy_rows, ["sum", "algorithm", "dtype", "n", "max_error", "relative"], out)
    on_gpu("contention", contention_rows, ["order", "n", "causal", "ms"], out)


@app.command("bytes")
def bytes_moved(
    impl: Annotated[str, typer.Option(help="reference, or exercise: the learner's own kernels.")] = "reference",
    n: Annotated[int, typer.Option(min=1, help="Queries and keys.")] = 256,
    heads: Annotated[int, typer.Option(min=2, help="Query heads; half as many key heads.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, max=256)] = 64,
    tile: Annotated[str, typer.Option(help="Of the forward loop, such as 128x64; default: the interpreter's.")] = "",
    only: Annotated[str, typer.Option(help="Operators whose name contains this.")] = "",
    out: Out = None,
) -> None:
    """Count the bytes that each kernel loads and stores, beside the least possible; needs no GPU."""
    parse_choice("--impl", impl, ("reference", "exercise"))
    edges = parse_ints("--tile", tile.replace("x", ","))
    if len(edges) not in (0, 2):
        print(f"benchmark: --tile must be two numbers, such as 128x64, got {tile}")
        raise typer.Exit(2)
    os.environ["TRITON_INTERPRET"] = "1"  # hooks into the interpreter: also where a GPU is present
    from benchmark import traffic
    from benchmark.record import Record

    shape = {"n": n, "n_heads": heads, "n_kv_heads": heads // 2, "head_dim": head_dim}
    folder = place(out, "cpu")
    record = Record(folder / f"bytes_{impl}", traffic.COLUMNS, {"shape": shape, "tile": list(edges), "impl": impl})
    rows = traffic.traffic_rows(impl, shape, edges, only)
    finish(record, rows, ["operator", "stage", "read", "written", "least", "ratio", "right", "status"])


@app.command()
def fuzz(
    cases: Annotated[int, typer.Option(min=0, help="How many; 0 for no end.")] = 5000,
    seed: Annotated[int | None, typer.Option(help="Of the run; default: a new one.")] = None,
    case: Annotated[int | None, typer.Option(min=0, help="Run this one alone, and say all about it.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Begin nothing new after so many; 0 for no limit.")] = 0,
    backend: Annotated[str, typer.Option(help="pytorch or triton; default: both.")] = "",
    operator: Annotated[str, typer.Option(help="Operators whose name contains this.")] = "",
    triton_share: Annotated[float | None, typer.Option(min=0, max=1, help="Of the cases; few by default.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="That share the work.")] = 2,
    device: Device = "cuda",
    out: Out = None,
) -> None:
    """Call all operators at random, in all memory layouts, and hold them against the formulas; needs no GPU."""
    parse_choice("--backend", backend, ("", "pytorch", "triton"))
    parse_choice("--device", device, ("cuda", "cpu"))
    mode = use_interpreter_without_gpu()
    if mode == "missing":
        if backend == "triton":
            print("benchmark: --backend triton needs the triton package, which has wheels for Linux only")
            raise typer.Exit(2)
        triton_share = 0.0
    device = device if mode == "compiled" else "cpu"
    from benchmark.fuzz import Run, report_case, run_cases
    from benchmark.record import Record

    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    run = Run(seed, device, operator, backend, triton_share)
    if case is not None:
        raise typer.Exit(report_case(run, case, say))
    record = Record(place(out, device) / "fuzz", extra={"seed": seed, "run": run._asdict(), "disagreements": []})
    raise typer.Exit(run_cases(run, cases, seconds, processes, record, say, console))


def parse_ints(option: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "1024,2048"; () for nothing."""
    try:
        numbers = tuple(int(part) for part in text.replace(" ", ",").split(",") if part)
        if any(number < 1 for number in numbers):
            raise ValueError
    except ValueError:
        print(f"benchmark: {option} must be positive whole numbers with commas between, got {text}")
        raise typer.Exit(2) from None
    return numbers


def parse_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Leave with one line if a value is not among those allowed."""
    if value not in allowed:
        print(f"benchmark: {option} must be one of {', '.join(x for x in allowed if x)}, got {value}")
        raise typer.Exit(2)


if __name__ == "__main__":
    app()
