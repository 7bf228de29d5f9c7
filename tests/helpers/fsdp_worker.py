"""Take three training steps on sharded weights, by the arithmetic of `train_accelerate.take_step`.

`test_distributed.py` starts this file with torchrun on one and on two processes, and compares the numbers.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # tests and the root
from helpers.models import make_model, make_pixels, make_prompt  # noqa: E402


def main(path: str) -> None:
    """Train, and write loss and gradient norm of each step to the JSON file `path`."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model().train()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lengths = (6, 9, 4, 7)  # rows with different numbers of answers: a mean of means would differ
    metrics = []
    for step in range(3):
        rows = [make_prompt(2, "image", length + step) for length in lengths]
        answers, loss_sum = sum(row.shape[1] - 1 for row in rows), torch.zeros(())
        for i in range(rank, len(rows), world):
            model.set_requires_gradient_sync(i + world >= len(rows)) if world > 1 else None
            pixels = make_pixels(1, seed=10 * step + i)
            loss = model(
                input_ids=rows[i], pixel_values=pixels, labels=rows[i], use_cache=False, num_items_in_batch=answers
            ).loss
            (loss * world).backward()
            loss_sum += loss.detach()
        dist.all_reduce(loss_sum)
        norm = clip_grad_norm_(model.parameters(), 1.0)
        metrics.append([loss_sum.item(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()])
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        Path(path).write_text(json.dumps(metrics))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
