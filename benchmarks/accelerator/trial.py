"""From a teacher to a table in pieces of minutes: as much of the method as the time allows, all in memory.

The images are flowers drawn from a seed, or those of an .npz. Each training is as long as the measured rate allows, and
goes on from its checkpoint if the time was shorter. There is no pair store: that would need pyarrow.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accelerator.job import Job, Unfinished
from benchmarks.accelerator.kept import write, write_bytes
from benchmarks.accelerator.rates import short, steps_of, student_loss, teacher_loss
from benchmarks.accelerator.sizes import ETA, Plan
from nfm.trainers import flow_matching, loop, solvers
from nfm.trainers.checkpoint import pack, unpack
from nfm.trainers.couplings.coupling import NFM
from nfm.trainers.metrics.frechet import fit, frechet_distance
from nfm.trainers.metrics.two_sample import two_sample
from nfm.trainers.models.cnn import FeatureNet, classification_loss
from nfm.trainers.models.tarflow import bits_per_dim, denoise, nll_per_dim
from nfm.trainers.nfe import pick_solver
from nfm.trainers.training.checkpoint_folder import CheckpointFolder

NFES = (31, 15, 7, 5, 3, 1)
COUPLINGS = ("independent", "nfm")
CHUNK = 1024  # images at a time
SAVES = 4  # checkpoints of a training


def teacher(job: Job) -> dict[str, Any]:
    """Trains the teacher; its bits per dimension are of the images that are held out."""
    sizes = job.plan.trial
    images, labels = _images(job)[:2]
    flow, told = _trained(job, "teacher", sizes.flow, teacher_loss, sizes.train_batch, 1e-4, images, labels, None)
    heldout, given = _images(job)[2:]
    with torch.inference_mode():
        nats = [nll_per_dim(*flow.encode(x + ETA * _noise(x, 1), y)) for x, y in _parts(heldout, given)]
    return told | {"heldout_bits_per_dim": short(float(bits_per_dim(torch.cat(nats).double().mean())))}


def pairs(job: Job) -> dict[str, Any]:
    """The teacher's noise of every training image, and how far it is from Gaussian (0.5 is not to be told)."""
    flow, (images, labels, *_) = _flow(job), _images(job)
    unscaled = NFM(flow, ETA, 1.0, job.device, _dtype(job))
    eps = _noise(images, 2)
    found = [unscaled(x, y, e).noise for x, y, e in zip(images.split(CHUNK), labels.split(CHUNK), eps.split(CHUNK))]
    noise = torch.cat(found)
    sigma = float(noise.square().mean().sqrt())
    noise = (noise / sigma).cpu()
    write_bytes(job.folder / "pairs.safetensors", pack({"noise": noise}, {"sigma_f": sigma}))
    told = two_sample(noise, labels.cpu(), job.plan.trial.classes, device=job.device, stop=lambda: job.over)
    auc = {} if told is None else {"auc": short(told.auc), "auc_error": short(told.error)}
    return {"pairs": len(noise), "sigma_f": short(sigma), **auc}


def student(job: Job, coupling: str) -> dict[str, Any]:
    """Trains a student on the pairs of a coupling."""
    sizes, (images, labels, *_) = job.plan.trial, _images(job)
    noise = None
    if coupling == "nfm":
        noise = unpack((job.folder / "pairs.safetensors").read_bytes())[0]["noise"].to(job.device)
    batch = sizes.student_batch
    return _trained(job, f"student-{coupling}", sizes.network, student_loss, batch, 3e-4, images, labels, noise)[1]


def table(job: Job) -> dict[str, Any]:
    """Distances of samples to held-out images, in the features of a classifier that is trained here (FD-CNN)."""
    sizes, (images, labels, heldout, given) = job.plan.trial, _images(job)
    half = len(heldout) // 2
    net, told = _trained(
        job, "features", lambda: FeatureNet(sizes.image_shape, sizes.classes), classification_loss, 64, 1e-3, images,
        labels, None, share=0.1,
    )  # fmt: skip

    def features(of: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([net.features(part) for part in of.clamp(-1, 1).split(CHUNK)]).cpu()

    reference = fit(features(heldout[half:]))
    z, y = _noise(heldout[:half], 3), given[:half]
    rows: dict[str, Any] = {"floor": short(frechet_distance(features(heldout[:half]), reference))}
    for coupling in COUPLINGS:
        network = _load(job, f"student-{coupling}", sizes.network)
        row = {}
        for nfe in NFES:
            some = [
                solvers.sample(flow_matching.velocity(network, labels), part, nfe, pick_solver("auto", nfe))
                for part, labels in _parts(z, y)
            ]
            row[str(nfe)] = short(frechet_distance(features(torch.cat(some)), reference))
        path = solvers.curvature(flow_matching.velocity(network, y[:CHUNK]), z[:CHUNK])
        rows[coupling] = {"distance_by_nfe": row, "curvature": short(float(path))}
    flow, facts = _flow(job), unpack((job.folder / "pairs.safetensors").read_bytes())[1]
    some = [denoise(flow, flow.decode(facts["sigma_f"] * part, labels), labels, ETA) for part, labels in _parts(z, y)]
    rows["teacher"] = short(frechet_distance(features(torch.cat(some)), reference))
    return {"samples": half, "features": told, **rows}


def flowers(count: int, shape: tuple[int, int, int], classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] in [-1, 1]: a flower of label + 2 petals, turned, moved and scaled, each its own grey."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    turn, x, y, size, grey = torch.rand(5, count, 1, 1, generator=generator)
    down, across = (torch.linspace(-1, 1, side) for side in shape[1:])
    dy, dx = down[:, None] - 0.4 * (y - 0.5), across[None, :] - 0.4 * (x - 0.5)
    petals = (labels + 2)[:, None, None]
    edge = (0.45 + 0.3 * size) * (1 + 0.35 * torch.cos(petals * (torch.atan2(dy, dx) + 2 * math.pi * turn)))
    inside = torch.sigmoid((edge - torch.hypot(dx, dy)) * max(shape[1:]) / 2)
    return ((0.5 + 0.5 * grey) * inside * 2 - 1)[:, None].expand(-1, *shape).contiguous(), labels


class Batches:
    """Shuffled batches of images in memory without end; without noise of their own, new noise each time."""

    def __init__(self, images: Tensor, labels: Tensor, noise: Tensor | None, size: int) -> None:
        self._images, self._labels, self._noise, self._size, self._taken = images, labels, noise, size, 0

    def __iter__(self) -> Iterator[Any]:
        each = len(self._images) // self._size
        while True:
            epoch, batch = divmod(self._taken, each)
            order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(epoch))
            for rows in order[: each * self._size].split(self._size)[batch:]:
                rows = rows.to(self._images.device)
                self._taken += 1
                image = self._images[rows]
                noise = _noise(image, self._taken) if self._noise is None else self._noise[rows]
                yield SimpleNamespace(image=image, label=self._labels[rows], noise=noise)

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._taken = state["taken"]


def _trained(
    job: Job, name: str, make: Callable[[], Any], loss: loop.Loss, batch: int, rate: float, images: Tensor,
    labels: Tensor, noise: Tensor | None, share: float = 1.0,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """A finished model, of its moving average, and what is told of its training. Raises Unfinished."""
    folder, finished = job.folder / name, job.folder / f"{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if not finished.exists():
        compiled, dtype = job.device.startswith("cuda"), _dtype(job)
        planned = folder / "plan.json"  # made once: the schedule depends on the length
        if not planned.exists():
            batches, seconds = Batches(images, labels, noise, batch), job.plan.seconds
            speed = median(steps_of(make(), loss, next(iter(batches)), batch, job.device, dtype, compiled, seconds))
            count = max(2 * SAVES, round(speed * job.plan.train_seconds * share / batch)) * batch
            write(planned, {"examples": count, "images_per_second": short(speed)})
        told = json.loads(planned.read_text(encoding="utf-8"))
        examples, losses = told["examples"], list[dict[str, float]]()
        recipe = loop.Recipe(examples, batch, rate, warmup_examples=examples // 20)
        torch.manual_seed(0)
        with torch.device(job.device):
            model = make()
        done = loop.train(
            model, loss, Batches(images, labels, noise, batch), recipe, device=job.device, autocast=dtype,
            how=loop.How(compile=compiled), checkpoints=CheckpointFolder(folder), save_every=examples // SAVES,
            log=losses.append, log_every=examples // SAVES, stop=lambda: job.over,
        )  # fmt: skip
        if not done.finished:
            raise Unfinished(f"{done.examples_seen:,} of {examples:,} images")
        last = {key: short(value) for key, value in losses[-1].items() if key in ("loss", "accuracy")}
        write_bytes(finished, pack(done.ema.state_dict(), told | last))
    return _load(job, name, make), unpack(finished.read_bytes())[1]


def _load(job: Job, name: str, make: Callable[[], Any]) -> Any:
    model = make()
    model.load_state_dict(unpack((job.folder / f"{name}.safetensors").read_bytes())[0])
    return model.eval().to(job.device)


def _flow(job: Job) -> Any:
    return _load(job, "teacher", job.plan.trial.flow)


def _images(job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then as many held-out ones as two sets of samples, on the device."""
    images, labels = (part.to(job.device) for part in trial_images(job.plan, job.images))
    end = len(images) - 2 * job.plan.samples
    return images[:end], labels[:end], images[end:], labels[end:]


def trial_images(plan: Plan, path: Path | None) -> tuple[Tensor, Tensor]:
    """All images and labels of a trial. Raises ValueError for a file that does not do, with the remedy."""
    sizes = plan.trial
    if path is None:
        return flowers(plan.images + 2 * plan.samples, sizes.image_shape, sizes.classes, seed=0)
    images, labels = read_images(path, sizes.image_shape, sizes.classes)
    if len(images) < (least := 2 * plan.samples + max(sizes.train_batch, sizes.student_batch)):
        raise ValueError(
            f"{path}: {len(images):,} images, and {least:,} are needed: {2 * plan.samples:,} are held out, the others "
            "are a batch of training at least"
        )
    return images, labels


def read_images(path: Path, shape: tuple[int, int, int], classes: int) -> tuple[Tensor, Tensor]:
    """The arrays `data`, uint8 [N, C, H, W], and `labels`, from 0, of an .npz. Raises ValueError, with the remedy."""
    remedy = "write it with numpy.savez(FILE, data=..., labels=...)"
    try:
        with zipfile.ZipFile(path) as members:
            missing = {"data", "labels"} - {name.removesuffix(".npy") for name in members.namelist()}
        if missing:
            raise ValueError(f"no array {' and no '.join(sorted(missing))}")
        with np.load(path, allow_pickle=False) as arrays:
            data, labels = arrays["data"], arrays["labels"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}; {remedy}") from error
    if data.dtype != np.uint8 or data.shape[1:] != shape or labels.shape != data.shape[:1]:
        wanted = "x".join(map(str, shape))
        raise ValueError(f"{path}: data is {data.dtype} {data.shape}, it must be uint8 of {wanted}, with a label each")
    if labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(f"{path}: {len(labels):,} labels of type {labels.dtype}; {remedy}, whole numbers from 0")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{path}: labels from {labels.min()} to {labels.max()}, they must be from 0 to {classes - 1}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return (torch.from_numpy(data).float() / 127.5 - 1)[order], torch.from_numpy(labels.astype(np.int64))[order]


def _parts(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(images.split(CHUNK), labels.split(CHUNK))


def _noise(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device)


def _dtype(job: Job) -> torch.dtype | None:
    return torch.bfloat16 if job.device.startswith("cuda") else None
