"""How long a student waits for its pairs: the real training loop on a real store, at the size of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.rows import Array, write_store
from nfm.storage import PairStore

_SHAPE = (1, 28, 28)
_BATCH = 128
_STUDENT = {"patch": 4, "width": 128, "depth": 6, "head_size": 64}  # the default student
_TINY = {"patch": 14, "width": 64, "depth": 1, "head_size": 64}


def trained(
    batches: Any, shape: tuple[int, int, int], student: dict[str, int], examples: int, batch_size: int, device: str,
    log_every: int,
) -> list[dict[str, float]]:  # fmt: skip
    """The lines of a training of a student of such sizes. It closes the batches."""
    import torch

    from nfm.trainers import flow_matching, loop
    from nfm.trainers.models.sit import SiT
    from nfm.trainers.training.randomness import Randomness

    def loss(model: SiT, batch: Any, random: Randomness) -> tuple[torch.Tensor, dict[str, float]]:
        return flow_matching.loss(model, batch.image, batch.noise, batch.label, random), {}

    lines: list[dict[str, float]] = []
    model = SiT(image_shape=shape, classes=10, **student)
    recipe = loop.Recipe(examples=examples, batch_size=batch_size, learning_rate=1e-3)
    loop.train(model, loss, batches, recipe, device=device, unit="pairs", log=lines.append, log_every=log_every)
    batches.close()
    return lines


def waiting(folder: Path, quick: bool) -> dict[str, Any]:
    """The share of a training step that waits for data, once it has begun."""
    import torch

    rng = np.random.default_rng(0)

    def part(start: int, stop: int) -> dict[str, Array]:
        return {
            "image": rng.integers(0, 256, (stop - start, *_SHAPE), np.uint8),
            "noise": rng.standard_normal((stop - start, *_SHAPE), np.float32),
            "label": np.arange(start, stop) % 10,
        }

    root = folder / "student"
    write_store(root, part, 4096)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, warm, steps = (_TINY, 1, 2) if quick else (_STUDENT, 6, 60)
    batches = PairStore.open(root).batches(_BATCH, epochs=None, device=device)
    lines = trained(batches, _SHAPE, student, (steps + warm) * _BATCH, _BATCH, device, log_every=warm * _BATCH)
    measured = lines[1:]
    return {
        "how": f"SiT {student}, batches of {_BATCH} at {_SHAPE}, {device}",
        "steps": len(measured) * warm,
        "seconds_per_step": round((measured[-1]["seconds"] - lines[0]["seconds"]) / (len(measured) * warm), 5),
        "data_wait_share": round(float(np.mean([line["data_wait_share"] for line in measured])), 5),
    }
