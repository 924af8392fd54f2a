"""The config file: one TOML a run, validated, with `--set section.key=value` on top."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nfm.stages.data.stage import DataConfig
from nfm.stages.evaluation.compare import CompareConfig
from nfm.stages.evaluation.distances import EXACT_VALUES
from nfm.stages.evaluation.stage import EvaluateConfig
from nfm.stages.pairs.stage import PairsConfig
from nfm.stages.report.stage import ReportConfig
from nfm.stages.trained.features import FeaturesConfig
from nfm.stages.trained.potential import PotentialConfig
from nfm.stages.trained.student import StudentConfig
from nfm.stages.trained.teacher import TeacherConfig
from nfm.storage.errors import Told
from nfm.storage.files.paths import local_path

PLANAR = ("checkerboard", "gaussians")  # sources of points [1, 1, 2] without classes


class ConfigError(Told):
    """The config or its overrides are wrong; exit code 2."""


class RunConfig(BaseModel):
    """A section a stage; what a config file leaves out keeps the stage's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    potential: PotentialConfig = Field(default_factory=PotentialConfig)
    pairs: PairsConfig = Field(default_factory=PairsConfig)
    student: StudentConfig = Field(default_factory=StudentConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)

    @model_validator(mode="after")
    def _can_be_evaluated(self) -> Self:
        """What no evaluation of this run could do, told before anything is trained."""
        measured, values = self.evaluate, values_an_image(self.data)
        planar = self.data.source in PLANAR
        if measured.features == "none" and (values or 0) > EXACT_VALUES:
            raise ValueError(
                f'evaluate.features = "none" compares values directly, which says something of up to {EXACT_VALUES} of '
                f'them; images of data.source = "{self.data.source}" have {values}: use evaluate.features = "cnn"'
            )
        if measured.features == "inception" and planar:
            raise ValueError(
                f'evaluate.features = "inception" takes pictures, data.source = "{self.data.source}" has points of the '
                'plane: use evaluate.features = "none"'
            )
        if measured.student_guidance and planar:
            raise ValueError(
                f"evaluate.student_guidance = {measured.student_guidance}: points of the plane have no classes, so "
                "nothing can guide a student; leave it out"
            )
        if measured.student_guidance and not self.student.label_drop:
            raise ValueError(
                f"evaluate.student_guidance = {measured.student_guidance} needs students that were trained without "
                "labels too; set student.label_drop = 0.1, or leave it out"
            )
        return self


def values_an_image(data: DataConfig) -> int | None:
    """How many values an image has, where the config alone tells; None where the input decides."""
    if data.source in PLANAR:
        return 2
    if data.source == "digits":
        return (8 // data.average) ** 2
    if data.source == "images" and data.image_size is not None:
        return data.channels * (data.image_size // data.average) ** 2
    return None


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read and validate a config file; `overrides` are `section.key=value` with a TOML value or a bare word."""
    path = local_path(path)
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file{_config_hint(path)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"config {path}: " + "\n  ".join(lines)) from None


def _config_hint(path: Path) -> str:
    known = sorted(str(found) for found in Path("configs").glob("*.toml"))
    close = difflib.get_close_matches(str(path), known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}" if known else ""


def _apply(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or len(parts) != 2 or not all(parts):
        raise ConfigError(f"--set {override}: write section.key=value, for instance pairs.draws=4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section = raw.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(f"--set {override}: {parts[0]} is no section of the config")
    section[parts[1]] = value


def _explain(problem: Any) -> str:
    """One line a problem, with the nearest known key where one was misspelt."""
    where = [str(part) for part in problem["loc"]]
    if not where:  # of sections that do not fit each other, which the message names
        return str(problem["ctx"]["error"]) if "ctx" in problem else str(problem["msg"])
    field = ".".join(where)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(where[:-1])
        close = difflib.get_close_matches(where[-1], known, 1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*where[:-1], close[0]])}?" if close else f"known are {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{field}: missing; add it to the config"
    return f"{field} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"


def _known_keys(section: list[str]) -> list[str]:
    model: Any = RunConfig
    for name in section:
        model = model.model_fields[name].annotation
    return list(model.model_fields)
