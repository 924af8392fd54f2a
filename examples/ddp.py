"""Plain DistributedDataParallel: `torchrun --nproc-per-node 2 examples/ddp.py STORE [CHECKPOINT]`.

The reader asks torch.distributed for its rank, so every process reads its own part of the same global batch, which is
the same set of pairs on any number of processes. With a CHECKPOINT the run goes on where it stopped, in the middle of
an epoch and on another number of processes if need be: the reader's state is the same on all ranks, one of them saves
it. Convention: ours, t = 0 the image, t = 1 the noise; the velocity is noise - image. A batch has 128
pairs, so the store has as many or more.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from network import Velocity
from own_trainer import loss
from torch.nn.parallel import DistributedDataParallel

from nfm.storage import PairStore


def train(path: str, checkpoint: Path | None = None, epochs: int = 2, batch_size: int = 128) -> None:
    """Train on all processes of the group, a checkpoint every 10 steps; prints the last loss of every rank."""
    store = PairStore.open(path)
    torch.manual_seed(0)
    model = DistributedDataParallel(Velocity(store.spec.image_shape, store.spec.classes))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    reader = store.batches(batch_size=batch_size, seed=0, epochs=epochs, device="cpu")  # batch_size is global
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        reader.load_state_dict(saved["reader"])

    value = torch.tensor(torch.nan)
    for step, batch in enumerate(reader, start=1):
        value = loss(model, batch.image, batch.noise, batch.label)
        optimizer.zero_grad()
        value.backward()  # DDP averages the gradients of the ranks: equal parts, so it is the global batch's
        optimizer.step()
        if checkpoint is not None and step % 10 == 0:
            save(checkpoint, {"model": model.module, "optimizer": optimizer, "reader": reader})
    if checkpoint is not None:
        save(checkpoint, {"model": model.module, "optimizer": optimizer, "reader": reader})
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: loss {value.item():.4f}")


def save(path: Path, parts: dict[str, Any]) -> None:
    """The parts' states in one file, put in place whole, by rank 0."""
    if dist.get_rank() == 0:
        torch.save({name: part.state_dict() for name, part in parts.items()}, f"{path}.new")
        os.replace(f"{path}.new", path)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    dist.init_process_group("gloo")  # processor; for GPUs nccl, and device=f"cuda:{local rank}" for model and batches
    train(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    gc.collect()  # the model goes before its group: the other way round gloo may hang (pytorch/pytorch#56297)
    dist.destroy_process_group()
