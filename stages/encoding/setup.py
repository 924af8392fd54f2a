"""What an encoder needs to start. It is sent to wherever shards are encoded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nfm.stages.executors.jobs import Work
from nfm.stages.trained.devices.precision import Precision
from nfm.storage.files.copies import mirror


@dataclass(frozen=True, kw_only=True)
class Setup(Work):
    """The places of the store and its inputs (folders, or URLs in a bucket), and how to compute.

    `device` "auto" is chosen where the encoder runs. `batch_size` is the shape that every batch is padded to. `maker`
    is what other couplings than the teacher's are made with: the folder of the potential or of the student, or the
    file of a custom coupling; the store's recipe says what its content must be. `beside` is where the command runs: a
    network of its user's own is looked for there too.
    """

    unit: ClassVar[str] = "nfm.stages.encoding.encoder:unit"
    section: ClassVar[str] = "pairs"
    memory: ClassVar[str] = "pairs.batch_size or pairs.workers"
    data: str
    teacher: str | None
    teacher_sha256: str | None
    batch_size: int
    precision: Precision
    compile: bool = False
    maker: str | None = None
    beside: str | None = None


def mirrored_here(setup: Setup) -> Setup:
    """The setup with folders of this machine for the inputs, which are brought here from a bucket. The store stays."""

    def here(place: str | None) -> str | None:
        return place if place is None else mirror.here(place)

    return replace(setup, data=mirror.here(setup.data), teacher=here(setup.teacher), maker=here(setup.maker))
