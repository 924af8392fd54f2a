"""`nfm pairs`: export, add-field, head, info and verify as a user runs them, and whole runs in the other layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from nfm.storage import PairStore
from nfm.storage.files import atomic

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.e2e.conftest import Nfm

SMALL = ("pairs.rows_per_shard=16", "pairs.rows_per_block=8", "pairs.batch_size=8", "student.pairs=640")


def test_an_export_is_a_store_that_students_read_and_audits_follow_back(lab: Lab, nfm: Nfm) -> None:
    store, out = lab.only("pairs").path, lab.folder / "exported"
    said = nfm("pairs", "export", store, out, "--layout", "zarr", "--codec", "int8")
    assert re.search(r"512 pairs, zarr int8: 0\.\d MB, \d+ bytes a pair \(blocks float16: \d+\)", said)
    assert re.search(r"RMS error 0\.0\d+, largest [\d.]+ over 512 pairs; \d of 32,768 values clipped", said)
    assert "clean" in nfm("pairs", "verify", out, "--deep")
    assert "FINDING" not in nfm("audit", out, "--deep")

    info = json.loads(nfm("pairs", "info", out, "--json"))
    before = PairStore.open(store)
    assert (info["layout"], info["codec"], info["noise_step"]) == ("zarr", "int8", 0.05)
    assert (info["exported content_digest"], info["order key"]) == (before.content_digest, before.order_key)
    lines = nfm("lineage", out)
    assert f"exported from content {before.content_digest[:12]} generation 1 (blocks, float16)" in lines
    assert lab.name("teacher") in lines
    assert "licence CC BY 4.0" in lines

    nfm("student", "--pairs", out, "-c", "tiny.toml", "--set", "student.pairs=128")
    assert "512 pairs" in nfm("pairs", "export", store, out, "--layout", "zarr", "--codec", "int8")
    assert "another store is there" in nfm("pairs", "export", store, out, "--layout", "blocks", exits=2)


def test_an_export_is_of_the_generation_that_is_asked_for_and_is_not_sealed_again(lab: Lab, nfm: Nfm) -> None:
    nfm(*lab.arguments("pairs", "pairs.draws=3"))
    store = lab.only("pairs").path
    assert "512 pairs" in nfm("pairs", "export", store, "of-1", "--generation", 1)
    assert "768 pairs" in nfm("pairs", "export", lab.name("pairs"), "of-2", "--generation", 2)
    assert "768 pairs" in nfm("pairs", "export", store, "newest")
    assert "no such generation (sealed: 1, 2)" in nfm("pairs", "export", store, "of-9", "--generation", 9, exits=2)
    assert "not of 2" in nfm("pairs", "export", store / "manifest.g0001.json", "of-x", "--generation", 2, exits=2)
    assert not (lab.folder / "of-9").exists()
    assert "an exported store, which its export seals" in nfm("pairs", "seal", "newest", exits=2)


def test_an_audit_knows_an_export_whose_images_are_not_the_sources(lab: Lab, nfm: Nfm) -> None:
    """Every digest of the export is right; only its lineage tells that it is of other data."""
    nfm("run", "data", "-c", "tiny.toml", "--set", "data.seed=1")
    store, out = lab.only("pairs").path, lab.folder / "exported"
    nfm("pairs", "export", store, out)
    assert "FINDING" not in nfm("audit", out)
    spec = json.loads((out / "spec.json").read_text())
    other = next(found for found in lab.all("data") if found.name != spec["inputs"]["data"]["artifact"])
    spec["inputs"]["data"] |= {"artifact": other.name, "content_digest": other.manifest()["content_digest"]}
    atomic.write_json(out / "spec.json", spec)
    assert "its recipe is not the one that its inputs give" in nfm("audit", out, exits=1)


def test_an_export_killed_at_any_moment_goes_on_where_it_was(lab: Lab, nfm: Nfm) -> None:
    nfm(*lab.arguments("pairs", *SMALL))
    store = next(found.path for found in lab.all("pairs") if found.spec["store"]["rows_per_shard"] == 16)
    out = lab.folder / "exported"
    command = ("pairs", "export", store, out, "--layout", "samples", "--codec", "float32")
    for commits in (1, 8):
        process = lab.start(*command)
        lab.until(lambda commits=commits: len(list((out / "commits").glob("d*.json"))) >= commits, process)
        process.kill()
        process.communicate()
    kept = {path.name for path in (out / "commits").glob("d*.json")}
    assert 8 <= len(kept) < 32
    done = nfm(*command)
    assert f"{len(kept) * 16} of 512 pairs are there already" in done
    assert "exactly that of the source" in done
    assert "clean" in nfm("pairs", "verify", out)
    ours, theirs = PairStore.open(out), PairStore.open(store)
    slots = np.arange(256)
    np.testing.assert_array_equal(ours.gather(1, slots)["noise"], theirs.gather(1, slots)["noise"])


def test_a_field_is_added_to_a_finished_store_and_joined_by_row(lab: Lab, nfm: Nfm) -> None:
    store = lab.only("pairs").path
    before = lab.committed()
    values = np.random.default_rng(0).normal(size=(256, 5)).astype(np.float16)
    np.save(lab.folder / "said.npy", values)
    assert "256 rows of float16, 5 each" in nfm("pairs", "add-field", store, "said", "said.npy")
    nfm("pairs", "add-field", store, "said", "said.npy")  # again: nothing new, no error
    assert re.search(r"^row fields +said float16 5$", nfm("pairs", "info", store), re.MULTILINE)
    for batch in PairStore.open(store).batches(64, fields=["said"]):
        np.testing.assert_array_equal(batch.fields["said"], values[batch.slot].astype(np.float32))
    after = lab.committed()
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    assert "clean: 8 shards of 512 pairs, 1 field, 17 files, " in nfm("pairs", "verify", store)
    nfm("pairs", "export", store, "out")
    assert json.loads(nfm("pairs", "info", "out", "--json"))["row fields"] == "said float16 5"


def test_a_field_that_does_not_fit_is_wrong_use_and_nothing_is_unpickled(lab: Lab, nfm: Nfm) -> None:
    store = lab.only("pairs").path
    arrays = {
        "few": np.zeros((255, 2)), "good": np.zeros((256, 2)), "empty": np.zeros((256, 0)), "one": np.float32(3),
        "words": np.array(["a"] * 256),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(lab.folder / f"{name}.npy", array)
    np.save(lab.folder / "objects.npy", np.array([print] * 256), allow_pickle=True)
    (lab.folder / "text.npy").write_text("no array")
    for name, file, said in (
        ("said", "few", "255 rows, the store's source has 256"), ("said", "one", r"one array [rows, ...] is needed"),
        ("said", "objects", "it holds Python objects"), ("said", "text", "or is no .npy file"),
        ("said", "empty", "shape of field 'said' is 0, no value at all"),
        ("said", "words", "dtype of field 'said' is 'str32': it must be one of bool, uint8"),
        ("image", "good", "choose another name"), ("draw", "good", "an array that every batch has of its own"),
        ("Said", "good", "name is 'Said': the name of a field is lower case"),
    ):  # fmt: skip
        assert said in nfm("pairs", "add-field", store, name, f"{file}.npy", exits=2), file
    assert not list(store.glob("fields/*"))


def test_head_finds_the_teacher_among_the_artifacts_or_goes_without(lab: Lab, nfm: Nfm) -> None:
    store = lab.only("pairs").path
    assert "eta eps' alone gives 0.15" in nfm("pairs", "head", store, "-n", "3")
    assert Image.open(lab.folder / "head.png").width > 800
    assert "not this store" not in nfm("pairs", "head", store, "-n", "3", "--teacher", lab.name("teacher"))
    lab.drop("teacher")
    done = nfm("pairs", "head", store, "-n", "3", "-o", "without.png")
    assert "nothing is decoded: the store's teacher" in done
    assert "worst nll" in done
    assert (lab.folder / "without.png").exists()


@pytest.mark.parametrize("layout", ["samples", "zarr"])
def test_a_whole_run_in_another_layout_killed_resumed_audited_and_repaired(lab: Lab, nfm: Nfm, layout: str) -> None:
    sets = (*SMALL, f"pairs.layout={layout}", "pairs.codec=int8")

    def folder() -> Path | None:
        specs = [path for path in lab.artifacts.glob("pairs/*/spec.json") if f'"{layout}"' in path.read_text()]
        return specs[0].parent if specs else None

    def commits() -> int:
        return len(list(found.glob("commits/d*.json"))) if (found := folder()) else 0

    process = lab.start(*lab.arguments("student", *sets))
    lab.until(lambda: commits() >= 5, process)
    process.kill()
    process.communicate()
    assert 5 <= commits() < 32
    nfm(*lab.arguments("student", *sets))
    store = folder()
    assert store is not None
    student = next(s for s in lab.all("student") if s.spec["inputs"]["pairs"]["artifact"].endswith(store.name))
    audited = nfm("audit", student.path, "--deep")
    assert "FINDING" not in audited
    assert "0 of 300 pairs bad" in audited

    digest = PairStore.open(store).content_digest
    shard = sorted(store.glob("d000/noise/c/*/0/0/0" if layout == "zarr" else "shards/*.tar"))[3]
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert str(shard) in nfm("pairs", "verify", store, exits=1)
    assert "set aside: 1" in nfm("repair", store)
    nfm(*lab.arguments("pairs", *sets))
    assert PairStore.open(store).content_digest == digest
    assert "clean" in nfm("pairs", "verify", store)


def test_a_store_on_an_object_store_is_shown_checked_and_brought_back(lab: Lab, nfm: Nfm, bucket: str) -> None:
    store, url = lab.only("pairs").path, f"{bucket}/exported"
    nfm("pairs", "export", store, url, "--layout", "zarr")
    info = json.loads(nfm("pairs", "info", url, "--json"))
    assert (info["layout"], info["pairs"], info["store"]) == ("zarr", 512, url)
    assert "clean" in nfm("pairs", "verify", url)
    assert "worst nll" in nfm("pairs", "head", url, "-n", "2")
    nfm("pairs", "export", url, "back", "--layout", "blocks")
    slots = np.arange(256)
    back = PairStore.open(lab.folder / "back").gather(1, slots)
    for name, values in PairStore.open(store).gather(1, slots).items():
        np.testing.assert_array_equal(back[name], values)
