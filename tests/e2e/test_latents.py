"""A run on latents by the commands: from images to a student's samples in pixels, seen, measured, audited."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfm.stages.trained.sampling import initial, student_sampler
from nfm.storage import ImageDataset, PairStore
from nfm.storage.files import atomic
from tests.stages.data.latents.small import FOLDED, save_vae
from tests.support.lab import Lab

LATENTS = """
[latents]
vae = "mine_vae:vae"
mirrors = true
rows_per_shard = 96
batch_size = 32
executor = "serial"
"""


SMALL = ("data.limit=100", "features.images=128", "teacher.images=128", "pairs.draws=1", "student.pairs=128")
SMALL += ("evaluate.nfe=[5]", "evaluate.samples=20", "evaluate.kid_size=10", "evaluate.baselines=[]")


@pytest.fixture
def folded(empty: Lab) -> Iterator[Lab]:
    """The tiny run on latents of a VAE that only folds pixels into channels, so that nothing is lost."""
    (empty.folder / "mine_vae.py").write_text(FOLDED)
    empty.config.write_text(empty.config.read_text() + LATENTS)
    yield empty
    sys.modules.pop("mine_vae", None)


@pytest.mark.seconds(40)
def test_from_images_to_samples_in_pixels(folded: Lab) -> None:
    ran, file = folded.folder / "ran.txt", folded.folder / "mine_vae.py"
    sha256 = atomic.hash_file(file)[0]
    folded.run("data", *SMALL)
    assert "told when the latents are there" in folded.nfm("plan", "student", "-c", "tiny.toml", *sets(SMALL)).stdout
    assert not ran.exists(), "a plan runs nobody's code"
    said = folded.run("report", *SMALL).stderr
    assert said.count(f"latents.vae = 'mine_vae:vae' runs the code of {file.resolve()}, SHA-256 {sha256}") == 2

    data, latents, evaluation = (folded.only(stage) for stage in ("data", "latents", "evaluate"))
    metrics, rows = latents.manifest()["metrics"], len(ImageDataset.open(data.path, "train"))
    assert (metrics["images"], metrics["image_shape"], metrics["scale"]) == (2 * rows, [4, 4, 4], 2.0)
    for stage, read in (("teacher", latents), ("pairs", latents), ("features", data), ("evaluate", data)):
        name = f"{read.path.parent.name}/{read.path.name}"
        assert folded.only(stage).spec["inputs"]["data"]["artifact"] == name, stage
    spec = folded.only("pairs").spec["store"]
    assert (spec["image_scale"], spec["image_shift"], spec["rows"]) == (2.0, 0.125, 2 * rows)

    with np.load(next((evaluation.path / "samples").glob("student*.npz"))) as arrays:
        assert arrays["images"].shape == (20, 1, 8, 8)
        assert arrays["images"].dtype == np.uint8
    assert "Latents" in (folded.only("report").path / "report.html").read_text()

    _sampled(folded, sha256, ran)
    _audited(folded, sha256, ran)
    folded.run("evaluate", *SMALL)
    assert len(folded.all("latents")) == 1


@pytest.mark.seconds(40)
def test_a_folder_of_diffusers_goes_the_same_way_and_decodes_as_diffusers_does(empty: Lab) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: the extra `latents`")
    model = save_vae(empty.folder / "kl", 1)
    empty.config.write_text(empty.config.read_text() + LATENTS.replace("mine_vae:vae", "kl"))
    empty.run("evaluate", *SMALL)

    latents = empty.only("latents")
    assert PairStore.open(empty.only("pairs").path).spec.image_decoder.startswith("AutoencoderKL ")
    shutil.rmtree(empty.folder / "kl")
    empty.nfm("sample", empty.name("student"), "-n", 4, "-o", "pixels.png")
    assert "Description" not in Image.open(empty.folder / "pixels.png").text, "no false colours"

    student = student_sampler(empty.only("student").path, 5, "cpu", "float32")
    with torch.no_grad():
        drawn = student.decode(*initial(ImageDataset.open(latents.path), np.arange(20), 1, "cpu"))  # evaluate.seed
        expected = (model.decode(drawn / 0.18215 + 0.25).sample.numpy() + 1) * 127.5
    with np.load(empty.only("evaluate").path / "samples" / f"{student.name}.npz") as arrays:
        found = arrays["images"].astype(float)
    assert expected.std() > 3, "another decoder would show"
    assert np.abs(found - expected.clip(0, 255)).max() <= 1


def _sampled(lab: Lab, sha256: str, ran: Path) -> None:
    """Samples are decoded by the VAE of the lineage, where its code may run."""
    ran.unlink()
    student = lab.name("student")
    assert f"SHA-256 {sha256}, give --run-custom" in lab.nfm("sample", student, "-n", 4, exits=2).stderr
    lab.nfm("sample", student, "-n", 4, "--latents", "-o", "latents.png")
    assert not ran.exists()
    lab.nfm("sample", student, "-n", 4, "-o", "pixels.png", "--run-custom", sha256)
    sizes = [Image.open(lab.folder / name).text for name in ("latents.png", "pixels.png")]
    assert "false colours" in sizes[0]["Description"]
    assert "Description" not in sizes[1]


def _audited(lab: Lab, sha256: str, ran: Path) -> None:
    """An audit reaches the latents by the lineage, and encodes some again where their code may run."""
    ran.unlink()
    said = lab.nfm("audit", lab.name("teacher"), "--deep", "--sample", 40).stdout
    assert "its images were not encoded again: their function 'mine_vae:vae' is code" in said
    assert f"file of SHA-256 {sha256}, give --run-custom" in said
    assert not ran.exists()
    said = lab.nfm("audit", lab.name("teacher"), "--deep", "--sample", 40, "--run-custom", sha256).stdout
    assert "0 of 40 latents bad" in said


def sets(texts: Sequence[str]) -> list[str]:
    return [part for text in texts for part in ("--set", text)]
