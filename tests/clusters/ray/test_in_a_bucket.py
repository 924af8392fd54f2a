"""Nodes that share nothing but a bucket make one store, one data set, one student, also when one of them is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nfm.stages.display.watching.lines import read_lines
from nfm.storage import PairStore
from nfm.storage.files.copies.resume import newest
from nfm.storage.files.paths import as_path, names_in
from nfm.storage.verify import verify
from tests.stages.data.latents.small import SLOW
from tests.support.buckets.in_bucket import Bucket

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clusters.ray.conftest import Nodes
    from tests.conftest import Lab
    from tests.support.buckets.s3server import S3

pytestmark = [pytest.mark.faults, pytest.mark.seconds(300)]

DRAWS = 3  # of 32 shards each
SETS = (
    *("pairs.rows_per_shard=8", "pairs.rows_per_block=8", "pairs.batch_size=8", f"pairs.draws={DRAWS}"),
    *("pairs.executor=ray", "pairs.report=false"),
)


def folder_of(tmp_path: Path, name: str) -> Path:
    """Where the processes of a node work, and keep their scratch."""
    (tmp_path / name).mkdir()
    return tmp_path / name


def two_nodes(start_nodes: Callable[..., Nodes], tmp_path: Path) -> Nodes:
    nodes = start_nodes(0)
    for name in ("a", "b"):
        nodes.add(name, folder=folder_of(tmp_path, name))
    return nodes


def test_nodes_that_share_only_a_bucket_lose_no_pair_and_make_none_twice(
    made: Lab, s3: S3, bucket: str, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    there = Bucket(f"{bucket}/run", s3, made.config, tmp_path / "machines", "driver")
    there.upload(made, "data", "teacher")
    nodes = two_nodes(start_nodes, tmp_path)
    driver = there.start(*there.lab.arguments("pairs", *SETS), **nodes.environment)

    def store() -> Path:
        (found,) = there.all("pairs")
        return found.path

    def committed() -> int:
        return len(names_in(store() / "commits")) if names_in(as_path(there.url) / "pairs") else 0

    there.lab.until(lambda: committed() >= 20, driver)
    nodes.remove("a")
    there.lab.wait(driver)
    assert verify(store(), level="default") == []
    made_store = PairStore.open(str(store()))
    for draw in range(DRAWS):
        assert made_store.index(["slot"], draw=draw)["slot"].to_pylist() == list(range(256))
    for name in ("a", "b"):  # each node has its own copy of the inputs, and none of the store
        scratch = tmp_path / name / "scratch"
        assert {path.parent.name for path in scratch.glob("*/*/*")} == {"data", "teacher"}
    assert " clean " in there.nfm("audit", f"{there.url}/pairs/{store().name}").stdout


def config_of_images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(48):
        file = tmp_path / "images" / f"c{number % 2}" / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    config = tmp_path / "images.toml"
    config.write_text(f'[data]\nsource = "images"\npath = "{tmp_path / "images"}"\nrows_per_shard = 4\n')
    return config


def test_parts_of_a_data_set_are_decoded_on_nodes_that_share_only_a_bucket(
    s3: S3, bucket: str, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    config = config_of_images(tmp_path)
    here = Bucket(f"{bucket}/serial", s3, config, tmp_path / "machines", "serial")
    here.run("data")
    there = Bucket(f"{bucket}/run", s3, config, tmp_path / "machines", "driver")
    nodes = two_nodes(start_nodes, tmp_path)
    driver = there.start(*there.lab.arguments("data", "data.executor=ray"), **nodes.environment)
    there.lab.wait(driver)
    (made,), (expected,) = there.all("data"), here.all("data")
    assert made.manifest()["content_digest"] == expected.manifest()["content_digest"]
    assert {"parts", "commits", "failed"}.isdisjoint(names_in(made.path))
    for name in ("a", "b"):
        assert list((tmp_path / name / "scratch").iterdir()) == []


def test_latents_are_encoded_on_nodes_that_share_only_a_bucket_and_one_of_which_is_lost(
    s3: S3, bucket: str, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    config = config_of_images(tmp_path)
    latents = '\n[latents]\nvae = "mine_vae:vae"\nmirrors = true\nrows_per_shard = 2\nbatch_size = 2\n'
    config.write_text(config.read_text() + latents)
    here = Bucket(f"{bucket}/serial", s3, config, tmp_path / "machines", "serial")
    there = Bucket(f"{bucket}/run", s3, config, tmp_path / "machines", "driver")
    for machine in (here, there):
        (machine.lab.folder / "mine_vae.py").write_text(SLOW)
    here.run("latents", "latents.executor=serial")
    there.run("data")
    nodes = two_nodes(start_nodes, tmp_path)
    driver = there.start(*there.lab.arguments("latents"), **nodes.environment)

    def committed() -> int:
        folder = as_path(there.url) / "latents"
        return sum(len(names_in(folder / name / "commits")) for name in names_in(folder))

    there.lab.until(lambda: committed() >= 4, driver)
    nodes.remove("a")
    there.lab.wait(driver)
    (made,), (expected,) = there.all("latents"), here.all("latents")
    assert made.manifest()["files"] == expected.manifest()["files"]
    assert {"attempts", "commits", "failed"}.isdisjoint(names_in(made.path))
    assert {path.parent.name for path in (tmp_path / "b" / "scratch").glob("*/*/*")} == {"data"}


def test_a_training_loses_a_node_and_goes_on_from_the_checkpoint_in_the_bucket(
    made: Lab, lab: Lab, s3: S3, bucket: str, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    there = Bucket(f"{bucket}/run", s3, made.config, tmp_path / "machines", "driver")
    there.upload(made, "data", "teacher", "pairs")
    sets = ("student.pairs=8192", "student.save_every=1024", "student.emas=[0.1]", "student.snapshots=4096")
    lab.drop("student")
    lab.run("student", *sets)
    nodes = two_nodes(start_nodes, tmp_path)
    driver = there.start(*there.lab.arguments("student", *sets, "student.workers=2"), **nodes.environment)

    def student() -> Path:
        (found,) = there.all("student")
        return found.path

    there.lab.until(lambda: there.all("student") and newest(student()) >= 2048, driver)
    nodes.add("c", folder=folder_of(tmp_path, "c"))
    nodes.remove("a")
    told = there.lab.wait(driver).stderr
    assert "a worker died; training begins again from" in told
    assert "begins again from 0" not in told
    assert names_in(student() / "resume") == names_in(student() / "ray-train") == []
    assert there.nfm("audit", f"student/{student().name}").stdout.count(" clean ") == 4
    found, alone = there.brought(there.all("student")[0]), lab.only("student").path
    assert [line["pairs_seen"] for line in read_lines(found / "metrics.jsonl")] == [
        line["pairs_seen"] for line in read_lines(alone / "metrics.jsonl")
    ]
    for file in ("weights.safetensors", "ema-0.1.safetensors", "snapshots/ema-0.1@4096.safetensors"):
        weights = load_file(found / file)
        for name, value in load_file(alone / file).items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-3, msg=f"{file} {name}")
