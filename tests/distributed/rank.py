"""One process of a group: `python tests/distributed/rank.py plain|accelerate STORE FOLDER`.

RANK, WORLD_SIZE and the rendezvous are in the environment, as torchrun sets them. Reads the store in several ways, in
no way told which rank it is, trains a little, and leaves what it saw in the folder.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from sequences import record, save
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training import BATCH, READERS, STOP, network, train

from nfm.storage import PairStore


def main(how: str, path: str, folder: Path) -> None:
    accelerator = None
    if how == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
    else:
        dist.init_process_group("gloo")
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
