"""Two ranks of a tensor parallel model on the CPU: their scores, side by side, are those of the whole model.

    python tests/huggingface_tensor_parallel.py FOLDER

FOLDER has a saved model, its input and its scores in one process. The ranks are forked, with torchrun's environment
variables, because starting Python thrice takes longer than all they do.
"""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM

from flash_attention_with_scores.huggingface import get_all_cumulative_scores, replace_attention_with_flash

RANKS = 2


def check(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{RANKS}", "LOCAL_WORLD_SIZE": f"{RANKS}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    replace_attention_with_flash(model)
    expected = torch.load(folder / "expected.pt")
    output = model.generate(expected["ids"], attention_mask=expected["mask"], max_new_tokens=4, do_sample=False)
    assert torch.equal(output, expected["output"]), "other tokens than in one process"
    for path, scores in get_all_cumulative_scores(model).items():
        whole = expected["scores"].pop(path)
        parts = [torch.empty_like(scores) for _ in range(RANKS)]
        assert scores.shape[1] * RANKS == whole.shape[1], "heads are not spread over the ranks"
        dist.all_gather(parts, scores.contiguous())
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert not expected["scores"], "layers without scores"
    print(f"rank {rank} is right")
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        free_port = free.getsockname()[1]
    start_processes(check, (Path(sys.argv[1]), free_port), RANKS, start_method="fork")
