"""Writes the recorded results into the pages that show them, and draws their pictures: `python -m benchmark.render`.

A page holds `<!-- table: NAME -->` and `<!-- /table -->`; what stands between them comes from `results/`.
"""

import json
import re
from pathlib import Path

from benchmark.plots import PICTURES, digest, digest_in, draw

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LESSONS = [*sorted(ROOT.glob("stage*/README.md")), ROOT / "flash_attention_with_scores/eviction/README.md"]
PAGES = [ROOT / "README.md", *LESSONS]
MARKER = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
NAIVE = "naive PyTorch with scores"
PEERS = ("cuDNN", "SDPA-FA2", "FlexAttention")


def load(name: str) -> dict:
    """Read a recorded result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def origin(result: dict) -> str:
    """Say in one line where a result comes from."""
    p = result["provenance"]
    return f"*{p['device']}, torch {p['torch']}, triton {p['triton']}, {p['date']}, commit {p['commit'][:10]}.*\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table; every column but the first is a number."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def forward() -> str:
    """The forward pass beside its peers."""
    return beside_peers(load("forward"))


def backward() -> str:
    """The backward pass beside its peers."""
    return beside_peers(load("backward"))


def beside_peers(result: dict) -> str:
    """Our TFLOP/s beside those of others."""
    rows = []
    for row in result["rows"]:
        ours = row["ours"]["tflops"]
        peers = [row[peer].get("tflops") for peer in PEERS]
        rows.append([row["shape"], f"**{ours:.0f}**", *(f"{x:.0f}" if x else "–" for x in peers)])
        rows[-1] += [f"{ours / peers[0]:.2f}×", f"{ours / peers[2]:.2f}×"]
    header = ["batch, heads (query/key), N, D", "ours", *PEERS, "of cuDNN", "of FlexAttention"]
    return "TFLOP/s, bf16, medians of interleaved rounds.\n\n" + table(header, rows) + "\n" + origin(result)


def decode() -> str:
    """One query against long caches."""
    result = load("decode")
    rows = [
        [f"{r['n']:,}", f"{1000 * r['ms']:.1f}", f"{r['GB/s']:,.0f}", f"{100 * r['share']:.0f} %"]
        for r in result["rows"]
    ]
    header = ["keys", "µs a call", "GB/s of K and V", "of the copy rate"]
    return table(header, rows) + "\n" + origin(result)


def fp8() -> str:
    """The error of fp8 inputs."""
    result = load("fp8")
    rows = [
        [r["dtype"], "causal" if r["causal"] else "full", f"{r['kernel_error']:.1e}", f"{r['quantisation_error']:.1e}"]
        for r in result["rows"]
    ]
    header = ["inputs", "mask", "error of the kernel", "error of quantising the inputs"]
    return table(header, rows) + "\n" + origin(result)


def operators() -> str:
    """Scores, sums and statistics beside naive PyTorch, PyTorch's attention, and plain attention."""
    result = load("operators")
    cells = {(r["operator"], r["n"]): r for r in result["rows"]}
    lengths = sorted({n for _, n in cells})
    longest = max(n for (name, n), r in cells.items() if name == NAIVE and "ms" in r)  # that naive PyTorch can do
    rows = []
    for name in dict.fromkeys(name for name, _ in cells):
        found, last = [cells.get((name, n), {}) for n in lengths], cells.get((name, longest), {})
        row = [name, *(f"{r['ms']:.3f}" if "ms" in r else r.get("status", "–") for r in found)]
        if "ms" in last:
            of_plain = last.get("ratio", last["ms"] / cells["attention", longest]["ms"])
            row += [f"{cells[NAIVE, longest]['ms'] / last['ms']:.1f}×", f"{of_plain:.2f}×"]
        else:
            row += ["–", "–"]
        rows.append([*row, f"{last['rate']:,.0f} {last['unit']} ({last['share']:.0%})" if "rate" in last else "–"])
    about = "B = 1, 32 query heads on 8 key heads, D = 128, fp16, causal, split at 3N/4; ms, replays of CUDA graphs"
    ceiling = result.get("ceilings")
    if ceiling:
        about += f"; rates beside a matrix product's {ceiling['matmul_tflops']:,.0f} TFLOP/s and a copy's "
        about += f"{ceiling['copy_gbs']:,.0f} GB/s in the same run"
    at = f"at {longest}"
    header = ["ms", *(f"N = {n}" for n in lengths), f"faster than naive, {at}", f"÷ attention, {at}", f"rate, {at}"]
    return f"{about}.\n\n" + table(header, rows) + "\n" + origin(result)


def latency() -> str:
    """What a call costs in Python."""
    result = load("latency")
    cells = {(r["way"], r["name"]): r for r in result["rows"]}
    rows = []
    for (way, name), row in cells.items():
        peer = cells[way, "SDPA"]["host_us"]
        rows.append([way, name, f"{row['host_us']:.0f}", f"{row['host_us'] / peer:.2f}", f"{row['called_us']:.0f}"])
    header = ["way", "call", "host, µs", "÷ SDPA's", "as called, µs"]
    return table(header, rows) + "\n" + origin(result)


def as_called() -> str:
    """Operators as called from Python, nothing captured."""
    result = load("as_called")
    lengths = list(dict.fromkeys(r["n"] for r in result["rows"]))
    times = {(r["name"], r["n"]): r["ms"] for r in result["rows"]}
    rows = [
        [name, *(f"{times[name, n]:.3f}" for n in lengths)] for name in dict.fromkeys(r["name"] for r in result["rows"])
    ]
    return table(["as called, ms", *(f"N = {n}" for n in lengths)], rows) + "\n" + origin(result)


def contention() -> str:
    """Column sums by atomics, in each order."""
    result = load("contention")
    orders = list(dict.fromkeys(r["order"] for r in result["rows"]))
    rows = []
    for n, causal in dict.fromkeys((r["n"], r["causal"]) for r in result["rows"]):
        times = {r["order"]: r["ms"] for r in result["rows"] if (r["n"], r["causal"]) == (n, causal)}
        rows.append([f"{n} {'causal' if causal else 'full'}", *(f"{times[order]:.3f}" for order in orders)])
    return table(["N, mask (ms)", *orders], rows) + "\n" + origin(result)


def accuracy() -> str:
    """The error of raw sums against float64."""
    result = load("accuracy")
    rows = [
        [f"{r['sum']}, {r['algorithm']}", r["dtype"], f"{r['max_error']:.1e}", f"{r['relative']:.1e}"]
        for r in result["rows"]
    ]
    length = result["rows"][0]["n"]
    header = [f"sum, algorithm (N = {length})", "inputs", "largest error", "÷ largest sum"]
    return table(header, rows) + "\n" + origin(result)


def memory() -> str:
    """Memory beyond inputs and results, at the greatest length."""
    result = load("memory")
    n = max(r["n"] for r in result["rows"])
    cells = {(r["operator"], r["pass"]): r for r in result["rows"] if r["n"] == n}
    passes = [name for name in ("forward", "backward") if any(found == name for _, found in cells)]
    matrix = next(iter(cells.values()))["scores_mb"] / 1e6
    rows = []
    for name in dict.fromkeys(name for name, _ in cells):
        found = [cells.get((name, direction), {"status": "–"}) for direction in passes]
        rows.append([name, *(f"{r['beyond_mb']:,.1f} MB" if "beyond_mb" in r else r["status"] for r in found)])
    titles = {"forward": "forward", "backward": "forward and backward"}
    header = [f"N = {n}, beyond inputs and results", *(titles[name] for name in passes)]
    about = f"A matrix of scores would take {matrix:.1f} TB.\n\n"
    return about + table(header, rows) + "\n" + origin(result)


def flash() -> str:
    """Forward and backward pass together, against plain PyTorch, at the widest head."""
    result = load("flash")
    head_dim = max(r["head_dim"] for r in result["rows"])
    cells = {(r["dtype"], r["n"], r["method"]): r for r in result["rows"] if r["head_dim"] == head_dim}
    methods = list(dict.fromkeys(method for *_, method in cells))
    rows = []
    for dtype, n in dict.fromkeys((dtype, n) for dtype, n, _ in cells):
        found = [cells.get((dtype, n, method), {}) for method in methods]
        times = [f"{r['end_to_end_ms']:.3f}" if "end_to_end_ms" in r else r.get("status", "–") for r in found]
        rows.append([f"{dtype}, {n}", *times])
    about = f"Forward and backward pass, B = 1, one head, D = {head_dim}, causal; ms as called from Python.\n\n"
    return about + table(["dtype, N", *methods], rows) + "\n" + origin(result)


def operators_picture() -> str:
    """The picture of `operators`."""
    return picture("operators", "Milliseconds against sequence length, one line for each method")


def memory_picture() -> str:
    """The picture of `memory`."""
    return picture("memory", "Memory against sequence length: the naive formula's grows with N², ours with N")


def picture(name: str, about: str) -> str:
    """Show a picture with its machine and date; it lies beside the result that it shows."""
    result = load(name)
    if not over_lengths(result):
        return "*Not measured over several lengths yet.*\n"
    return f"![{about}](benchmark/results/{name}.png)\n\n{origin(result)}"


def over_lengths(result: dict) -> bool:
    """Return whether a result has several sequence lengths, so that there is something to draw."""
    return len({row["n"] for row in result["rows"]}) > 1


def huggingface() -> str:
    """A model's attention that keeps cumulative scores, beside eager attention with weights."""
    result = load("huggingface")
    rows = []
    for r in result["rows"]:
        if r["status"] == "ok":
            times = (f"{r['eager_ms']:.3f}", f"{r['ours_ms']:.3f}", f"**{r['speedup']:.1f}×**")
            memory = (f"{r['eager_mb']:,.0f} MB", f"{r['ours_mb']:.2f} MB", f"**{r['memory_ratio']:,.0f}×**")
            rows.append([f"{r['n']:,}", *times, f"{r['layer_speedup']:.1f}×", *memory])
    header = ["N", "eager, ms", "ours, ms", "faster", "whole layer faster", "eager holds", "ours holds", "less"]
    heads, dtype = result["heads"], result["rows"][0]["dtype"]
    about = (
        f"B = 1, {heads['n_heads']} heads, D = {heads['head_dim']}, {dtype}; the whole layer as called from Python.\n\n"
    )
    return about + table(header, rows) + "\n" + origin(result)


def fp32_tiles() -> str:
    """The fp32 backward pass with several tiles."""
    result = load("fp32_tiles")
    cells = {(r["kernel"], tuple(r["tile"]), r["head_dim"]): f"{r['ms']:.2f}" for r in result["rows"]}
    rows = []
    for kernel, tile in dict.fromkeys(key[:2] for key in cells):
        m, n, warps, stages = tile
        rows.append([f"`{kernel}` {m}×{n}", f"{warps}", f"{stages}", *(cells[kernel, tile, d] for d in (64, 128))])
    return table(["fp32, ms", "warps", "stages", "D = 64", "D = 128"], rows) + "\n" + origin(result)


def counters() -> str:
    """What a profiler counted in one launch of each kernel."""
    result = load("counters")
    calls = iter(("attention", "and scores", "beside sums", "and atomic sums", "before softmax sums", "one query"))
    rows = []
    for r in result["rows"]:
        of = f" ({next(calls)})" if r["kernel"] == "forward_kernel" else ""
        shares = (f"{r[name]:.0f} %" for name in ("tensor_cores", "issue_slots", "dram", "l2_hits"))
        rows.append([f"`{r['kernel']}`{of}", f"{r['ms']:.3f}", *shares, f"{r['registers']:.0f}"])
        rows[-1].append(f"{r['spill_instructions']:,.0f}")
    header = ["kernel", "ms", "tensor cores busy", "issue slots", "DRAM", "L2 hits", "registers", "spill instructions"]
    about = (
        "B = 1, 32 query heads on 8 key heads, N = 4096, D = 128, bf16, causal; one launch of each, by Nsight Compute."
    )
    return about + "\n\n" + table(header, rows) + "\n" + origin(result)


TABLES = (
    forward,
    backward,
    decode,
    fp8,
    operators,
    latency,
    as_called,
    contention,
    accuracy,
    memory,
    flash,
    huggingface,
    counters,
    fp32_tiles,
)
MAKERS = {maker.__name__: maker for maker in (*TABLES, operators_picture, memory_picture)}


def render(page: str) -> str:
    """Return a page with its tables made anew."""
    return MARKER.sub(lambda match: f"{match[1]}{MAKERS[match[2]]()}{match[3]}", page)


def stale_pictures() -> list[str]:
    """Return the names of pictures that show something else than the recorded results."""
    recorded = [name for name in PICTURES if (RESULTS / f"{name}.json").exists() and over_lengths(load(name))]
    return [name for name in recorded if digest_in(RESULTS / f"{name}.png") != digest(load(name))]


def main() -> None:
    for name in stale_pictures():
        draw(name, load(name), RESULTS / f"{name}.png")
    for page in PAGES:
        page.write_text(render(page.read_text()))


if __name__ == "__main__":
    main()
