"""The less usual ways through a run, in a bucket: a report, a student of a store elsewhere, a store of Zarr."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nfm.storage import PairStore
from nfm.storage.files.paths import as_path, names_in, size_of
from nfm.storage.verify import verify

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.support.in_bucket import Bucket

NO_REPORT = "pairs.report=false"


@pytest.mark.seconds(60)
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
