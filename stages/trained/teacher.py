"""The teacher: a TarFlow trained by maximum likelihood on x + eta eps', its sigma_f, and its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from nfm.stages.base import Inputs, Reporter, Result, Unfit
from nfm.stages.trained import costs
from nfm.stages.trained.costs import Cost
from nfm.stages.trained.machine import pick_device
from nfm.stages.trained.timing import Clock, Trial, cost_of_training
from nfm.stages.trained.training import (
    WEIGHTS,
    Task,
    TrainingSection,
    blaming,
    check_section,
    fit,
    kept_files,
    parameter_count,
    precision_context,
    read_weights,
    recipe,
)
from nfm.storage import ImageDataset
from nfm.storage.files import atomic
from nfm.storage.format import philox
from nfm.trainers.models.sizes import check_channels, check_patch

if TYPE_CHECKING:
    import torch

    from nfm.trainers.loop import Loss
    from nfm.trainers.models.tarflow import TarFlow
    from nfm.trainers.training.randomness import Randomness

NAME = "teacher"
VERSION = 1
FACTS, SAMPLES = "teacher.json", "samples.png"


class TeacherConfig(TrainingSection):
    """The `[teacher]` table.

    `images` is the total number of training images seen, each with a new flip and new noise.
    """

    images: int = Field(360_000, ge=1)
    patch: int = Field(4, ge=1)
    channels: int = Field(128, ge=1)
    blocks: int = Field(4, ge=1)
    layers: int = Field(4, ge=1)
    head_size: int = Field(64, ge=1)
    eta: float = Field(0.1, gt=0)
    label_drop: float = Field(0.1, ge=0, le=1)
    flips: bool = False
    learning_rate: float = Field(2e-3, gt=0)
    sigma_rows: int = Field(4096, ge=1)
    measure_rows: int = Field(512, ge=1)


def fits(config: TeacherConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit if sizes do not fit each other or the data, as far as `facts` describe it."""

    def sizes() -> None:
        check_channels(config.channels, config.head_size)
        if "image_shape" in facts:
            check_patch(facts["image_shape"], config.patch)

    check_section(NAME, config, facts, sizes)
    _check_flips(config, facts.get("image_dtype", "uint8"))


def _check_flips(config: TeacherConfig, image_dtype: str) -> None:
    if config.flips and image_dtype != "uint8":
        raise Unfit(
            "teacher.flips = true: these images are latents, and a flipped latent is not the latent of the flipped "
            "image; leave teacher.flips out"
        )


def task(config: TeacherConfig, inputs: Inputs, device: str) -> Task:
    """What each process of the training makes."""
    import torch

    from nfm.trainers.models.tarflow import TarFlow

    train, heldout = (ImageDataset.open(inputs["data"], split) for split in ("train", "heldout"))
    architecture = _architecture(config, train.image_shape, len(train.classes))
    torch.manual_seed(config.seed)
    with blaming("config section [teacher]"):
        model = TarFlow(**architecture)
        batches = train.batches(config.batch_size, seed=config.seed, epochs=None, device=device)

    def measure() -> dict[str, float]:
        rows = range(min(config.measure_rows, len(heldout), len(train)))
        return {
            f"{name}_bpd": float(likelihood(model, split, rows, config)[1])
            for name, split in (("train", train), ("heldout", heldout))
        }

    return Task(model, _loss(config), batches, architecture, config.images, "images", measure)


def run(config: TeacherConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Train, measure sigma_f and bits per dimension with the averaged weights, and draw a grid of samples."""
    train, heldout = (ImageDataset.open(inputs["data"], split) for split in ("train", "heldout"))
    _check_flips(config, train.dtype)
    fit(task, config, inputs, out, report)
    averaged, architecture = _weights(out, pick_device(config.device))
    rows = range(min(len(train), config.sigma_rows))
    power, train_bpd = likelihood(averaged, train, rows, config)
    _, heldout_bpd = likelihood(averaged, heldout, range(min(len(heldout), config.sigma_rows)), config)
    facts = {"eta": config.eta, "sigma_f": power**0.5, "architecture": architecture}
    atomic.write_json(out / FACTS, facts)
    _draw_samples(averaged, facts, config, out / SAMPLES, train.dtype)
    metrics = {
        "heldout_bpd": round(heldout_bpd, 4),
        "train_bpd": round(train_bpd, 4),
        "sigma_f": facts["sigma_f"],
        "parameters": parameter_count(averaged),
        "images_seen": recipe(config, config.images).examples,
        "measured_rows": len(rows),
        **({} if train.dtype == "uint8" else {"image_dtype": train.dtype}),
    }
    if heldout_bpd - train_bpd > 0.1:
        report.say(
            f"overfitted: {train_bpd:.3f} bits per dimension on training images, {heldout_bpd:.3f} on held-out ones"
        )
    return Result(payload=[WEIGHTS, FACTS], metrics=metrics, files=[*kept_files(out), SAMPLES])


def cost(config: TeacherConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """What training costs."""
    shape, classes = facts["image_shape"], facts.get("classes", 0)

    def make(of: TeacherConfig) -> tuple[TarFlow, Loss]:
        from nfm.trainers.models.tarflow import TarFlow

        return TarFlow(**_architecture(of, shape, classes)), _loss(config)

    sizes = [{}, {"blocks": 1}, {"blocks": 1, "layers": 1}]
    shallower = [config.model_copy(update=less) for less in sizes]
    trials = [Trial(costs.teacher_flops(shape, of), partial(make, of)) for of in shallower]
    parameters = costs.teacher_parameters(shape, classes, config)
    return cost_of_training(NAME, config, config.images, "images", facts, parameters, trials, clock)


def _architecture(config: TeacherConfig, image_shape: Sequence[int], classes: int) -> dict[str, Any]:
    """What TarFlow is made with, and what stands beside its weights."""
    return {
        "image_shape": list(image_shape), "classes": classes, "patch": config.patch, "channels": config.channels,
        "blocks": config.blocks, "layers": config.layers, "head_size": config.head_size,
    }  # fmt: skip


def _loss(config: TeacherConfig) -> Loss:
    import torch

    from nfm.trainers.models.tarflow import nll_per_dim

    def loss(model: TarFlow, batch: Any, random: Randomness) -> tuple[torch.Tensor, dict[str, float]]:
        image = batch.image
        if config.flips:
            image = torch.where(random.uniform(1, 1, 1) < 0.5, image.flip(-1), image)
        eps = random.normal(*image.shape[1:])
        label = torch.where(random.uniform() < config.label_drop, -1, batch.label)
        return nll_per_dim(*model.encode(image + config.eta * eps, label)).mean(), {}

    return loss


def load(folder: Path, device: str = "cpu") -> tuple[TarFlow, dict[str, Any]]:
    """The trained flow in evaluation mode, and its facts: eta and sigma_f."""
    return _weights(folder, device)[0], atomic.read_json(folder / FACTS)


def _weights(folder: Path, device: str) -> tuple[TarFlow, dict[str, Any]]:
    """The flow in evaluation mode, and the arguments that it is built with."""
    from nfm.trainers.models.tarflow import TarFlow

    state, architecture = read_weights(folder)
    model = TarFlow(**architecture)
    model.load_state_dict(state)
    return model.eval().to(device), architecture


def likelihood(
    model: TarFlow, split: ImageDataset, rows: range, config: TeacherConfig, batch_size: int = 256
) -> tuple[float, float]:
    """(E[f^2] per dimension, bits per dimension) on these rows, with labels and with noise that depends on the record.

    The bits of latents are of their density, not of 8-bit steps, so they may be negative.
    """
    import torch

    from nfm.trainers.models.tarflow import bits_per_dim, nll_per_dim

    device = next(model.parameters()).device
    power = nats = 0.0
    with torch.inference_mode(), precision_context(device.type, config.precision):
        for start in range(0, len(rows), batch_size):
            part = np.asarray(rows[start : start + batch_size])
            z, logdet = encode_rows(model, split, part, config.eta, config.seed, "sigma")
            power += z.double().square().flatten(1).mean(1).sum().item()
            nats += nll_per_dim(z, logdet).double().sum().item()
    bits = bits_per_dim(torch.tensor(nats / len(rows), dtype=torch.float64)).item()
    return power / len(rows), bits if split.dtype == "uint8" else bits - math.log2(127.5)


def encode_rows(
    model: TarFlow, split: ImageDataset, rows: np.ndarray, eta: float, seed: int, purpose: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """f(x + eta eps) of these rows with their labels, and the log-determinants. eps is a function of (seed, row)."""
    import torch

    device = next(model.parameters()).device
    image = torch.from_numpy(split.to_float(split.images(rows)))
    eps = philox.normals(seed, 0, rows, image[0].numel(), purpose=purpose).reshape(image.shape)
    noised = (image + eta * torch.from_numpy(eps)).to(device)
    return model.encode(noised, torch.from_numpy(split.labels(rows)).to(device))


def _draw_samples(model: TarFlow, facts: dict[str, Any], config: TeacherConfig, path: Path, image_dtype: str) -> None:
    """A grid of 64 samples, class after class."""
    import torch

    from nfm.stages.display.pictures import save_grid

    device = next(model.parameters()).device
    slots = np.arange(64)
    shape = facts["architecture"]["image_shape"]
    eps = philox.normals(config.seed, 0, slots, shape[0] * shape[1] * shape[2], purpose="samples")
    labels = torch.arange(64, device=device) % max(facts["architecture"]["classes"], 1)
    with torch.inference_mode(), precision_context(device.type, config.precision):
        images = model.decode(facts["sigma_f"] * torch.from_numpy(eps).reshape(64, *shape).to(device), labels)
    told = labels.cpu().numpy() if facts["architecture"]["classes"] else None
    save_grid(path, images.float().cpu().numpy(), image_dtype=image_dtype, labels=told)
