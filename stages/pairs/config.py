"""The config section [pairs]: the coupling, the sizes of the store, and where it is encoded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from nfm.stages.base import Guidance, LocalField, Section, added, one_of, operational
from nfm.stages.couplings.facts import FACTS
from nfm.stages.couplings.variant import Variant
from nfm.stages.executors import EXECUTORS
from nfm.stages.trained.devices.precision import Precision
from nfm.stages.trained.devices.where import AddressField, DeviceField
from nfm.storage.format.codecs import CODECS
from nfm.storage.layouts import LAYOUTS

PLAIN_BATCH = 256  # of "auto", where there is no teacher to run


class PairsConfig(Section):
    """The `[pairs]` table. Every draw pairs each training image with new noise; flips are also drawn again.

    `layout` and `codec` say how records are stored and how the noise is rounded, see docs/pairs-store.md; `nfm pairs
    export` converts a finished store. With `batch_size` "auto" a short test chooses it when the store begins. It is
    then kept in spec.json, because the last bits of the noise depend on it. A generation may lack up to `max_missing`
    pairs of shards that fail; its manifest lists them. `report` = false seals without a coupling report; `nfm pairs
    report` can make one at any time.

    Options of single couplings, see docs/couplings.md: `group_size` is for minibatch-ot; `custom` names a function;
    reflow generates its images with the student of the coupling `reflow_of`, or with the artifact `student`.
    """

    coupling: Annotated[str, one_of(FACTS)] = "nfm"
    draws: int = operational(1, ge=1, le=1000)
    codec: Annotated[str, one_of(CODECS)] = "float16"
    layout: Annotated[str, one_of(LAYOUTS)] = added("blocks")
    rows_per_shard: int = Field(4096, ge=1)
    rows_per_block: int = Field(256, ge=1)
    flips: bool = False
    seed: int = Field(0, ge=0)
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = 256
    precision: Precision = "float32"
    compile: bool = added(False)
    group_size: int = added(512, ge=1)
    custom: str | None = added(None)
    reflow_of: str = added("independent")
    student: LocalField | None = operational(None)
    reflow_solver: str = added("auto")
    reflow_nfe: int = added(31, ge=1)
    reflow_grid: str = added("square")
    reflow_guidance: Guidance = added(0.0)
    max_missing: int = operational(0, ge=0)
    report: bool = operational(True)
    executor: Annotated[str, one_of(EXECUTORS)] = operational("ray")
    ray_address: AddressField | None = operational(None)
    workers: int = operational(0, ge=0)
    threads: int = operational(1, ge=1)
    device: DeviceField = operational("auto")

    @field_validator("reflow_of")
    @classmethod
    def _is_a_variant(cls, reflow_of: str) -> str:
        Variant.parse(reflow_of)
        return reflow_of

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        if self.student is not None and self.reflow_of != type(self).model_fields["reflow_of"].default:
            raise ValueError(
                f"reflow_of = {self.reflow_of!r} names the student of a coupling, and student = {str(self.student)!r} "
                "an artifact: leave one of them out"
            )
        return self
