"""Features: a small classifier of the data set's labels. The evaluation measures distances between its features.

For data without labels, it learns by how many quarters an image was turned (Gidaris, Singh and Komodakis 2018, arXiv
1803.07728).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, model_validator

from nfm.stages.base import Inputs, Reporter, Result
from nfm.stages.trained import costs
from nfm.stages.trained.costs import Cost, Trial
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.timing import Clock, cost_of_training
from nfm.stages.trained.training import Task, fit, parameter_count
from nfm.stages.trained.training.checkpoints import kept_files
from nfm.stages.trained.training.section import TrainingSection, blaming, check_heldout, check_section
from nfm.stages.trained.weights import WEIGHTS, read_weights
from nfm.storage import ImageDataset
from nfm.trainers.models.sizes import check_sides

if TYPE_CHECKING:
    import torch

    from nfm.trainers.loop import Loss
    from nfm.trainers.models.cnn import FeatureNet
    from nfm.trainers.training.randomness import Randomness

NAME = "features"
VERSION = 1
TURNS = 4  # classes of data without labels


class FeaturesConfig(TrainingSection):
    """The `[features]` table. `images` is the total number of training images seen."""

    images: int = Field(300_000, ge=1)
    learning_rate: float = Field(4e-3, gt=0)
    warmup: float = Field(0.1, ge=0, le=1)
    ema: float = Field(0.995, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_whole_batches(self) -> Self:
        if self.microbatch is not None:
            raise ValueError("microbatch: its batch normalisation wants whole batches; leave it out")
        return self


def fits(config: FeaturesConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit if the classifier cannot take the data, as far as `facts` describe it."""

    def sizes() -> None:
        if "image_shape" in facts:
            check_sides(facts["image_shape"])

    check_section(NAME, config, facts, sizes)
    check_heldout(NAME, facts)


def task(config: FeaturesConfig, inputs: Inputs, device: str) -> Task:
    """What each process of the training makes."""
    import torch

    from nfm.trainers.models.cnn import FeatureNet

    train = ImageDataset.open(inputs["data"], "train")
    torch.manual_seed(config.seed)
    channels, height, width = train.image_shape
    with blaming("config section [features]"):
        model = FeatureNet((channels, height, width), len(train.classes) or TURNS)
        batches = train.batches(config.batch_size, seed=config.seed, epochs=None, device=device)

    return Task(model, _loss(bool(train.classes)), batches, model.architecture, config.images, "images")


def run(config: FeaturesConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Train the classifier and state its accuracy on held-out images."""
    import torch

    train, heldout = (ImageDataset.open(inputs["data"], split) for split in ("train", "heldout"))
    fit(task, config, inputs, out, report)
    network = load(out, pick_device(config.device))
    rows = np.arange(len(heldout))
    images, labels = heldout.images(rows), heldout.labels(rows)
    if not train.classes:
        labels = rows % TURNS
        images = _turned(torch.from_numpy(images), torch.from_numpy(labels)).numpy()
    accuracy = float((_forward(network, images, "logits").argmax(1) == labels).mean())
    metrics = {
        "heldout_accuracy": round(accuracy, 4),
        "heldout_images": len(heldout),
        "parameters": parameter_count(network),
        **({} if train.classes else {"task": "which way is it turned"}),
    }
    return Result(payload=[WEIGHTS], metrics=metrics, files=kept_files(out))


def cost(config: FeaturesConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """What training costs."""
    from nfm.trainers.models.cnn import FeatureNet

    channels, height, width = facts["image_shape"]

    def build() -> FeatureNet:
        return FeatureNet((channels, height, width), facts.get("classes", 0) or TURNS)

    own = costs.counted(build, facts["image_shape"], with_time=False)
    trial = Trial(own.flops, lambda: (build(), _loss(bool(facts.get("classes")))))
    return cost_of_training(NAME, config, config.images, "images", facts, own.parameters, [trial], clock)


def load(folder: Path, device: str = "cpu") -> FeatureNet:
    """The trained network, in evaluation mode."""
    from nfm.trainers.models.cnn import FeatureNet

    state, architecture = read_weights(folder)
    network = FeatureNet(**architecture)
    network.load_state_dict(state)
    return network.eval().to(device)


def _loss(classes: bool) -> Loss:
    """Of the labels, or of how an image was turned where there are none."""
    from nfm.trainers.models.cnn import classification_loss

    def loss(model: FeatureNet, batch: Any, random: Randomness) -> Any:
        if not classes:
            turns = random.integers(TURNS)
            batch = replace(batch, image=_turned(batch.image, turns), label=turns)
        return classification_loss(model, batch, random)

    return loss


def extract(network: FeatureNet, images: np.ndarray) -> np.ndarray:
    """Features [N, F] float32 of images [N, C, H, W]: uint8 pixels, or latents as floats."""
    return _forward(network, images, "features")


def classify(network: FeatureNet, found: np.ndarray) -> np.ndarray:
    """The labels int64 [N] that the network gives to images with these features [N, F] of `extract`."""
    import torch

    with torch.inference_mode():
        return network.head(torch.from_numpy(found).to(network.head.weight.device)).argmax(dim=1).cpu().numpy()


def _forward(network: FeatureNet, images: np.ndarray, what: str, batch_size: int = 500) -> np.ndarray:
    import torch

    device = next(network.parameters()).device
    call = network.features if what == "features" else network
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            values = torch.from_numpy(images[start : start + batch_size]).to(device).float()
            parts.append(call(values / 127.5 - 1 if images.dtype == np.uint8 else values).float().cpu())
    return torch.cat(parts).numpy()


def _turned(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Each image [C, H, W] turned by its number of quarters.

    Non-square images are flipped in one of four ways instead.
    """
    import torch

    out = torch.empty_like(images)
    for turn in range(TURNS):
        of = turns == turn
        if images.shape[-1] == images.shape[-2]:
            out[of] = torch.rot90(images[of], turn, (2, 3))
        else:
            out[of] = images[of].flip([axis for axis, bit in ((-1, 1), (-2, 2)) if turn & bit])
    return out
