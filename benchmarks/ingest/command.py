"""Images/s a core of the data stage and its sources, beside a plain Pillow loop and others' loaders, in one run.

`python -m benchmarks.ingest [--images 2000] [--compared 2000] [--side 256]` makes JPEGs block by block. Each way makes
squares of `--side` of the first `--compared` of them; the ways take turns. At last the data stage does all of them at
once, from tars. A rate is images for a second of processor time of this process: other work on the machine then counts
less. Ours also list and hash. Writes JSON to `-o`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks import told
from benchmarks.ingest import images as made_images
from benchmarks.ingest.ways import Way, ways, whole_stage
from nfm.pipeline.cli.options import LOCAL_PATH, OutputFile
from nfm.stages.display.endings import JSON
from nfm.stages.display.tables import aligned

BLOCK = 1000  # images that every way makes in a turn
DIFFERENT = 100  # images of a block that are made; the others repeat them
WARM = 4  # images of a turn before the first, which pays for imports
PLAIN = "a plain loop of Pillow"


@dataclass
class Spent:
    """What one way has used so far: processor seconds of every block, images, and seconds that passed."""

    blocks: list[tuple[int, float]] = field(default_factory=list)
    wall: float = 0.0

    def add(self, name: str, way: Way, images: int) -> None:
        """Runs a way once. Raises ClickException where it made fewer images."""
        with tempfile.TemporaryDirectory() as scratch:
            began, since = time.process_time(), time.monotonic()
            count = way(Path(scratch))
            spent, passed = time.process_time() - began, time.monotonic() - since
        if count != images:
            raise click.ClickException(f"{name} gave {count} images of {images}")
        self.blocks.append((images, spent))
        self.wall += passed

    def row(self, name: str, plain: float | None) -> dict[str, Any]:
        rates = [images / seconds for images, seconds in self.blocks]
        images = sum(images for images, _ in self.blocks)
        rate = images / sum(seconds for _, seconds in self.blocks)
        return {
            "way": name, "images": images, "images_per_core_second": round(rate, 1),
            "lowest": round(min(rates), 1), "highest": round(max(rates), 1),
            "of_plain": None if plain is None else round(rate / plain, 3),
            "images_per_second": round(images / self.wall, 1),
        }  # fmt: skip


def one_turn(found: Mapping[str, Way], images: int, spent: dict[str, Spent], lacking: dict[str, str]) -> None:
    """Every way over one block. One whose library cannot be imported here is told in `lacking`, with the reason."""
    for name, way in found.items():
        if name in lacking:
            continue
        try:
            spent.setdefault(name, Spent()).add(name, way, images)
        except (ImportError, RuntimeError) as error:
            lacking[name] = str(error).splitlines()[0]
            del spent[name]


@click.command()
@click.option("--images", default=2000, show_default=True, type=click.IntRange(min=1))
@click.option("--compared", type=click.IntRange(min=1), help="Of the images, those of every way.  [default: all]")
@click.option("--side", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--folder", type=LOCAL_PATH, help="Where the images are made and removed again.")
@click.option("-o", "--output", default="results/ingest/cpu-1-core.json", show_default=True, type=OutputFile(JSON))
def ingest(images: int, compared: int | None, side: int, folder: Path | None, output: Path) -> None:
    """Measures how many images a second each source, and the whole data stage, makes on a core."""
    began, load = time.monotonic(), [os.getloadavg()[0]]
    spent: dict[str, Spent] = {}
    lacking: dict[str, str] = {}
    size = 0
    with tempfile.TemporaryDirectory(dir=folder) as made:
        root = Path(made)
        tempfile.tempdir, before = made, tempfile.tempdir  # scratch of the ways too
        try:
            _turn(made_images.made(0, WARM, WARM), side, {}, lacking)
            for first in range(0, images, BLOCK):
                count = min(BLOCK, images - first)
                contents = made_images.made(first, count, DIFFERENT)
                size += sum(map(len, contents))
                made_images.write_tar(root / "all" / f"{first // BLOCK:05d}.tar", contents, first)
                if turn := contents[: max(0, (images if compared is None else compared) - first)]:
                    _turn(turn, side, spent, lacking)
                    click.echo(f"{first + len(turn)} images in every way", err=True)
                load.append(os.getloadavg()[0])
            whole = "the data stage, all at once"
            one_turn({whole: whole_stage(root / "all", side)}, images, spent, lacking)
            load.append(os.getloadavg()[0])
        finally:
            tempfile.tempdir = before
    plain = spent[PLAIN].row(PLAIN, None)["images_per_core_second"]
    rows = [used.row(name, plain) for name, used in spent.items()]
    found = {
        "command": told.command("benchmarks.ingest"),
        "machine": told.machine(),
        "versions": told.versions(
            "nfm-pairs", "pillow", "pyarrow", "webdataset", "torch", "torchvision", "img2dataset",
            "opencv-python-headless", "albumentations",
        ),
        "images": images, "different": images // BLOCK * DIFFERENT + min(images % BLOCK, DIFFERENT),
        "bytes_an_image": size // images, "side": side,
        "load": {"lowest": min(load), "highest": max(load)}, "seconds": round(time.monotonic() - began),
        "rows": [*rows, *({"way": name, "not_measured": why} for name, why in lacking.items())],
    }  # fmt: skip
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    header = ("way", "images/s a core", "lowest", "highest", "of the plain loop")
    cells = ("way", "images_per_core_second", "lowest", "highest", "of_plain")
    click.echo(aligned(header, [[row.get(cell) for cell in cells] for row in found["rows"]]))


def _turn(contents: list[bytes], side: int, spent: dict[str, Spent], lacking: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as block:
        made_images.write(Path(block), contents)
        one_turn(ways(Path(block), side), len(contents), spent, lacking)
