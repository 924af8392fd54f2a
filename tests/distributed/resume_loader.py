"""A new process that goes on with a StatefulDataLoader: `python resume_loader.py STORE FOLDER WORKERS...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sequences import record, save
from training import loader

from nfm.storage import PairStore

if __name__ == "__main__":
    path, folder = sys.argv[1], Path(sys.argv[2])
    for workers in sys.argv[3:]:
        resumed = loader(PairStore.open(path), int(workers))
        resumed.load_state_dict(torch.load(folder / f"state.{workers}.pt", weights_only=True))
        save(folder / f"resumed.{workers}.npz", record(resumed))
