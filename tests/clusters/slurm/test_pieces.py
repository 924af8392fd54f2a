"""Data and latents made by a real Slurm: with a task cancelled, an array ends where one process does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.clusters.slurm.conftest import ODD, Site
from tests.stages.data.image_files import large_pictures
from tests.stages.data.latents.small import SLOW
from tests.support.lab import Lab

if TYPE_CHECKING:
    from tests.clusters.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.seconds(300)]

IMAGES, EACH = 240, 3
CONFIG = f"""
[data]
source = "images"
path = "pictures"
image_size = 8
heldout = 0.1
max_rejected = 0.1
rows_per_shard = {EACH}

[latents]
vae = "mine_vae:vae"
mirrors = true
rows_per_shard = {EACH}
batch_size = 1
"""


@pytest.fixture
def pictures(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """A cluster and a lab with image files and a VAE, some time to decode and encode each; one file is broken."""
    lab = Lab(tmp_path / ODD)
    path = large_pictures(lab.folder / "pictures", IMAGES)
    path.write_bytes(path.read_bytes()[:200])
    lab.config.write_text(CONFIG)
    (lab.folder / "mine_vae.py").write_text(SLOW)
    yield Site(lab, cluster)
    lab.close()


def test_latents_submitted_at_once_wait_for_the_data_that_they_are_of(pictures: Site) -> None:
    site = pictures
    refused = ("data.max_rejected=0",)
    bad = site.submit("--tasks", 2, stage="data", sets=refused)
    never = site.submit("--tasks", 2, "--after", bad["finish"], stage="latents", sets=refused)
    site.ended()
    assert site.cluster.exit_code(bad["finish"]) == 1
    assert {site.cluster.states().get(job, "CANCELLED") for job in never.values()} == {"CANCELLED"}
    assert not (site.lab.artifacts / "latents").exists()

    data = site.submit("--tasks", 2, stage="data", sets=())
    latents = site.submit("--tasks", 2, "--after", data["finish"], stage="latents", sets=())
    site.ended()
    assert " is up to date" in site.log("prepare"), "the data were there when the latents began"
    assert {site.cluster.states()[jobs["finish"]] for jobs in (data, latents)} == {"COMPLETED"}, site.log("finish")
    assert "clean" in site.lab.nfm("audit", site.lab.only("latents").path).stdout


@pytest.mark.parametrize("stage", ["data", "latents"])
def test_a_task_cancelled_in_the_middle_is_made_up_by_the_next_submission(pictures: Site, stage: str) -> None:
    site = pictures
    serial = ["latents.executor=serial"] if stage == "latents" else []
    site.lab.run(stage, *serial)
    alone = site.lab.only(stage).manifest()
    site.lab.drop(stage)

    jobs = site.submit("--tasks", 2, stage=stage, sets=())
    assert set(jobs) == {"prepare", "array-0", "finish"}
    task = f"{jobs['array-0']}_1"
    site.cluster.until(lambda: site.commits(stage) >= 10 and site.running(task))
    site.cluster.ask("scancel", task)
    site.ended()
    made = site.commits(stage)
    assert site.cluster.states()[task] == "CANCELLED"
    assert site.cluster.exit_code(jobs["finish"]) == 1
    total = int(re.search(r"(\d+) shards of .* are to be made", site.log("prepare"))[1])  # type: ignore[index]
    assert total / 2 < made < total, "one task made all of its own, the other one not"
    assert f"{total - made} of {total} " in site.log("finish")
    assert f"run `nfm submit {stage} --slurm` again, which makes only these" in site.log("finish")
    assert not (site.lab.only(stage).path / "manifest.json").exists()

    again = site.submit("--tasks", 3, stage=stage, sets=())
    site.ended()
    assert f"{total - made} shards of" in site.log("prepare")
    assert {site.cluster.states()[again[name]] for name in ("prepare", "finish")} == {"COMPLETED"}, site.log("finish")
    found = site.lab.only(stage)
    assert found.manifest()["content_digest"] == alone["content_digest"]
    assert found.manifest()["metrics"] == alone["metrics"]
    assert "clean" in site.lab.nfm("audit", found.path).stdout
