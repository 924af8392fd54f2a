"""A store that PairWriter made, under the commands that look at stores and train on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nfm.pipeline.artifacts.artifact import artifacts_root
from nfm.storage import PairStore, PairWriter, StoreSpec
from nfm.storage.files.atomic import read_json
from tests.e2e.conftest import Nfm


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((256, 1, 8, 8))
    image = np.clip(np.rint(127.5 + 30 * noise), 0, 255).astype(np.uint8)
    spec = StoreSpec.external(rows=256, image_shape=(1, 8, 8), classes=10, rows_per_shard=100, origin="a simulation")
    with PairWriter(tmp_path / "mine", spec) as writer:
        writer.write(image=image, noise=noise, label=np.arange(256) % 10)
    return tmp_path / "mine"


def test_every_command_that_looks_at_a_store_works_on_external_pairs(mine: Path, nfm_anew: Nfm, tmp_path: Path) -> None:
    info = json.loads(nfm_anew("pairs", "info", mine, "--json"))
    assert (info["coupling"], info["origin"], info["pairs"]) == ("external", "a simulation", 256)
    assert "clean" in nfm_anew("pairs", "verify", mine, "--deep")
    nfm_anew("pairs", "head", mine, "-o", tmp_path / "head.png")
    assert (tmp_path / "head.png").stat().st_size
    assert "transport cost" in nfm_anew("pairs", "report", mine)
    nfm_anew("pairs", "export", mine, tmp_path / "exported", "--layout", "zarr")
    assert PairStore.open(tmp_path / "exported").order_key == PairStore.open(mine).order_key
    for store in (mine, tmp_path / "exported"):
        said = nfm_anew("audit", store, "--deep")
        assert "clean" in said
        assert "made elsewhere (a simulation): its pairs are not compared with a source" in said


def test_a_student_trains_on_external_pairs(mine: Path, nfm_anew: Nfm) -> None:
    nfm_anew("student", "--pairs", mine, "-c", "tiny.toml", "--set", "student.pairs=128")
    (manifest,) = artifacts_root().glob("student/*/manifest.json")
    metrics = read_json(manifest)["metrics"]
    assert (metrics["coupling"], metrics["variant"], metrics["pairs_seen"]) == ("external", "external", 128)
