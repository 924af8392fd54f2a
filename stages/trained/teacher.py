"""The teacher: a TarFlow trained by maximum likelihood on x + eta eps', its sigma_f, and its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from pydantic import Field, JsonValue, model_validator

from nfm.stages.base import Inputs, LocalField, Reporter, Result, Unfit, added, operational
from nfm.stages.display.watching.grids import draw_grid
from nfm.stages.trained import costs
from nfm.stages.trained.costs import Cost, Trial
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import Precision, precision_context
from nfm.stages.trained.devices.timing import Clock, cost_of_training
from nfm.stages.trained.foreign import own
from nfm.stages.trained.training import Task, fit, parameter_count
from nfm.stages.trained.training.checkpoints import kept_files
from nfm.stages.trained.training.samples import Samples
from nfm.stages.trained.training.section import (
    TrainingSection,
    blaming,
    check_heldout,
    check_section,
    recipe,
    whole_batches,
)
from nfm.stages.trained.weights import WEIGHTS, read_weights
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
SHOWN = 16  # images of a grid that is drawn while training: an inverse is slow


class Measured(Protocol):
    """How a flow is measured, as far as it changes the result."""

    @property
    def eta(self) -> float: ...

    @property
    def seed(self) -> int: ...

    @property
    def sigma_rows(self) -> int: ...

    @property
    def precision(self) -> Precision: ...


class TeacherConfig(TrainingSection):
    """The `[teacher]` table; `images` is the number of training images seen in all, flips and noise drawn anew.

    `artifact` names a finished teacher, for instance an imported one: nothing is trained then, and its sizes and eta
    stand for the ones here. `model`, with the keywords `options`, is a flow of one's own in place of TarFlow, see
    foreign/own.py. After each `sample_every` images a grid of samples is drawn, never if it is 0.
    """

    images: int = Field(360_000, ge=1)
    patch: int = Field(4, ge=1)
    channels: int = Field(128, ge=1)
    blocks: int = Field(4, ge=1)
    layers: int = Field(4, ge=1)
    head_size: int = Field(64, ge=1)
    eta: float = Field(0.1, gt=0)
    label_drop: float = Field(0.1, ge=0, lt=1)
    flips: bool = False
    learning_rate: float = Field(2e-3, gt=0)
    sigma_rows: int = Field(4096, ge=1)
    measure_rows: int = Field(512, ge=1)
    artifact: LocalField | None = operational(None)
    sample_every: int = operational(0, ge=0)
    model: str | None = added(None)
    options: dict[str, JsonValue] = added({})

    @model_validator(mode="after")
    def _check_own(self) -> Self:
        if self.options and self.model is None:
            raise ValueError(
                "options are the keywords of teacher.model, and there is none: name it as `module:function`, or leave "
                "them out"
            )
        return self


def fits(config: TeacherConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit if sizes do not fit each other or the data, as far as `facts` describe it."""

    def sizes() -> None:
        own.look_for(config, NAME)
        if config.model is not None:
            return
        check_channels(config.channels, config.head_size)
        if "image_shape" in facts:
            check_patch(facts["image_shape"], config.patch)

    check_section(NAME, config, facts, sizes)
    check_heldout(NAME, facts)
    _check_flips(config, facts.get("image_dtype", "uint8"))


def _check_flips(config: TeacherConfig, image_dtype: str) -> None:
    if config.flips and image_dtype != "uint8":
        raise Unfit(
            "teacher.flips = true: these images are latents, and a flipped latent is not the latent of the flipped "
            "image; leave teacher.flips out"
        )


def external(config: TeacherConfig) -> dict[str, str]:
    """The digest of a flow of one's own."""
    return own.digests(config, NAME)


def tries(config: TeacherConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit where a flow of one's own is not what it should be: its code runs here."""
    if "image_shape" in facts:
        shape, classes = facts["image_shape"], facts.get("classes", 1)
        own.check(config, NAME, shape, classes, lambda: build(sizes_of(config, shape, classes)))


def sizes_of(config: TeacherConfig, image_shape: Sequence[int], classes: int) -> dict[str, Any]:
    """What is stored beside the weights."""
    if config.model is not None:
        return own.sizes_of(config, NAME, image_shape, classes)
    names = ("patch", "channels", "blocks", "layers", "head_size")
    return {"image_shape": list(image_shape), "classes": classes} | {name: getattr(config, name) for name in names}


def build(sizes: Mapping[str, Any]) -> Any:
    """The flow of these sizes, untrained: TarFlow, or one of its user's own."""
    from nfm.trainers.models.tarflow import TarFlow

    return own.build(sizes, NAME) if "model" in sizes else TarFlow(**sizes)


def task(config: TeacherConfig, inputs: Inputs, device: str) -> Task:
    """What each process of the training makes."""
    import torch

    train, heldout = (ImageDataset.open(inputs["data"], split) for split in ("train", "heldout"))
    architecture = sizes_of(config, train.image_shape, len(train.classes))
    torch.manual_seed(config.seed)
    with blaming("config section [teacher]"):
        model = build(architecture)
        batches = train.batches(config.batch_size, seed=config.seed, epochs=None, device=device)

    def measure() -> dict[str, float]:
        rows = range(min(config.measure_rows, len(heldout), len(train)))
        return {
            f"{name}_bpd": float(likelihood(model, split, rows, config)[1])
            for name, split in (("train", train), ("heldout", heldout))
        }

    samples = Samples(config.sample_every, SHOWN, _decode, train.dtype) if config.sample_every else None
    return Task(model, _loss(config), batches, architecture, config.images, "images", measure, samples=samples)


def _decode(model: TarFlow, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How images are made of noise while training, when sigma_f is not known yet: it is about 1."""
    return model.decode(noise, labels)


def run(config: TeacherConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Train, measure sigma_f and bits per dimension with the averaged weights, and draw a grid of samples."""
    train, heldout = (ImageDataset.open(inputs["data"], split) for split in ("train", "heldout"))
    _check_flips(config, train.dtype)
    own.announce(own.named(config, NAME), report.say)
    tries(config, {"image_shape": train.image_shape, "classes": len(train.classes)})
    fit(task, config, inputs, out, report)
    averaged, architecture = _weights(out, pick_device(config.device))
    metrics = write_facts(averaged, architecture, config, train, heldout, out, report)
    _draw_samples(averaged, atomic.read_json(out / FACTS), config, out / SAMPLES, train.dtype)
    metrics["images_seen"] = recipe(config, config.images).examples
    return Result(payload=[WEIGHTS, FACTS], metrics=metrics, files=[*kept_files(out), SAMPLES])


def write_facts(
    model: TarFlow, architecture: dict[str, Any], config: Measured, train: ImageDataset, heldout: ImageDataset,
    out: Path, report: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Write a flow's facts, with sigma_f measured on training rows, and give its metrics."""
    rows = range(min(len(train), config.sigma_rows))
    power, train_bpd = likelihood(model, train, rows, config)
    _, heldout_bpd = likelihood(model, heldout, range(min(len(heldout), config.sigma_rows)), config)
    facts = {"eta": config.eta, "sigma_f": power**0.5, "architecture": architecture}
    atomic.write_json(out / FACTS, facts)
    if heldout_bpd - train_bpd > 0.1:
        report.say(
            f"overfitted: {train_bpd:.3f} bits per dimension on training images, {heldout_bpd:.3f} on held-out ones"
        )
    return {
        "heldout_bpd": round(heldout_bpd, 4),
        "train_bpd": round(train_bpd, 4),
        "sigma_f": facts["sigma_f"],
        "parameters": parameter_count(model),
        "measured_rows": len(rows),
        **({} if train.dtype == "uint8" else {"image_dtype": train.dtype}),
    }


def of_artifact(config: TeacherConfig, folder: Path) -> TeacherConfig:
    """The section with the sizes and the eta of a finished teacher, for plans."""
    facts = atomic.read_json(folder / FACTS)
    sizes = {name: value for name, value in facts["architecture"].items() if name in TeacherConfig.model_fields}
    return config.model_copy(update={**sizes, "eta": facts["eta"]})


def cost(config: TeacherConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """What training costs."""
    if config.model is not None:  # a plan runs nobody's code
        return Cost(whole_batches(config, config.images), "images", unknown=own.UNKNOWN_COST)
    shape = facts["image_shape"]
    parameters = costs.teacher_parameters(shape, facts.get("classes", 0), config)
    return cost_of_training(NAME, config, config.images, "images", facts, parameters, trials(config, facts), clock)


def trials(config: TeacherConfig, facts: Mapping[str, Any]) -> list[Trial]:
    """The teacher and shallower ones, to be timed."""
    shape, classes = facts["image_shape"], facts.get("classes", 0)

    def make(of: TeacherConfig) -> tuple[TarFlow, Loss]:
        return build(sizes_of(of, shape, classes)), _loss(config)

    sizes = [{}, {"blocks": 1}, {"blocks": 1, "layers": 1}]
    shallower = [config.model_copy(update=less) for less in sizes]
    return [Trial(costs.teacher_flops(shape, of), partial(make, of)) for of in shallower]


def _loss(config: TeacherConfig) -> Loss:
    from nfm.trainers import likelihood

    def loss(model: TarFlow, batch: Any, random: Randomness) -> tuple[torch.Tensor, dict[str, float]]:
        return likelihood.loss(model, batch.image, batch.label, random, config.eta, config.label_drop, config.flips), {}

    return loss


def load(folder: Path, device: str = "cpu") -> tuple[TarFlow, dict[str, Any]]:
    """The trained flow in evaluation mode, and its facts: eta and sigma_f."""
    return _weights(folder, device)[0], atomic.read_json(folder / FACTS)


def _weights(folder: Path, device: str) -> tuple[TarFlow, dict[str, Any]]:
    """The flow in evaluation mode, and the arguments that it is built with."""
    state, architecture = read_weights(folder)
    model = build(architecture)
    model.load_state_dict(state)
    return model.eval().to(device), architecture


def likelihood(
    model: TarFlow, split: ImageDataset, rows: range, config: Measured, batch_size: int = 256, labels: bool = True
) -> tuple[float, float]:
    """(E[f^2] per dimension, bits per dimension) on these rows with record-keyed noise, labels given or dropped.

    The bits of latents are of their density, not of 8-bit steps, so they may be negative.
    """
    import torch

    from nfm.trainers.models.tarflow import bits_per_dim, nll_per_dim

    device = next(model.parameters()).device
    power = nats = 0.0
    with torch.inference_mode(), precision_context(device.type, config.precision):
        for start in range(0, len(rows), batch_size):
            part = np.asarray(rows[start : start + batch_size])
            z, logdet = encode_rows(model, split, part, config.eta, config.seed, "sigma", labels)
            power += z.double().square().flatten(1).mean(1).sum().item()
            nats += nll_per_dim(z, logdet).double().sum().item()
    bits = bits_per_dim(torch.tensor(nats / len(rows), dtype=torch.float64)).item()
    return power / len(rows), bits if split.dtype == "uint8" else bits - math.log2(127.5)


def encode_rows(
    model: TarFlow, split: ImageDataset, rows: np.ndarray, eta: float, seed: int, purpose: str, labels: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """f(x + eta eps) of these rows, with their labels or all dropped, and the log-determinants.

    eps is a function of (seed, row).
    """
    import torch

    device = next(model.parameters()).device
    image = torch.from_numpy(split.to_float(split.images(rows)))
    eps = philox.normals(seed, 0, rows, image[0].numel(), purpose=purpose).reshape(image.shape)
    noised = (image + eta * torch.from_numpy(eps)).to(device)
    return model.encode(noised, torch.from_numpy(split.labels(rows)).to(device) if labels else None)


def _draw_samples(model: TarFlow, facts: dict[str, Any], config: TeacherConfig, path: Path, image_dtype: str) -> None:
    """A grid of 64 samples, class after class."""

    def decode(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model.decode(facts["sigma_f"] * noise, labels)

    device, built = next(model.parameters()).device, facts["architecture"]
    with precision_context(device.type, config.precision):
        draw_grid(path, decode, built["image_shape"], built["classes"], 64, config.seed, str(device), image_dtype)
