"""What an encoder needs to start. It is sent to wherever shards are encoded."""

from __future__ import annotations

from dataclasses import dataclass

from nfm.stages.trained.training import Precision


@dataclass(frozen=True)
class Setup:
    """The folders of the store and its inputs, and how to compute.

    `device` "auto" is resolved where the encoder runs. Every batch is padded to `batch_size`. `maker` is what a
    coupling without a teacher needs: the folder of the potential or of the student, or the file of a custom coupling.
    The store's recipe says what its content must be.
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
