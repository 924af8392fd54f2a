"""Features: a small classifier of the data set's own labels, whose features the evaluation measures distances in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from nfm.stages.stage import Inputs, Reporter, Result
from nfm.stages.training import (
    CHECKPOINT,
    METRICS,
    WEIGHTS,
    TrainingSection,
    blaming,
    fit,
    parameter_count,
    pick_device,
    read_weights,
    recipe,
)
from nfm.storage import ImageDataset, atomic

if TYPE_CHECKING:
    from nfm.trainers.cnn import FeatureNet

NAME = "features"
VERSION = 1


class FeaturesConfig(TrainingSection):
    """The `[features]` table; `images` is the number of training images seen in all."""

    images: int = Field(300_000, ge=1)
    learning_rate: float = Field(4e-3, gt=0)
    warmup: float = Field(0.1, ge=0, le=1)
    ema: float = Field(0.995, ge=0, lt=1)


def run(config: FeaturesConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Train the classifier and state its accuracy on held-out images."""
    import torch

    from nfm.trainers.checkpoint import pack_weights
    from nfm.trainers.cnn import FeatureNet, classification_loss

    train, heldout = (ImageDataset.open(inputs["data"], split) for split in ("train", "heldout"))
    torch.manual_seed(config.seed)
    channels, height, width = train.image_shape
    with blaming("config section [features]"):
        model = FeatureNet((channels, height, width), len(train.classes))
        batches = train.batches(config.batch_size, seed=config.seed, epochs=None, device=pick_device(config.device))
    trained = fit(model, classification_loss, batches, config, recipe(config, config.images), out, report, "images")
    atomic.write_bytes(out / WEIGHTS, pack_weights(trained.ema, model.architecture))

    network = load(out, pick_device(config.device))
    rows = np.arange(len(heldout))
    accuracy = float((_forward(network, heldout.images(rows), "logits").argmax(1) == heldout.labels(rows)).mean())
    metrics = {
        "heldout_accuracy": round(accuracy, 4),
        "heldout_images": len(heldout),
        "parameters": parameter_count(network),
    }
    return Result(payload=[WEIGHTS], metrics=metrics, files=[CHECKPOINT, METRICS])


def load(folder: Path, device: str = "cpu") -> FeatureNet:
    """The trained network, in evaluation mode."""
    from nfm.trainers.cnn import FeatureNet

    state, architecture = read_weights(folder)
    network = FeatureNet(**architecture)
    network.load_state_dict(state)
    return network.eval().to(device)


def extract(network: FeatureNet, images: np.ndarray) -> np.ndarray:
    """Features [N, F] float32 of uint8 images [N, C, H, W]."""
    return _forward(network, images, "features")


def _forward(network: FeatureNet, images: np.ndarray, what: str, batch_size: int = 500) -> np.ndarray:
    import torch

    device = next(network.parameters()).device
    call = network.features if what == "features" else network
    with torch.inference_mode():
        parts = [
            call(torch.from_numpy(images[start : start + batch_size]).to(device).float() / 127.5 - 1).float().cpu()
            for start in range(0, len(images), batch_size)
        ]
    return torch.cat(parts).numpy()
