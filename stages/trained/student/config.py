"""The `[student]` table: the fields of a student's config and what they may be together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from nfm.stages.base import LocalField, added, one_of, operational
from nfm.stages.couplings.variant import check_knobs
from nfm.stages.trained.architectures import ARCHITECTURES, FIRST
from nfm.stages.trained.training.section import TrainingSection, whole_batches
from nfm.stages.trained.weights import Name, parse, parts_of
from nfm.trainers.training.profiles import WIDEST

TIMES, OBJECTIVE = "logit-normal(-0.2, 1.0)", "flow-matching"
_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
LOGIT_NORMAL = re.compile(rf"logit-normal\({_NUMBER},{_NUMBER}\)")


class StudentConfig(TrainingSection):
    """The `[student]` table. `pairs` is the total number of pairs seen.

    Of arch "sit", `width` is the tokens' and `depth` the blocks; of "unet", the channels at full resolution (32 where
    nothing is said) and the residual blocks a level (1), and `patch` and `head_size` are not used. `soften`, `mixture`
    (coupling -> share of the pairs, read from `pairs:<coupling>`) and `permuted` (each image gets the noise of the next
    pair of its batch: the control that keeps the noises and forgets the coupling) change what the reader yields.

    `model`, with the keywords `options`, `times`, `objective` and `sampler` may be functions of one's own, see own.py.
    `times` is also "uniform" or "logit-normal(mean, deviation)". `init` is a finished student whose weights are the
    first ones; what is in it is an input, and so part of the fingerprint.

    `emas` are relative widths of further moving averages, kept at the end and after every `snapshots` pairs. After each
    `sample_every` pairs a grid of samples is drawn, never if it is 0; with `sample_distance`, the sliced Wasserstein
    distance of so many samples to the store's first images is logged, too.
    """

    pairs: int = Field(240_000, ge=1)
    patch: int = Field(4, ge=1)
    width: int = Field(128, ge=1)
    depth: int = Field(6, ge=1)
    head_size: int = Field(64, ge=1)
    label_drop: float = Field(0.1, ge=0, lt=1)
    model: str | None = added(None)
    options: dict[str, JsonValue] = added({})
    times: str = added(TIMES)
    objective: str = added(OBJECTIVE)
    sampler: str | None = added(None)
    init: LocalField | None = operational(None)
    arch: Annotated[str, one_of(ARCHITECTURES)] = added(FIRST)
    soften: float = added(0.0)
    permuted: bool = added(False)
    mixture: dict[str, float] = added({})
    emas: tuple[Annotated[float, Field(ge=0.001, le=WIDEST)], ...] = added(())
    snapshots: int | None = added(None, ge=1)
    sample_every: int = operational(0, ge=0)
    sample_distance: int = operational(0, ge=0, le=50_000)

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_arch(cls, values: Any) -> Any:
        """Sets fields that the config leaves out to the defaults of the architecture."""
        known = ARCHITECTURES.get(str(values.get("arch"))) if isinstance(values, dict) else None
        return {**known.defaults, **values} if known else values

    @field_validator("times")
    @classmethod
    def _known_times(cls, times: str) -> str:
        """In one spelling, since the fingerprint has it."""
        if (found := LOGIT_NORMAL.fullmatch(times)) is not None and float(found[2]) > 0:
            return f"logit-normal({float(found[1])!r}, {float(found[2])!r})"
        if times == "uniform" or ":" in times:
            return times
        raise ValueError('times are "uniform", "logit-normal(mean, deviation)" or a function, "module:function"')

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, objective: str) -> str:
        if objective != OBJECTIVE and ":" not in objective:
            raise ValueError(f'an objective is "{OBJECTIVE}" or a function, "module:function"')
        return objective

    @model_validator(mode="after")
    def _check_own(self) -> Self:
        if self.options and self.model is None:
            raise ValueError(
                "options are the keywords of student.model, and there is none: name it as `module:function`, or leave "
                "them out"
            )
        if self.times != TIMES and self.objective != OBJECTIVE:
            raise ValueError("times are flow matching's, and objective is another; leave times out")
        if self.sampler is not None and self.objective == OBJECTIVE:
            raise ValueError(
                f'sampler is of an objective of one\'s own; with "{OBJECTIVE}" solvers sample, leave it out'
            )
        return self

    def averages(self) -> tuple[float, ...]:
        return self.emas

    def parts_of(self, ema: str) -> dict[Name, float]:
        """What of its averages a finished student of this section makes this one of. Raises ValueError if it cannot."""
        size, total, every = self.batch_size, whole_batches(self, self.pairs), self.snapshots
        seen = [after for after in range(size, total, size) if every and (after - size) // every != after // every]
        at = [None, *seen]
        return parts_of(parse(ema), [Name(width, count) for count in at for width in self.emas], total)

    @model_validator(mode="after")
    def _check_averages(self) -> Self:
        if len(set(self.emas)) < len(self.emas):
            raise ValueError(f"emas names a width twice: {', '.join(map(str, self.emas))}; name each once")
        if self.snapshots is not None and not self.emas:
            raise ValueError("snapshots are of the moving averages in emas, and there are none; name their widths")
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.sample_distance and not self.sample_every:
            raise ValueError("sample_distance is taken with each grid of samples; say how often by sample_every")
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        check_knobs(self.soften, self.mixture)
        if self.permuted and self.batch_size < 2:
            raise ValueError(f"permuted needs a batch_size of at least 2, not {self.batch_size}: noises change places")
        return self
