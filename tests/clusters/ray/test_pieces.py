"""Data and latents on nodes of Ray that share a disk: one that is lost costs the pieces in its hand alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.stages.data.image_files import large_pictures
from tests.stages.data.latents.small import SLOW
from tests.support.lab import Lab

if TYPE_CHECKING:
    from tests.clusters.ray.conftest import Nodes

pytestmark = [pytest.mark.faults, pytest.mark.seconds(60)]

CONFIG = """
[data]
source = "images"
path = "pictures"
image_size = 8
heldout = 0.1
rows_per_shard = 3

[latents]
vae = "mine_vae:vae"
rows_per_shard = 3
batch_size = 1
"""


@pytest.mark.parametrize("stage", ["data", "latents"])
def test_a_node_that_is_lost_costs_the_pieces_in_its_hand_alone(
    tmp_path: Path, start_nodes: Callable[..., Nodes], stage: str
) -> None:
    lab = Lab(tmp_path / "lab")
    large_pictures(lab.folder / "pictures", 240)
    lab.config.write_text(CONFIG)
    (lab.folder / "mine_vae.py").write_text(SLOW)
    lab.run(stage, f"{stage}.executor=serial")
    alone = lab.only(stage).manifest()
    lab.drop(stage)

    nodes = start_nodes(0)
    nodes.add("a")
    nodes.add("b")
    driver = lab.start(*lab.arguments(stage, f"{stage}.executor=ray"), **nodes.environment)

    def committed() -> int:
        return sum(len(os.listdir(folder)) for folder in lab.artifacts.glob(f"{stage}/*/commits"))

    lab.until(lambda: committed() >= 10, driver)
    nodes.remove("a")
    done = lab.wait(driver)
    assert "lost Ray actor" in done.stderr
    made = lab.only(stage)
    assert made.manifest()["content_digest"] == alone["content_digest"]
    assert made.manifest()["metrics"] == alone["metrics"]
    assert "clean" in lab.nfm("audit", made.path).stdout
    lab.close()
