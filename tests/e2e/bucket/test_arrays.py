"""Tasks of an array, on machines that share nothing but a bucket, make the data set and the latents of one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from nfm.stages.trained.foreign import vae
from nfm.storage.files.paths import as_path, names_in
from tests.stages.data.latents.small import save_vae
from tests.support.buckets.in_bucket import Bucket

if TYPE_CHECKING:
    from tests.support.buckets.s3server import S3

CONFIG = """
[data]
source = "images"
path = "{0}/images"
rows_per_shard = 8

[latents]
vae = "{0}/kl"
rows_per_shard = 8
batch_size = 4
executor = "serial"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of 24 images, and of a VAE in a folder of this machine."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: the extra `latents`")
    rng = np.random.default_rng(0)
    for number in range(24):
        file = tmp_path / "images" / f"c{number % 2}" / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    save_vae(tmp_path / "kl", 3)
    path = tmp_path / "both.toml"
    path.write_text(CONFIG.format(tmp_path))
    return path


@pytest.mark.long
def test_tasks_on_machines_apart_make_the_data_and_the_latents_of_one_process(
    config: Path, s3: S3, bucket: str, tmp_path: Path
) -> None:
    alone = Bucket(f"{bucket}/alone", s3, config, tmp_path / "machines", "alone")
    alone.run("latents")
    there = Bucket(f"{bucket}/run", s3, config, tmp_path / "machines", "head")
    for stage in ("data", "latents"):
        listed, slurm = f"{there.url}/lists/{stage}.json", f"{stage}.executor=slurm"
        there.nfm("worklist", stage, "-c", "tiny.toml", "-o", listed)
        (tmp_path / "kl").rename(tmp_path / "elsewhere")  # tasks find the VAE in the bucket
        there.on("first").nfm("work", listed, "--task", 0, "--of", 2)
        (tmp_path / "elsewhere").rename(tmp_path / "kl")
        lacking = there.on("end").run(stage, slurm, exits=1).stderr
        assert "not made yet" in lacking
        assert f"run `nfm submit {stage} --slurm` again, which makes only these" in lacking
        there.on("second").nfm("work", listed, "--task", 1, "--of", 2)
        there.on("end").run(stage, slurm)
        (made,), (expected,) = there.all(stage), alone.all(stage)
        assert made.manifest()["files"] == expected.manifest()["files"], stage
        assert {"attempts", "parts", "commits", "failed"}.isdisjoint(names_in(made.path))
        assert "0 shards" in there.nfm("worklist", stage, "-c", "tiny.toml", "-o", f"{listed}.again").stdout
        for machine in ("first", "second"):  # no more than the data set that they read
            kept = (tmp_path / "machines" / machine / "scratch").glob("*/*/*/*")
            assert {file.parent.parent.name for file in kept if file.suffix in (".tar", ".safetensors")} <= {"data"}
        assert " clean " in there.nfm("audit", f"{stage}/{made.path.name}", "--deep").stdout


@pytest.mark.long
def test_another_machine_goes_on_with_shards_that_are_in_the_bucket_and_not_with_what_it_has_itself(
    config: Path, s3: S3, bucket: str, tmp_path: Path
) -> None:
    there = Bucket(f"{bucket}/run", s3, config, tmp_path / "machines", "head")
    listed, url = f"{bucket}/lists/latents.json", as_path(f"{bucket}/run/latents")
    there.nfm("worklist", "latents", "-c", "tiny.toml", "-o", listed)
    there.nfm("work", listed, "--task", 0, "--of", 1)
    (name,) = names_in(url)
    assert {vae.FACTS, vae.FOLDER, "attempts", "commits"} <= set(names_in(url / name))
    (here,) = (tmp_path / "machines/head/scratch").glob(f"*/latents/{name}")
    (here / "train").mkdir()
    (here / "train" / "s00000.tar").write_bytes(b"of a run that encoded on another device, and was stopped")
    told = there.run("latents", "latents.executor=slurm").stderr
    assert "their files are brought here from" in told
    assert " clean " in there.nfm("audit", f"latents/{name}", "--deep").stdout
