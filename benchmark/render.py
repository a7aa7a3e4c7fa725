"""Writes the recorded results into the pages that show them: `python -m benchmark.render`.

A page holds `<!-- table: NAME -->` and `<!-- /table -->`; what stands between them comes from `results/`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = [ROOT / "README.md", ROOT / "stage2_triton_forward" / "README.md"]
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
    result = load("forward")
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


def render(page: str) -> str:
    """Return a page with its tables made anew."""
    makers = {"forward": forward, "decode": decode, "fp8": fp8}
    return MARKER.sub(lambda match: f"{match[1]}{makers[match[2]]()}{match[3]}", page)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))


if __name__ == "__main__":
    main()
