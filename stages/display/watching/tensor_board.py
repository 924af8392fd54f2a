"""A training as event files of TensorBoard, in the folder `tensorboard` of its artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = "tensorboard"


class TensorBoard:
    """Event files that are made anew at each start, of all that is known: so no figure is there twice."""

    def __init__(self, out: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(out / FOLDER, ignore_errors=True)
        # The purge is for a TensorBoard that has read the files of an earlier start already.
        self._writer = SummaryWriter(str(out / FOLDER), purge_step=0, flush_secs=10)

    def line(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, file: Path) -> None:
        with Image.open(file) as picture:
            self._writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
