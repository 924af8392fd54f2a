"""Made JPEGs of about 110 kB, 500 x 375, as ImageNet's are on average: as a folder, as tars and as Parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHAPE = (375, 500)
LAYOUTS = ("files", "tars", "parquet")


def jpeg(seed: int) -> bytes:
    """A picture of blurred shapes and fine noise, of about 110 kB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        SHAPE[::-1], Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.float32) + rng.normal(0, 22, (*SHAPE, 1))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=91)
    return out.getvalue()


def made(first: int, images: int, different: int) -> list[bytes]:
    """`images` JPEGs, of which `different` are made and the others repeat them."""
    some = [jpeg(first + number) for number in range(min(different, images))]
    return [some[number % len(some)] for number in range(images)]


def write_tar(path: Path, contents: Sequence[bytes], first: int) -> None:
    """The JPEGs as WebDataset's own writer writes them, with keys that count from `first`."""
    from webdataset import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as tar:
        for row, content in enumerate(contents, first):
            tar.write({"__key__": f"{row:09d}", "jpg": content, "cls": 0})


def write(root: Path, contents: Sequence[bytes]) -> None:
    """The JPEGs in every layout, each in its folder."""
    (root / "files" / "a").mkdir(parents=True)
    for row, content in enumerate(contents):
        (root / "files" / "a" / f"{row:06d}.jpg").write_bytes(content)
    write_tar(root / "tars" / "00000.tar", contents, 0)
    (root / "parquet").mkdir()
    structs = pa.array([{"bytes": content, "path": None} for content in contents])
    table = pa.table({"image": structs, "label": pa.array([0] * len(contents))})
    pq.write_table(table, root / "parquet" / "train-00000.parquet", row_group_size=100)
