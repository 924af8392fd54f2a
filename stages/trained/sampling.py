"""Images from noise: the student by its solvers, the teacher by its inverse, in batches and reproducibly."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from nfm.stages.base import StageError, Unfit
from nfm.stages.display.watching.grids import draw_grid
from nfm.stages.trained import student, teacher
from nfm.stages.trained.costs import Trial
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import precision_context
from nfm.stages.trained.devices.timing import rate_of_calls
from nfm.stages.trained.foreign import own, vae
from nfm.stages.trained.training import parameter_count
from nfm.stages.trained.training.section import blaming
from nfm.stages.trained.weights import read_weights
from nfm.storage import ImageDataset
from nfm.storage.errors import by
from nfm.storage.files import atomic
from nfm.storage.format import philox
from nfm.trainers.nfe import MOST_NFE as MOST_NFE
from nfm.trainers.nfe import STOCHASTIC, pick_solver

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nfm.stages.trained.devices.precision import Precision
    from nfm.stages.trained.student import StudentConfig
    from nfm.trainers.models.tarflow import Guidance

SolverName = Literal["auto", "euler", "heun", "midpoint", "rk4", "sde-euler", "sde-heun"]
GridName = Literal["square", "uniform"]
DiffusionName = Literal["sigma", "constant", "sin^2", "decreasing"]
SOLVERS, GRIDS, DIFFUSIONS = get_args(SolverName), get_args(GridName), get_args(DiffusionName)
OWN = "own"  # sampler of a student whose user's function it is
REFERENCE = "dopri5"  # whose own error control decides its evaluations
TOLERANCE = 1e-5  # of the reference, relative and absolute

Interval = tuple[float, float]  # of the times at which a student is guided
ALWAYS: Interval = (0.0, 1.0)

Fresh = Callable[[int], "torch.Tensor"]  # further noise of the same records: its number -> [B, C, H, W]


class Decode(Protocol):
    """Noise [B, C, H, W] and labels [B] -> images [B, C, H, W] in [-1, 1]. Stochastic solvers need `fresh`."""

    def __call__(self, noise: torch.Tensor, labels: torch.Tensor, fresh: Fresh | None = None) -> torch.Tensor: ...


class Sampler(NamedTuple):
    """A way to make images, with the facts shown beside its figures. `name` is also used in file names.

    Of the reference solver, and of a sampler of a student's own, `nfe` is 0 and `taken` is a list to which every batch
    adds the evaluations that it took.
    """

    name: str
    model: str
    coupling: str | None
    sampler: str
    nfe: int
    guidance: float
    parameters: int
    decode: Decode
    taken: list[int] | None = None


def student_sampler(
    folder: Path,
    nfe: int,
    device: str,
    precision: Precision,
    solver: str = "auto",
    grid: str = "square",
    guidance: float = 0.0,
    interval: Interval = ALWAYS,
    ema: str | None = None,
    diffusion: str = "sigma",
) -> Sampler:
    """The student, or its moving average `ema`, with `nfe` evaluations of its velocity.

    With guidance, each is done with and without labels.

    Its row is named after the variant of its manifest. Raises ValueError for an NFE that the solver cannot have,
    StageError for guidance of a student that cannot be without labels, and for one with a sampler of its own.
    """
    from nfm.trainers import solvers
    from nfm.trainers.flow_matching import velocity

    if has_own_sampler(folder):
        raise Unfit(f"{folder}: this student has a sampler of its own and no velocity that a solver could follow")
    method = pick_solver(solver, nfe)
    model, variant = _student(folder, device, guidance, ema)

    def decode(noise: torch.Tensor, labels: torch.Tensor, fresh: Fresh | None = None) -> torch.Tensor:
        with precision_context(noise.device.type, precision):
            guided = velocity(model, labels, guidance, interval)
            return solvers.sample(guided, noise, nfe, method, grid, fresh, diffusion)

    name = _row_of(variant, f"{method}-{nfe}", ema)
    return Sampler(name, "student", variant, method, nfe, guidance, parameter_count(model), decode)


def reference_sampler(
    folder: Path,
    device: str,
    precision: Precision,
    guidance: float = 0.0,
    interval: Interval = ALWAYS,
    ema: str | None = None,
) -> Sampler:
    """The student's own limit: adaptive dopri5 to a tolerance of 1e-5, which takes the evaluations that it needs.

    Raises StageError for guidance of a student that cannot run without labels, or if torchdiffeq is missing.
    """
    from nfm.trainers import solvers
    from nfm.trainers.flow_matching import velocity

    find_reference_solver()
    model, variant = _student(folder, device, guidance, ema)
    name = _row_of(variant, REFERENCE, ema)
    taken: list[int] = []

    def decode(noise: torch.Tensor, labels: torch.Tensor, fresh: Fresh | None = None) -> torch.Tensor:
        try:
            with precision_context(noise.device.type, precision):
                guided = velocity(model, labels, guidance, interval)
                images, nfe = solvers.dopri5(guided, noise, TOLERANCE, TOLERANCE)
        except AssertionError as error:  # torchdiffeq's own: no step is small enough
            raise StageError(
                f"row {name}: {REFERENCE} cannot reach its tolerance of {TOLERANCE} ({error}); "
                + ("" if precision == "float32" else 'use evaluate.precision = "float32", or ')
                + "leave evaluate.reference out"
            ) from error
        taken.append(nfe)
        return images

    return Sampler(name, "student", variant, REFERENCE, 0, guidance, parameter_count(model), decode, taken)


def in_pixels(sampler: Sampler, decoder: Callable[[torch.Tensor], torch.Tensor] | None) -> Sampler:
    """The sampler of images, where it makes latents that `decoder` turns into images."""
    if decoder is None:
        return sampler
    latents, decoded = sampler.decode, decoder

    def decode(noise: torch.Tensor, labels: torch.Tensor, fresh: Fresh | None = None) -> torch.Tensor:
        return decoded(latents(noise, labels, fresh))

    return sampler._replace(decode=decode)


def check_diffusion(solver: str, diffusion: str) -> None:
    """Raises ValueError for a diffusion that was asked for where a solver adds no noise."""
    if solver not in STOCHASTIC:
        raise ValueError(f"{diffusion!r} is of solvers that add noise, {' and '.join(STOCHASTIC)}")


def has_own_sampler(folder: Path) -> bool:
    """Whether a finished student is sampled by its user's own function."""
    return atomic.read_json(folder / "manifest.json").get("config", {}).get("sampler") is not None


def own_sampler(
    folder: Path, device: str, precision: Precision, guidance: float = 0.0, ema: str | None = None
) -> Sampler:
    """A student by its user's own sampler, whose NFE is how often it calls the network, counted.

    Raises StageError for guidance, which it does not have, and where its file is not the one that it was made with.
    """
    if guidance:
        raise Unfit(
            f"{folder}: this student is sampled by a function of its own, which has no guidance; use guidance 0"
        )
    function = own.sampler_of(folder)
    model, variant = _student(folder, device, 0.0, ema)
    taken: list[int] = []
    calls = [0]
    model.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))

    def decode(noise: torch.Tensor, labels: torch.Tensor, fresh: Fresh | None = None) -> torch.Tensor:
        calls[0] = 0
        with precision_context(noise.device.type, precision):
            images: torch.Tensor = function(model, noise, labels)
        if images.shape != noise.shape:
            raise StageError(f"{folder}: its sampler gave {by(images.shape)} for noise {by(noise.shape)}; mend it")
        taken.append(calls[0])
        return images

    name = _row_of(variant, OWN, ema)
    return Sampler(name, "student", variant, OWN, 0, 0.0, parameter_count(model), decode, taken)


def find_reference_solver() -> None:
    """Raises StageError with the remedy if torchdiffeq is missing."""
    if importlib.util.find_spec("torchdiffeq") is None:
        raise Unfit("evaluate.reference = true needs torchdiffeq, which is not installed: pip install torchdiffeq")


def teacher_sampler(
    folder: Path, guidance: float | Guidance, score: bool, device: str, precision: Precision
) -> Sampler:
    """The teacher's inverse, with its score step (one evaluation more and a gradient) or without.

    Its NFE counts passes through the whole flow: one for the inverse, which computes its tokens one after another.
    """
    from nfm.trainers.models.tarflow import Guidance, TarFlow, denoise

    guided = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    model, facts = teacher.load(folder, device)
    model.requires_grad_(False)
    if not isinstance(model, TarFlow) and guided.strength:
        raise Unfit(f"{folder}: this teacher is a flow of its user's own, which has no guidance; use guidance 0")
    decoded = functools.partial(model.decode, guidance=guided) if isinstance(model, TarFlow) else model.decode

    def decode(noise: torch.Tensor, labels: torch.Tensor, fresh: Fresh | None = None) -> torch.Tensor:
        with precision_context(noise.device.type, precision):
            images = decoded(noise * facts["sigma_f"], labels)
            return denoise(model, images, labels, facts["eta"]) if score else images

    name = "-".join(["teacher", *(["guided"] if guided.strength else []), *(["score"] if score else [])])
    method = "inverse+score" if score else "inverse"
    return Sampler(name, "teacher", None, method, 1 + score, guided.strength, parameter_count(model), decode)


def evaluations_per_second(
    config: StudentConfig, facts: Mapping[str, Any], device: str, precision: Precision, batch_size: int, guidance: float
) -> float:
    """Images a second whose velocity a student of these sizes and random weights gives once, for a plan."""
    import torch

    from nfm.trainers.flow_matching import velocity

    def make(trial: Trial) -> Callable[[int], object]:
        model = trial.make()[0].eval().to(device)
        noise = torch.randn(batch_size, *facts["image_shape"], device=device)
        labels = torch.randint(max(facts.get("classes", 0), 1), (batch_size,), device=device)

        def call(count: int) -> object:
            with torch.inference_mode(), precision_context(noise.device.type, precision):
                return velocity(model, labels[:count], guidance)(noise[:count], 0.5).cpu()

        return call

    passes = 2 if guidance else 1
    trials = [Trial(passes * each.flops, partial(make, each)) for each in student.trials(config, facts)]
    return rate_of_calls(trials, batch_size, device, precision)


def _student(folder: Path, device: str, guidance: float, ema: str | None) -> tuple[nn.Module, str]:
    """A finished student that can be sampled with this guidance, and the name of its rows."""
    model = student.load(folder, device, ema)
    if guidance:
        _can_be_guided(folder)
    return model, variant_of(folder)


def variant_of(folder: Path) -> str:
    """What a finished student was trained on: its variant, or its coupling if it is older than variants."""
    metrics = atomic.read_json(folder / "manifest.json")["metrics"]
    return metrics.get("variant") or metrics["coupling"]


def _row_of(variant: str, method: str, ema: str | None) -> str:
    """The name of a row, also in file names."""
    average = "" if ema is None else f"-ema-{ema}"
    return f"student-{variant}-{method}{average}".translate(str.maketrans(":=/", "---"))


def _can_be_guided(folder: Path) -> None:
    _, architecture = read_weights(folder)
    label_drop = atomic.read_json(folder / "manifest.json")["config"].get("label_drop", 0)
    if not architecture["classes"]:
        raise Unfit(f"{folder}: this student knows no classes, so nothing can guide it; use guidance 0")
    if not label_drop:
        raise Unfit(
            f"{folder}: this student was trained with label_drop = 0 and is undefined without labels; "
            "use guidance 0, or train it with student.label_drop = 0.1"
        )


def draw(
    decode: Decode, source: ImageDataset, count: int, seed: int, batch_size: int, device: str
) -> Iterator[np.ndarray]:
    """Batches of `count` images. For every sampler, image i has noise (seed, i) and the label of training row i."""
    import torch

    for start in range(0, count, batch_size):
        slots = np.arange(start, min(start + batch_size, count))
        noise, labels = initial(source, slots, seed, device)
        with torch.no_grad():
            yield decode(noise, labels, fresh_noise(seed, slots, noise)).float().cpu().numpy()


def initial(source: ImageDataset, slots: np.ndarray, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial noises [B, C, H, W] and labels [B] of the samples with the numbers `slots`."""
    import torch

    shape = source.image_shape
    eps = philox.normals(seed, 0, slots, int(np.prod(shape)), purpose="samples").reshape(len(slots), *shape)
    labels = source.labels(slots % len(source))
    return torch.from_numpy(eps).to(device), torch.from_numpy(labels).to(device)


def fresh_noise(seed: int, slots: np.ndarray, like: torch.Tensor) -> Fresh:
    """What a stochastic solver adds to the samples with the numbers `slots`: each has its own, whatever the batch."""
    import torch

    def fresh(step: int) -> torch.Tensor:
        eps = philox.normals(seed, step, slots, like[0].numel(), purpose="diffusion")
        return torch.from_numpy(eps).view(like.shape).to(like.device)

    return fresh


def sample_grid(
    folder: Path,
    stage: str,
    count: int,
    nfe: int,
    seed: int,
    path: Path,
    solver: str = "auto",
    grid: str = "square",
    guidance: float = 0.0,
    guided: Mapping[str, Any] | None = None,
    ema: str | None = None,
    diffusion: str = "sigma",
    latents: Path | None = None,
) -> None:
    """Draws `count` images of a finished student or teacher, class by class, as one picture with titles.

    Its format is that of the path's ending. `guided` are further options of the guidance: `interval` of a student's,
    those of `tarflow.Guidance` of a teacher's. `ema` names a moving average of a student. `latents` are those that
    it was trained on, whose VAE decodes; without them latents are shown in false colours.
    """
    from nfm.trainers.models.tarflow import Guidance

    device = pick_device("auto")
    if stage == "student" and has_own_sampler(folder):
        sampler = own_sampler(folder, device, "float32", guidance, ema)
    elif stage == "student":
        with blaming("--nfe"):
            how = {**(guided or {}), "ema": ema, "diffusion": diffusion}
            sampler = student_sampler(folder, nfe, device, "float32", solver, grid, guidance, **how)
    elif stage == "teacher":
        with blaming("--guidance"):
            sampler = teacher_sampler(folder, Guidance(guidance, **(guided or {})), True, device, "float32")
    else:
        raise Unfit(f"{folder}: no samples come from an artifact of {stage}; name a student or a teacher")
    if latents is not None:
        sampler = in_pixels(sampler, vae.of_artifact(latents, device)[0].decode)
    _, built = read_weights(folder)

    def decode(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images = sampler.decode(noise, labels, fresh_noise(seed, np.arange(count), noise))
        if bad := count - int(images.isfinite().flatten(1).all(1).sum()):
            raise StageError(
                f"{folder}: {bad} of {count} samples have values that are not finite: guide less, and look at the loss "
                "of its training in metrics.jsonl; nothing is drawn"
            )
        return images

    with blaming("--solver, --grid"):
        shown = image_dtype_of(folder) if latents is None else "uint8"
        draw_grid(path, decode, built["image_shape"], built["classes"], count, seed, device, shown)


def image_dtype_of(folder: Path) -> str:
    """The dtype of the images that a finished teacher or student was trained on. Floats mean latents."""
    return atomic.read_json(folder / "manifest.json")["metrics"].get("image_dtype", "uint8")
