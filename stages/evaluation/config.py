"""The config section [evaluate], and the columns of an evaluation that are speeds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from nfm.stages.base import Guidance, LocalField, Section, added, named_once, operational
from nfm.stages.couplings.variant import Variant
from nfm.stages.trained.devices.precision import Precision
from nfm.stages.trained.devices.where import DeviceField
from nfm.stages.trained.sampling import ALWAYS, DIFFUSIONS, DiffusionName, GridName, SolverName, check_diffusion
from nfm.stages.trained.weights import parse
from nfm.trainers.nfe import pick_solver

CURVATURE_STEPS = 128
SPEEDS = ("images_per_second", "batch", "latency_seconds")

Time = Annotated[float, Field(ge=0, le=1)]


class EvaluateConfig(Section):
    """The `[evaluate]` table. `baselines` are variants whose students are also trained and measured.

    With `guidance` the teacher has guided rows beside its plain ones; with `student_guidance` the students' rows are
    guided, at times of `guidance_interval` alone, and with `reference` they have a row more, of adaptive dopri5.
    `ema` names one of their moving averages, see trained/weights.py. `diffusion` is how much noise a stochastic solver
    adds, "sde-euler" or "sde-heun", see trainers/solvers.py. `features` is where distances are taken: this run's
    classifier, Inception-v3 from `inception_weights`, or none, for points of the plane. `statistics` is a file of
    published ones of Inception's features, to which rows have one distance more.
    """

    baselines: tuple[str, ...] = ()
    solver: SolverName = added("auto")
    grid: GridName = added("square")
    nfe: tuple[int, ...] = Field((31, 15, 7, 5), min_length=1, validate_default=True)
    reference: bool = added(False)
    samples: int = Field(5_000, ge=2)
    features: Literal["cnn", "inception", "none"] = added("cnn")
    inception_weights: LocalField | None = operational(None)
    statistics: LocalField | None = operational(None)
    guidance: Guidance = 0.0
    student_guidance: Guidance = added(0.0)
    guidance_interval: tuple[Time, Time] = added(ALWAYS)
    ema: str | None = added(None)
    diffusion: DiffusionName = added("sigma")
    kid_subsets: int = Field(100, ge=2)
    kid_size: int = Field(1000, ge=2)
    curvature_trajectories: int = Field(256, ge=1)
    seed: int = Field(1, ge=0)
    precision: Precision = "float32"
    batch_size: int = Field(250, ge=1)
    speed_batches: tuple[Annotated[int, Field(ge=1)], ...] = operational((32, 128, 512))
    device: DeviceField = operational("auto")

    def count(self, heldout: int) -> int:
        """Images of a row. The same for all rows, also the floor, because distances of few images are larger."""
        return min(self.samples, heldout)

    def cut(self, heldout: int, train: int) -> list[str]:
        """A sentence for each field that asks for more images than there are, with the number that is used."""
        count = self.count(heldout)
        told = []
        if count < self.samples:
            told.append(
                f"evaluate.samples is {self.samples:,}, and {heldout:,} images are held out: each row has {count:,}"
            )
        if self.features == "none":
            return told
        if (most := min(count, train)) < self.kid_size:
            told.append(f"evaluate.kid_size is {self.kid_size:,}: the subsets of KID have {most:,} images")
        if train < count:
            told.append(f"the training set has {train:,} images: precision, recall, density and coverage use no more")
        return told

    @field_validator("statistics")
    @classmethod
    def _are_of_inception(cls, statistics: str | None, info: ValidationInfo) -> str | None:
        if statistics is not None and info.data.get("features") != "inception":
            raise ValueError('they are of Inception\'s features; set evaluate.features = "inception", or leave it out')
        return statistics

    @field_validator("baselines")
    @classmethod
    def _are_variants(cls, baselines: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(str(Variant.parse(text)) for text in baselines)
        named_once(named)
        return named

    @field_validator("diffusion")
    @classmethod
    def _is_of_a_stochastic_solver(cls, diffusion: str, info: ValidationInfo) -> str:
        if diffusion != DIFFUSIONS[0]:  # the default may be written, as resolved configs do
            check_diffusion(info.data.get("solver", ""), diffusion)
        return diffusion

    @field_validator("ema", mode="before")
    @classmethod
    def _may_be_a_width(cls, ema: Any) -> Any:
        return repr(ema) if type(ema) is float else ema

    @field_validator("ema")
    @classmethod
    def _is_a_name(cls, ema: str | None) -> str | None:
        """In one spelling, since the fingerprint has it."""
        return None if ema is None else str(parse(ema))

    @field_validator("guidance_interval")
    @classmethod
    def _is_an_interval(cls, interval: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if interval[0] >= interval[1]:
            raise ValueError("an interval begins before it ends; t = 0 is the image, t = 1 the noise")
        if interval != ALWAYS and info.data.get("student_guidance") == 0:
            raise ValueError("it says when students are guided, and evaluate.student_guidance is 0; leave it out")
        return interval

    @field_validator("nfe")
    @classmethod
    def _solvers_can(cls, nfe: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        named_once(nfe, "every number of evaluations is one row")
        for count in nfe:
            if "solver" in info.data:
                pick_solver(info.data["solver"], count)
        return nfe
