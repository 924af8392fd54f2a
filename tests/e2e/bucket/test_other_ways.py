"""The less usual ways through a run, in a bucket: a report, a comparison, latents, a store elsewhere or of Zarr."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from nfm.storage import PairStore
from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path, names_in, size_of
from nfm.storage.verify import verify
from tests.stages.data.latents.small import FOLDED

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.support.buckets.in_bucket import Bucket

NO_REPORT = "pairs.report=false"


@pytest.mark.long
def test_a_report_is_made_of_what_is_in_the_bucket(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher", "features", "pairs", "student", "evaluate")
    (page,) = there.run("report").stdout.splitlines()
    assert page.startswith(f"{there.url}/report/")
    assert size_of(as_path(page))
    (report,) = there.all("report")
    assert report.manifest()["inputs"] == made.only("report").manifest()["inputs"]


@pytest.mark.seconds(60)
def test_a_student_is_trained_from_the_url_of_a_store_that_is_no_artifact(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher", "pairs")
    elsewhere = f"{there.url.removesuffix('/run')}/elsewhere"
    there.nfm("pairs", "export", made.name("pairs"), elsewhere)
    there.nfm("student", "--pairs", elsewhere, "-c", "tiny.toml", "--set", "student.pairs=128")
    (student,) = there.all("student")
    assert student.manifest()["inputs"]["pairs"]["artifact"] == elsewhere
    assert " clean " in there.nfm("audit", f"student/{student.path.name}", "--quick").stdout


@pytest.mark.long
@pytest.mark.seconds(90)
def test_a_store_of_zarr_is_made_repaired_and_sealed_there(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher")
    sets = (NO_REPORT, "pairs.draws=1", 'pairs.layout="zarr"', 'pairs.coupling="independent"')
    there.run("pairs", *sets)
    (store,) = there.all("pairs")
    content = PairStore.open(str(store.path)).content_digest
    assert verify(store.path, level="deep") == []
    array = store.path / "d000" / "noise" / "c"
    bad = next(file for file in _files(array) if size_of(file))
    bad.write_bytes(b"0" * (size_of(bad) or 0))
    name = f"pairs/{store.path.name}"
    assert "set aside: 1" in there.nfm("repair", name).stdout
    there.on("two").run("pairs", *sets)
    assert verify(store.path, level="default") == []
    assert PairStore.open(str(store.path)).content_digest == content


@pytest.mark.long
@pytest.mark.seconds(120)
def test_couplings_are_compared_there_also_those_of_a_potential_and_of_a_student(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher", "features", "pairs", "student", "evaluate")
    small = ("evaluate.samples=40", "evaluate.speed_batches=[4]", "potential.samples=5000", "pairs.reflow_nfe=3")
    sets = [word for text in small for word in ("--set", text)]
    words = ("compare", "-c", "tiny.toml", "--couplings", "semidiscrete-ot,reflow", *sets)
    there.nfm(*words, "-o", "results")
    body = json.loads((there.lab.folder / "results" / "compare.json").read_text())
    assert set(body["stores"]) == {"semidiscrete-ot", "reflow"}
    (potential,) = there.all("potential")
    assert {store.spec["store"]["coupling"] for store in there.all("pairs")} >= {"semidiscrete-ot", "reflow"}
    for store in there.all("pairs"):
        assert verify(store.path, level="deep") == []
    assert "FINDING" not in there.nfm("audit", f"potential/{potential.path.name}", "--deep").stdout
    again = there.on("two").nfm(*words).stderr
    assert "making" not in again
    assert not (there.on("two").lab.artifacts).exists()


@pytest.mark.seconds(120)
def test_latents_are_made_there_and_samples_are_decoded_on_another_machine(there: Bucket) -> None:
    one, two = there.on("one"), there.on("two")
    for machine in (one, two):
        (machine.lab.folder / "mine_vae.py").write_text(FOLDED)
    small = (
        "latents.vae=mine_vae:vae", "latents.executor=serial", "latents.rows_per_shard=64", "pairs.draws=1",
        "pairs.coupling=independent", "student.pairs=256", "student.patch=1", NO_REPORT,
    )  # fmt: skip
    one.run("student", *small)
    ((latents,), (student,)) = one.all("latents"), one.all("student")
    assert {"commits", "attempts"}.isdisjoint(names_in(latents.path))
    assert "making" not in two.run("student", *small).stderr
    own = ("--run-custom", atomic.hash_file(two.lab.folder / "mine_vae.py")[0])
    two.nfm("sample", f"student/{student.path.name}", "-n", "4", "-o", "grid.png", *own)
    assert (two.lab.folder / "grid.png").exists()
    told = two.nfm("audit", f"student/{student.path.name}", "--deep", *own).stdout
    assert told.count(" clean ") == 4


def _files(folder):  # type: ignore[no-untyped-def]
    for name in names_in(folder):
        inner = names_in(folder / name)
        yield from _files(folder / name) if inner else [folder / name]


@pytest.mark.long
def test_stages_side_by_side_are_made_in_a_bucket_too(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher", "features")
    there.lab.wait(there.lab.script(*there.lab.arguments("evaluate"), "--at-once", 2, **there.environment))
    assert len(there.all("student")) == 2
    assert {one.manifest()["content_digest"] for one in there.all("student")} == {
        one.manifest()["content_digest"] for one in made.all("student")
    }
