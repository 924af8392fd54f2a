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


def spec() -> StoreSpec:
    return StoreSpec.external(rows=256, image_shape=(1, 8, 8), classes=10, rows_per_shard=100, origin="a simulation")


def pairs() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).standard_normal((256, 1, 8, 8))
    image = np.clip(np.rint(127.5 + 30 * noise), 0, 255).astype(np.uint8)
    return {"image": image, "noise": noise, "label": np.arange(256) % 10}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    with PairWriter(tmp_path / "mine", spec()) as writer:
        writer.write(**pairs())
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


def test_a_repaired_store_of_a_writer_is_completed_by_the_way_that_every_message_names(
    mine: Path, nfm_anew: Nfm
) -> None:
    next(mine.glob("shards/d000-s00001.*")).unlink()
    assert "run `nfm repair` on the store, which says what makes it again" in nfm_anew("pairs", "verify", mine, exits=1)
    way = "open it again with `PairWriter` and its spec, and write on from next_slot"
    assert f"To have a complete store, {way}" in nfm_anew("repair", mine)
    for command in (("pairs", "verify"), ("pairs", "info"), ("pairs", "seal"), ("audit",), ("pairs", "report")):
        assert way in nfm_anew(*command, mine, exits=1), command
    before = {path.name for path in mine.glob("commits/*")}
    with PairWriter(mine, spec()) as writer:
        at = writer.next_slot()
        writer.write(**{name: values[at:] for name, values in pairs().items()})
    assert at == 100
    assert before < {path.name for path in mine.glob("commits/*")}
    assert "clean: 3 shards of 256 pairs, 6 files, " in nfm_anew("pairs", "verify", mine)


def test_the_complete_draws_of_a_writer_are_sealed_on_request(mine: Path, nfm_anew: Nfm) -> None:
    sealed = PairStore.open(mine)
    (mine / "manifest.g0001.json").unlink()
    assert nfm_anew("pairs", "seal", mine).strip().endswith("manifest.g0001.json")
    assert PairStore.open(mine).content_digest == sealed.content_digest
    assert nfm_anew("pairs", "seal", mine)
    assert [path.name for path in mine.glob("manifest.*")] == ["manifest.g0001.json"]


@pytest.mark.parametrize("command", ["pairs info", "pairs verify", "pairs seal", "audit", "repair"])
def test_what_is_no_store_yet_is_named_for_what_it_is(command: str, nfm_anew: Nfm, tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "begun", spec())
    writer.write(**{name: values[:150] for name, values in pairs().items()})
    said = nfm_anew(*command.split(), tmp_path / "begun", exits=2)
    assert "begun and is not complete; open it again with `PairWriter` and its spec" in said
    (tmp_path / "plain").mkdir()
    (tmp_path / "notes").write_text("mine")
    assert "a folder without a spec.json of ours" in nfm_anew(*command.split(), tmp_path / "plain", exits=2)
    assert "a file, and an artifact is a folder" in nfm_anew(*command.split(), tmp_path / "notes", exits=2)


def test_a_level_is_one_and_verify_says_what_it_read(mine: Path, nfm_anew: Nfm) -> None:
    for command in (("pairs", "verify"), ("audit",)):
        assert "give one of them" in nfm_anew(*command, mine, "--quick", "--deep", exits=2)
    assert "--sample is of --deep" in nfm_anew("audit", mine, "--sample", 5, exits=2)
    assert "--run-custom is of --deep" in nfm_anew("audit", mine, "--run-custom", "ab" * 32, exits=2)
    for option, said in (
        (("--quick",), "no shard was read"),
        ((), "every byte was read\n"),
        (("--deep",), "stock readers"),
    ):
        assert said in nfm_anew("pairs", "verify", mine, *option)


def test_a_draw_that_a_store_lacks_is_wrong_use(mine: Path, nfm_anew: Nfm) -> None:
    said = nfm_anew("pairs", "head", mine, "--draw", 5, exits=2)
    assert f"--draw 5: generation 1 of {mine}" in said
    assert "has draws 0 to 0" in said
    assert "of the stage pairs, not a teacher" in nfm_anew("pairs", "head", mine, "--teacher", mine, exits=2)


def test_lineage_says_of_an_export_what_it_was_made_from(mine: Path, nfm_anew: Nfm, tmp_path: Path) -> None:
    nfm_anew("pairs", "export", mine, tmp_path / "copy")
    (line,) = nfm_anew("lineage", tmp_path / "copy").splitlines()
    assert "exported from content " in line
    assert "made without the pipeline" in nfm_anew("lineage", mine)
