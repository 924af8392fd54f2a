"""The config file: one TOML file for a run, checked, with `--set section.key=value` on top."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nfm.stages.data.config import DataConfig
from nfm.stages.data.latents.config import LatentsConfig
from nfm.stages.data.sources import SOURCES
from nfm.stages.data.sources.planar import POINT
from nfm.stages.evaluation.compare import CompareConfig
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.evaluation.distances import EXACT_VALUES
from nfm.stages.pairs.config import PairsConfig
from nfm.stages.report.stage import ReportConfig
from nfm.stages.trained.features import FeaturesConfig
from nfm.stages.trained.potential import PotentialConfig
from nfm.stages.trained.student import StudentConfig
from nfm.stages.trained.teacher import TeacherConfig
from nfm.storage.errors import WrongUse
from nfm.storage.files.paths import local_path


class ConfigError(WrongUse):
    """The config or its overrides are wrong; exit code 2."""


class RunConfig(BaseModel):
    """One section for each stage. Fields that a config file leaves out have the stage's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig
    latents: LatentsConfig = Field(default_factory=LatentsConfig)
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
        """Refuses evaluations that cannot work, before anything is trained."""
        measured, values = self.evaluate, math.prod(image_shape(self.data) or (0,))
        planar = image_shape(self.data) == POINT
        if measured.features == "none" and values > EXACT_VALUES:
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
        if measured.student_guidance and self.student.sampler is not None:
            raise ValueError(
                f"evaluate.student_guidance = {measured.student_guidance}: student.sampler = {self.student.sampler!r} "
                "samples, which has no guidance; leave it out"
            )
        if measured.reference and self.student.sampler is not None:
            raise ValueError(
                "evaluate.reference is of a student's velocity, and student.sampler = "
                f"{self.student.sampler!r} samples, which has none that is known: leave it out"
            )
        if measured.student_guidance and not self.student.label_drop:
            raise ValueError(
                f"evaluate.student_guidance = {measured.student_guidance} needs students that were trained without "
                "labels too; set student.label_drop = 0.1, or leave it out"
            )
        if measured.ema is not None:
            try:
                self.student.parts_of(measured.ema)
            except ValueError as error:
                raise ValueError(f"evaluate.ema = {error}") from None
        return self


def image_shape(data: DataConfig) -> tuple[int, int, int] | None:
    """[C, H, W] if the config alone determines it; None if the input does."""
    shape_of = getattr(SOURCES[data.source], "shape_of", None)
    return shape_of(data) if shape_of else None


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads and checks a config file. `overrides` are `section.key=value` with a TOML value or a plain word."""
    path = local_path(path)
    raw = _read(path)
    given = dict(_apply(raw, override) for override in overrides)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        of_whom: dict[str, list[Any]] = {}
        for problem in error.errors():
            of_whom.setdefault(_to_blame(problem["loc"], given, path), []).append(problem)
        raise ConfigError(
            "\n".join(f"{who}: " + "\n  ".join(_explained(problems)) for who, problems in of_whom.items())
        ) from None


def _to_blame(place: tuple[Any, ...], given: Mapping[tuple[str, ...], str], path: Path) -> str:
    """Where a wrong value was written: an option, or the file with the options of the same section beside it."""
    if (told := given.get(place[:2])) is not None:
        return told
    beside = [told for where, told in given.items() if place in ((), where[:1])]
    if beside and place and place[0] not in RunConfig.model_fields:
        return beside[0]  # no section of that name, which the option brought in
    return f"config {path}" + (f" with {', '.join(beside)}" if beside else "")


def _read(path: Path) -> dict[str, Any]:
    """The tables of the file. TOML is UTF-8 for any locale; some editors add a byte-order mark at the start."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file{_config_hint(path)}") from None
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror}); name the run's TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config {path}: not valid TOML: byte {error.start} is no UTF-8; save the file as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {path}: not valid TOML: {error}") from None


def _config_hint(path: Path) -> str:
    known = sorted(str(found) for found in Path("configs").glob("*.toml"))
    close = difflib.get_close_matches(str(path), known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}" if known else ""


class Override(str):
    """An override of the config that another option than `--set` makes: `told` is that option, as a user writes it."""

    told: str

    def __new__(cls, text: str, told: str) -> Self:
        made = super().__new__(cls, text)
        made.told = told
        return made


def _apply(raw: dict[str, Any], override: str) -> tuple[tuple[str, ...], str]:
    """Puts an override into the config; returns its section and key, and the option as it was given.

    A key may be a table: `student.options.width=64` sets one word of it.
    """
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {override}: write section.key=value, for instance pairs.draws=4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table: Any = raw
    for depth, name in enumerate(parts[:-1], 1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            what = "section of the config" if depth == 1 else f"table: the config says {table!r}"
            raise ConfigError(f"--set {override}: {'.'.join(parts[:depth])} is no {what}")
    table[parts[-1]] = value
    return tuple(parts[:2]), getattr(override, "told", f"--set {override}")


_OWN_WORDS = {"tuple_type": "write a list, [...]", "too_short": "name one at least"}  # by pydantic's kind of problem


def _explained(problems: Iterable[Any]) -> Iterator[str]:
    """One line for each field with everything wrong about it, and the nearest known key for a misspelt one."""
    of_fields: dict[str, list[str]] = {}
    for problem in problems:
        where, said = _field(problem["loc"]), str(problem["msg"]).removeprefix("Value error, ")
        if not where:  # of sections that do not fit each other; the message names them
            yield said
        elif len(where) == 1 and isinstance(problem["input"], dict) and problem["type"] == "value_error":
            yield f"{where[0]}: {said}"  # of fields that do not fit each other
        elif problem["type"] == "extra_forbidden":
            yield f"{'.'.join(where)}: unknown key; {_nearest(where)}"
        elif problem["type"] == "model_type" and len(where) == 1:
            yield f"{where[0]} = {problem['input']!r}: is a section; write [{where[0]}] and its keys below"
        elif problem["type"] == "missing":
            yield f"{'.'.join(where)}: missing; add it to the config"
        else:
            if problem["type"] == "too_short" and problem["input"]:
                continue  # each value in it cannot be, and is told by itself
            said = _OWN_WORDS.get(problem["type"], said)
            of_fields.setdefault(f"{'.'.join(where)} = {problem['input']!r}", []).append(said)
    for field, reasons in of_fields.items():
        yield f"{field}: {', or: '.join(reasons)}"


def _field(place: Iterable[Any]) -> list[str]:
    """The words of a position in the config, without the checker's names for kinds of values."""
    words: list[str] = [str(part) for part in place]
    field = RunConfig.model_fields.get(words[0]) if words else None
    names = getattr(field.annotation, "model_fields", {}) if field is not None else {}
    if len(words) > 1 and words[1] in names:
        words = [*words[:2], *(word for word in words[2:] if not _is_tag(word))]
    return words


def _is_tag(word: str) -> bool:
    return "[" in word or word.startswith(("constrained-", "function-")) or word in ("str", "int", "float", "bool")


_FEW_SECTIONS = 3  # that have a key; more say nothing about which was meant


def _nearest(where: list[str]) -> str:
    known = _known_keys(where[:-1])
    others = [name for name in RunConfig.model_fields if where[1:] and where[1] in _known_keys([name])]
    if 0 < len(others) <= _FEW_SECTIONS:
        return f"did you mean {' or '.join(f'{name}.{where[1]}' for name in others)}?"
    close = difflib.get_close_matches(where[-1], known, 1, cutoff=0.5)
    return f"did you mean {'.'.join([*where[:-1], close[0]])}?" if close else f"known are {', '.join(known)}"


def _known_keys(section: list[str]) -> list[str]:
    model: Any = RunConfig
    for name in section:
        model = model.model_fields[name].annotation
    return list(model.model_fields)
