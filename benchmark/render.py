"""Writes the recorded results into the pages that show them: `python -m benchmark.render`.

A page holds `<!-- table: NAME -->` and `<!-- /table -->`; what stands between them comes from `results/`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("stage*/README.md"))]
MARKER = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
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


def scores() -> str:
    """Scores, sums and statistics beside plain attention."""
    result = load("scores")
    lengths = sorted({r["n"] for r in result["rows"]})
    cells = {(r["operator"], r["n"]): r for r in result["rows"]}
    rows = []
    for operator in dict.fromkeys(r["operator"] for r in result["rows"]):
        found = [cells[operator, n] for n in lengths]
        rows.append([operator, *(f"{r['ms']:.3f}" for r in found), *(f"{r['ratio']:.2f}×" for r in found)])
    header = ["ms", *(f"N = {n}" for n in lengths), *(f"÷ attention, {n}" for n in lengths)]
    about = "B = 1, 32 query heads on 8 key heads, D = 128, fp16, causal, split at 3N/4; replays of CUDA graphs.\n\n"
    return about + table(header, rows) + "\n" + origin(result)


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
    """Memory beyond inputs and output."""
    result = load("memory")
    rows = [[r["operator"], f"{r['beyond_mb']:.1f} MB", f"{r['scores_mb'] / 1e6:.1f} TB"] for r in result["rows"]]
    header = [f"N = {result['rows'][0]['n']}", "beyond inputs and output", "the matrix would be"]
    return table(header, rows) + "\n" + origin(result)


MAKERS = {maker.__name__: maker for maker in (forward, backward, decode, fp8, scores, contention, accuracy, memory)}


def render(page: str) -> str:
    """Return a page with its tables made anew."""
    return MARKER.sub(lambda match: f"{match[1]}{MAKERS[match[2]]()}{match[3]}", page)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))


if __name__ == "__main__":
    main()
