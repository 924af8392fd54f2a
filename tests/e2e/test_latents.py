"""A run on latents by the commands: from images to a student's samples in pixels, seen, measured, audited."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from nfm.storage import ImageDataset
from nfm.storage.files import atomic
from tests.support.lab import Lab

FOLDED = """
import pathlib
import torch

pathlib.Path("ran.txt").touch()

class Folded:
    scale, shift = 2.0, 0.125

    def encode(self, x):
        return torch.nn.functional.pixel_unshuffle(x, 2)

    def decode(self, latents):
        return torch.nn.functional.pixel_shuffle(latents, 2)

def vae(image_shape):
    return Folded()
"""
LATENTS = """
[latents]
vae = "mine_vae:vae"
mirrors = true
rows_per_shard = 96
batch_size = 32
"""


SMALL = ("data.limit=120", "features.images=256", "teacher.images=256", "pairs.draws=1", "student.pairs=256")
SMALL += ("evaluate.nfe=[5]", "evaluate.samples=20", "evaluate.kid_size=10")


@pytest.fixture
def folded(empty: Lab) -> Iterator[Lab]:
    """The tiny run on latents of a VAE that only folds pixels into channels, so that nothing is lost."""
    (empty.folder / "mine_vae.py").write_text(FOLDED)
    empty.config.write_text(empty.config.read_text() + LATENTS)
    yield empty
    sys.modules.pop("mine_vae", None)


def test_from_images_to_samples_in_pixels(folded: Lab) -> None:
    said = folded.run("report", *SMALL).stderr
    file = folded.folder / "mine_vae.py"
    sha256 = atomic.hash_file(file)[0]
    assert said.count(f"latents.vae = 'mine_vae:vae' runs the code of {file.resolve()}, SHA-256 {sha256}") == 2

    data, latents = folded.only("data"), folded.only("latents")
    metrics = latents.manifest()["metrics"]
    assert (metrics["images"], metrics["image_shape"], metrics["scale"]) == (512, [4, 4, 4], 2.0)
    for stage in ("teacher", "pairs", "features", "evaluate"):
        inputs = folded.all(stage)[0].spec["inputs"]
        assert inputs["data"]["artifact"].startswith("data" if stage in ("features", "evaluate") else "latents")
    spec = folded.only("pairs").spec["store"]
    assert (spec["image_scale"], spec["image_shift"], spec["rows"]) == (2.0, 0.125, 512)

    pictures = sorted((folded.only("evaluate").path / "samples").glob("*.npz"))
    with np.load(pictures[0]) as arrays:
        assert arrays["images"].shape[1:] == (1, 8, 8)
        assert arrays["images"].dtype == np.uint8
    floor = json.loads((folded.only("evaluate").path / "rows" / "floor.json").read_text())
    assert floor["samples"] == min(100, len(ImageDataset.open(data.path, "heldout")))
