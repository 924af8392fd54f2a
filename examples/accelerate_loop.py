"""Hugging Face Accelerate: `torchrun --nproc-per-node 2 examples/accelerate_loop.py STORE [FOLDER]`.

On GPUs `accelerate launch` does as well. On processors mind two things: `accelerate launch --cpu` starts one process
whatever --num_processes says, and without `Accelerator(cpu=True)` every process trains a model of its own.

Prepare the model and the optimizer, not the reader: it takes its rank from torch.distributed, which Accelerator sets
up; every process reads its own part of the global batch, and prepared as a data loader it would be split once more. The
reader is registered for checkpoints instead: save_state and load_state then resume it within an epoch. Convention:
ours, t = 0 the image, t = 1 the noise; the velocity is noise - image. A batch has 128 pairs, so
the store has as many or more.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from network import Velocity
from own_trainer import loss

from nfm.storage import PairStore


def train(accelerator: Accelerator, path: str, folder: Path | None, epochs: int = 2, batch_size: int = 128) -> None:
    """Train on all processes, resuming from `folder` where it holds a state; prints the last loss of every rank."""
    store = PairStore.open(path)
    torch.manual_seed(0)
    network = Velocity(store.spec.image_shape, store.spec.classes)
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), 1e-2))
    reader = store.batches(batch_size, seed=0, epochs=epochs, device=accelerator.device)  # batch_size is global
    accelerator.register_for_checkpointing(reader)
    if folder is not None and folder.exists():
        accelerator.load_state(str(folder))

    value = torch.tensor(torch.nan)
    for batch in reader:
        value = loss(model, batch.image, batch.noise, batch.label)
        optimizer.zero_grad()
        accelerator.backward(value)
        optimizer.step()
    if folder is not None:
        accelerator.save_state(str(folder))
    print(f"rank {accelerator.process_index} of {accelerator.num_processes}: loss {value.item():.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    launched = Accelerator(cpu=not torch.cuda.is_available())
    train(launched, sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    launched.free_memory()
    gc.collect()  # the model goes before its group: the other way round gloo may hang (pytorch/pytorch#56297)
    launched.end_training()
