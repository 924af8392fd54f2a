"""A new process that goes on with a StatefulDataLoader."""

from __future__ import annotations

from pathlib import Path

import torch

from nfm.storage import PairStore
from tests.clusters.distributed.sequences import record, save
from tests.clusters.distributed.training import loader


def main(path: str, folder: Path, workers: int) -> None:
    """Leaves what a loader yields that begins with the state in the folder."""
    resumed = loader(PairStore.open(path), workers)
    resumed.load_state_dict(torch.load(folder / f"state.{workers}.pt", weights_only=True))
    save(folder / f"resumed.{workers}.npz", record(resumed))
