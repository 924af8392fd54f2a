"""The part of these tests that every process does in the same way, alone or in a group."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from nfm.storage import PairStore

BATCH = 32  # records of all ranks
STOP = 11  # batches before a reader stops: in the middle of an epoch
READERS: dict[str, dict[str, Any]] = {
    "full": {},
    "windowed": {"shuffle": "windowed", "window": 2},
    "kept": {"last": "keep"},
    "filtered": {"filter": [("label", "in", [1, 2, 5])]},
}


def loader(store: PairStore, workers: int) -> StatefulDataLoader:
    """Three epochs through torchdata's loader, whose state resumes them."""
    dataset = store.as_torch_dataset(BATCH, seed=3, epochs=3)
    return StatefulDataLoader(dataset, batch_size=None, num_workers=workers)


def network() -> nn.Linear:
    """The same weights in every process."""
    torch.manual_seed(0)
    return nn.Linear(16, 16)


def train(model: nn.Module, store: PairStore) -> None:
    """An epoch of plain gradient descent on the middle of every pair's line: no chance but the reader's."""
    for batch in store.batches(BATCH, seed=3, device="cpu"):
        image, noise = batch.image.flatten(1), batch.noise.flatten(1)
        (model((image + noise) / 2) - (noise - image)).square().mean().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad
                weight.grad = None
