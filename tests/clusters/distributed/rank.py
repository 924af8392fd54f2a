"""One process of a group. It is not told its rank. It reads the store in several ways, trains a little, and saves what
it saw in the folder.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from nfm.storage import PairStore
from nfm.trainers.training import parallel
from tests.clusters.distributed.sequences import record, save
from tests.clusters.distributed.training import BATCH, READERS, STOP, network, train
from tests.support.patience import PATIENCE

WORLD_SIZE = 2


def join_group(how: str, rank: int, folder: Path) -> Any:
    """Joins, with torch.distributed (`plain`) or through Accelerate; returns the Accelerator.

    They meet at a file, since a port that is free when it is picked may be taken when it is bound.
    """
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    os.environ.update({name: str(value) for name, value in group.items()})  # as torchrun sets them
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    timeout = timedelta(seconds=PATIENCE)
    meeting = f"file://{folder / 'meeting'}"
    if how == "plain":
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(init_method=meeting, timeout=timeout)])


def main(how: str, number: int, path: str, folder: Path) -> None:
    """What rank `number` does."""
    accelerator = join_group(how, number, folder)
    rank, store = dist.get_rank(), PairStore.open(path)

    for name, options in READERS.items():
        save(folder / f"{name}.{rank}.npz", record(store.batches(BATCH, seed=3, epochs=3, **options)))

    reader = store.batches(BATCH, seed=3, epochs=3)
    record(islice(reader, STOP))
    (folder / f"state.{rank}.json").write_text(json.dumps(reader.state_dict()))
    reader = store.batches(BATCH, seed=3, epochs=3)
    reader.load_state_dict(json.loads((folder / "state.of-one.json").read_text()))
    save(folder / f"resumed.{rank}.npz", record(reader))

    model = network()
    if accelerator is not None:
        model = accelerator.prepare(model)
        reader = store.batches(BATCH, seed=3)
        accelerator.register_for_checkpointing(reader)
        record(islice(reader, STOP))
        accelerator.save_state(str(folder / "accelerate"))
        accelerator.wait_for_everyone()  # the first process alone saves the reader, and saving waits for nobody
        rest = record(reader)
        accelerator.load_state(str(folder / "accelerate"))
        save(folder / f"loaded.{rank}.npz", record(reader))
        save(folder / f"unbroken.{rank}.npz", rest)
    else:
        model = DistributedDataParallel(model)
        dataset = store.as_torch_dataset(BATCH, seed=3, epochs=2)
        save(folder / f"loader.{rank}.npz", record(DataLoader(dataset, batch_size=None, num_workers=2)))
    train(model, store)
    if rank == 0:
        torch.save(model.module.state_dict(), folder / "weights.pt")
    dist.barrier()
    if accelerator is not None:
        accelerator.free_memory()
    del model
    parallel.release()
    dist.destroy_process_group()
