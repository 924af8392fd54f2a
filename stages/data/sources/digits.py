"""The 1,797 handwritten digits of 8x8 pixels in scikit-learn: the default source, which needs no download."""

from __future__ import annotations

import gzip
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.base import Reporter, StageError, Unfit
from nfm.stages.data.reading.labels import Labels
from nfm.stages.data.source import Loaded, box_average, digest_files


class Digits:
    """scikit-learn's digits as [1797, 1, 8, 8] uint8: grey values 0..16 become 0..255, rounded half up."""

    name = "digits"

    def __init__(self, average: int = 1, classes: Sequence[str] | None = None):
        self.path, self.average = _table(), average
        table = np.loadtxt(io.BytesIO(gzip.decompress(self.path.read_bytes())), delimiter=",", dtype=np.int64)
        self.pixels = ((table[:, :64] * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)
        self.keys = [f"digits/{row:05d}" for row in range(len(table))]
        self.given = Labels(table[:, 64], self.keys, str(self.path), names=classes)
        self.labels, self.classes = self.given.counted, self.given.classes()
        self.test = np.zeros(len(table), bool)

    @staticmethod
    def shape_of(config: Any) -> tuple[int, int, int] | None:
        side = 8 // config.average
        return (1, side, side) if 8 % config.average == 0 else None

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        return Loaded(box_average(self.pixels[rows], self.average), self.given.outside(rows, len(self.classes)))

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        # The digest is of the unpacked table: the header of the .gz file differs between releases of scikit-learn.
        return digest_files([("digits.csv", self.path)], gzip.open, known=known)


def _table() -> Path:
    # Reads the file without importing scikit-learn, which would take longer than everything else here.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise Unfit('data.source = "digits" reads the table inside scikit-learn: pip install scikit-learn')
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise StageError(
            f"{path}: scikit-learn's table of digits is missing: pip install --force-reinstall scikit-learn"
        )
    return path
