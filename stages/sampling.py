"""Images from noise: the student by its solvers, the teacher by its inverse, in batches and reproducibly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nfm.stages import student, teacher
from nfm.stages.pictures import save_grid
from nfm.stages.stage import StageError
from nfm.stages.training import blaming, parameter_count, pick_device, precision_context, read_weights
from nfm.storage import ImageDataset, atomic, philox

if TYPE_CHECKING:
    import torch

    from nfm.stages.training import Precision

EULER_UP_TO = 5  # evaluations; Heun above

# noise [B, C, H, W] and labels [B] -> images [B, C, H, W] in [-1, 1]
Decode = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


class Sampler(NamedTuple):
    """A way to make images, with what stands beside every figure of it."""

    name: str
    model: str
    coupling: str | None
    sampler: str
    nfe: int
    guidance: float
    parameters: int
    decode: Decode


def student_sampler(folder: Path, coupling: str, nfe: int, device: str, precision: Precision) -> Sampler:
    """The student at `nfe` evaluations: Euler up to 5, Heun above, times t = u^2."""
    from nfm.trainers import solvers

    model = student.load(folder, device)
    method = "euler" if nfe <= EULER_UP_TO else "heun"

    def decode(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with precision_context(noise.device.type, precision):
            return solvers.sample(velocity(model, labels), noise, nfe, method)

    name = f"student-{coupling}-{method}-{nfe}"
    return Sampler(name, "student", coupling, method, nfe, 0.0, parameter_count(model), decode)


def teacher_sampler(folder: Path, guidance: float, score: bool, device: str, precision: Precision) -> Sampler:
    """The teacher's inverse, with its score step (one evaluation more and a gradient) or without.

    Its NFE counts passes through the whole flow: one for the inverse, whose tokens come one after another.
    """
    from nfm.trainers.tarflow import denoise

    model, facts = teacher.load(folder, device)
    model.requires_grad_(False)

    def decode(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with precision_context(noise.device.type, precision):
            images = model.decode(noise * facts["sigma_f"], labels, guidance)
            return denoise(model, images, labels, facts["eta"]) if score else images

    name = "teacher-score" if score else "teacher"
    method = "inverse+score" if score else "inverse"
    return Sampler(name, "teacher", None, method, 1 + score, guidance, parameter_count(model), decode)


def velocity(model: Any, labels: torch.Tensor) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """The student as the solvers want it: velocity(x, t) for these labels, in float32."""
    import torch

    def call(x: torch.Tensor, t: Any) -> torch.Tensor:
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        return model(x, times, labels).float()

    return call


def draw(
    decode: Decode, source: ImageDataset, count: int, seed: int, batch_size: int, device: str
) -> Iterator[np.ndarray]:
    """Batches of `count` images: the i-th has noise (seed, i) and the label of training row i, for every sampler."""
    import torch

    for start in range(0, count, batch_size):
        slots = np.arange(start, min(start + batch_size, count))
        noise, labels = initial(source, slots, seed, device)
        with torch.no_grad():
            yield decode(noise, labels).float().cpu().numpy()


def initial(source: ImageDataset, slots: np.ndarray, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial noises [B, C, H, W] and labels [B] of samples number `slots`."""
    import torch

    shape = source.image_shape
    eps = philox.normals(seed, 0, slots, int(np.prod(shape)), purpose="samples").reshape(len(slots), *shape)
    labels = source.labels(slots % len(source))
    return torch.from_numpy(eps).to(device), torch.from_numpy(labels).to(device)


def sample_grid(folder: Path, stage: str, count: int, nfe: int, seed: int, path: Path) -> None:
    """Draw `count` images of a finished student or teacher, classes in turn, as one PNG."""
    import torch

    device = pick_device("auto")
    if nfe < 1 or (nfe > EULER_UP_TO and nfe % 2 == 0):
        raise StageError(f"--nfe {nfe}: Heun takes 2N - 1 evaluations, use an odd number above {EULER_UP_TO}")
    if stage == "student":
        sampler = student_sampler(folder, "-", nfe, device, "float32")
    elif stage == "teacher":
        sampler = teacher_sampler(folder, 0.0, True, device, "float32")
    else:
        raise StageError(f"{folder}: a {stage} artifact has no samples; name a student or a teacher")
    _, architecture = read_weights(folder)
    shape = architecture["image_shape"]
    eps = philox.normals(seed, 0, np.arange(count), int(np.prod(shape)), purpose="samples")
    labels = torch.arange(count) % max(architecture["classes"], 1)
    with torch.no_grad(), blaming("--nfe"):
        noise = torch.from_numpy(eps).reshape(count, *shape)
        images = sampler.decode(noise.to(device), labels.to(device)).float().cpu().numpy()
    save_grid(path, images, image_dtype=image_dtype_of(folder))


def image_dtype_of(folder: Path) -> str:
    """The dtype of the images that a finished teacher or student learned from: floats are latents."""
    return atomic.read_json(folder / "manifest.json")["metrics"].get("image_dtype", "uint8")
