"""What an encoder needs to start. It is sent to wherever shards are encoded."""

from __future__ import annotations

from dataclasses import dataclass

from nfm.stages.trained.training import Precision


@dataclass(frozen=True)
class Setup:
    """The folders of the store and its inputs, and how to compute.

    `device` "auto" is chosen where the encoder runs. `batch_size` is the shape that every batch is padded to. `maker`
    is what other couplings than the teacher's are made with: the folder of the potential or of the student, or the
    file of a custom coupling; the store's recipe says what its content must be. `beside` is where the command runs: a
    network of its user's own is looked for there too.
    """

    store: str
    data: str
    teacher: str | None
    teacher_sha256: str | None
    batch_size: int
    precision: Precision
    device: str
    threads: int
    compile: bool = False
    maker: str | None = None
    beside: str | None = None
