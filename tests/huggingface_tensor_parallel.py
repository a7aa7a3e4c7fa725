"""One rank of a tensor parallel model under torchrun: its scores, gathered over the heads, are the whole model's.

    torchrun --nproc-per-node 2 tests/huggingface_tensor_parallel.py FOLDER

FOLDER has a saved model, its input and its scores in one process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from flash_attention_with_scores.huggingface import get_all_cumulative_scores, replace_attention_with_flash


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    replace_attention_with_flash(model)
    expected = torch.load(folder / "expected.pt")
    output = model.generate(expected["ids"], attention_mask=expected["mask"], max_new_tokens=4, do_sample=False)
    assert torch.equal(output, expected["output"]), "other tokens than in one process"
    for path, scores in get_all_cumulative_scores(model).items():
        whole = expected["scores"].pop(path)
        parts = [torch.empty_like(scores) for _ in range(dist.get_world_size())]
        assert scores.shape[1] * len(parts) == whole.shape[1], "heads are not spread over the ranks"
        dist.all_gather(parts, scores.contiguous())
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert not expected["scores"], "layers without scores"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
