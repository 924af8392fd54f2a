"""Images/s a core of the data stage's sources, beside a plain Pillow loop and others' loaders, in one run.

`python -m benchmarks.ingest [--images 2000] [--side 256]` makes JPEGs of about 110 kB (500 x 375, as ImageNet's are on
average) as a folder, tars and Parquet, and lets each way decode them all to squares of `--side`. A rate is images for a
second of processor time of this process: other work on the machine then counts less. Ours also list and hash. Writes
JSON to `-o`.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import told
from nfm.pipeline.cli.options import LOCAL_PATH, OutputFile
from nfm.stages.data.config import DataConfig
from nfm.stages.data.stage import open_source
from nfm.stages.display.endings import JSON
from nfm.stages.display.tables import aligned

SHAPE = (375, 500)
DIFFERENT = 100  # images that are made; the others repeat them
PER_FILE = 1000


class _Silent:
    stopping = ending = False

    def check_lock(self) -> None: ...
    def progress(self, *_: Any, **__: Any) -> None: ...
    def say(self, text: str) -> None: ...
    def log(self, kind: str, **_: Any) -> None: ...


def jpeg(seed: int) -> bytes:
    """A picture of blurred shapes and fine noise, of about 110 kB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        SHAPE[::-1], Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.float32) + rng.normal(0, 13, (*SHAPE, 1))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=90)
    return out.getvalue()


def write(root: Path, images: int) -> int:
    """The images as `files/`, `tars/` and `parquet/`. Returns the bytes of all of them."""
    from webdataset import TarWriter

    made = [jpeg(seed) for seed in range(min(DIFFERENT, images))]
    contents = [made[row % len(made)] for row in range(images)]
    for folder in ("files/a", "tars", "parquet"):
        (root / folder).mkdir(parents=True)
    for row, content in enumerate(contents):
        (root / "files" / "a" / f"{row:06d}.jpg").write_bytes(content)
    for start in range(0, images, PER_FILE):
        part = contents[start : start + PER_FILE]
        with TarWriter(str(root / "tars" / f"{start // PER_FILE:05d}.tar")) as tar:
            for row, content in enumerate(part, start):
                tar.write({"__key__": f"{row:09d}", "jpg": content, "cls": 0})
        structs = pa.array([{"bytes": content, "path": None} for content in part])
        table = pa.table({"image": structs, "label": pa.array([0] * len(part))})
        pq.write_table(table, root / "parquet" / f"train-{start // PER_FILE:05d}.parquet", row_group_size=100)
    return sum(map(len, contents))


def ours(source: str, path: Path, side: int, crop: str = "centre") -> Callable[[Path], int]:
    """A source of the data stage: listed, hashed, decoded in a random order."""

    def run(scratch: Path) -> int:
        config = {"source": source, "path": str(path), "image_size": side, "crop": crop, "threads": 1}
        opened = open_source(DataConfig.model_validate(config))
        opened.digest()
        loaded = opened.load(np.random.default_rng(0).permutation(len(opened.keys)), scratch, _Silent())
        return len(loaded.images) - len(loaded.rejected)

    return run


def square(image: Image.Image, side: int) -> np.ndarray:
    """The central square, resized: what each of the others does with a decoded image."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    cut = image.crop((left, top, left + edge, top + edge))
    return np.asarray(cut.resize((side, side), Image.Resampling.BICUBIC))


def pillow(path: Path, side: int) -> Callable[[Path], int]:
    def run(scratch: Path) -> int:
        return sum(square(Image.open(file).convert("RGB"), side).shape == (side, side, 3) for file in path.glob("*/*"))

    return run


def webdataset(path: Path, side: int) -> Callable[[Path], int]:
    def run(scratch: Path) -> int:
        import webdataset as wds

        tars = [str(file) for file in sorted(path.iterdir())]
        samples = wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
        return sum(square(image, side).shape == (side, side, 3) for image, _ in samples)

    return run


def torchvision(path: Path, side: int) -> Callable[[Path], int]:
    def run(scratch: Path) -> int:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

        cut = Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop(side), np.asarray])
        return sum(image.shape == (side, side, 3) for image, _ in ImageFolder(str(path), cut))

    return run


def measured(ways: dict[str, Callable[[Path], int]], images: int, passes: int) -> Iterator[dict[str, Any]]:
    """The best of `passes` of each way, after one that is not counted; the ways take turns.

    A way whose library cannot be imported here is told with the reason.
    """
    best: dict[str, float] = {}
    for turn in range(passes + 1):
        for name, run in list(ways.items()):
            with tempfile.TemporaryDirectory() as scratch:
                began = time.process_time()
                try:
                    count = run(Path(scratch))
                except (ImportError, RuntimeError) as error:
                    yield {"way": name, "not_measured": str(error)}
                    del ways[name]
                    continue
                spent = time.process_time() - began
            if count != images:
                raise click.ClickException(f"{name} gave {count} images of {images}")
            if turn:
                best[name] = min(spent, best.get(name, spent))
    for name, seconds in best.items():
        share = best["a plain loop of Pillow"] / seconds
        yield {"way": name, "images_per_core_second": round(images / seconds, 1), "of_plain": round(share, 3)}


@click.command()
@click.option("--images", default=2000, show_default=True, type=click.IntRange(min=1))
@click.option("--side", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--passes", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--folder", type=LOCAL_PATH, help="Where the images are made and removed again.")
@click.option("-o", "--output", default="benchmarks/results/ingest.json", show_default=True, type=OutputFile(JSON))
def main(images: int, side: int, passes: int, folder: Path | None, output: Path) -> None:
    """Measures how many images a second each source decodes on a core."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        root = Path(made)
        size = write(root, images)
        ways = {
            "a plain loop of Pillow": pillow(root / "files", side),
            "source images": ours("images", root / "files", side),
            "source webdataset": ours("webdataset", root / "tars", side),
            "source parquet": ours("parquet", root / "parquet", side),
            'source webdataset, crop "adm"': ours("webdataset", root / "tars", side, "adm"),
            "WebDataset's own decoder": webdataset(root / "tars", side),
            "torchvision's ImageFolder": torchvision(root / "files", side),
        }
        rows = list(measured(ways, images, passes))
    found = {
        "command": told.command("benchmarks.ingest"),
        "machine": told.machine(),
        "versions": told.versions("nfm-pairs", "pillow", "pyarrow", "webdataset", "torchvision"),
        "images": images, "bytes_an_image": size // images, "side": side, "rows": rows,
    }  # fmt: skip
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    header = ("way", "images/s a core", "of the plain loop")
    click.echo(aligned(header, [[row["way"], row.get("images_per_core_second"), row.get("of_plain")] for row in rows]))


if __name__ == "__main__":
    main()
