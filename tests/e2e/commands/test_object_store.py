"""The commands on a store that is given as a URL, as a student elsewhere would use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nfm.pipeline.artifacts.artifact import ArtifactError, find
from nfm.storage import PairStore
from nfm.storage.files.paths import as_path
from tests.support.buckets.s3server import bucket, s3, s3_server  # noqa: F401  fixtures

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.support.buckets.s3server import S3


def test_a_store_on_s3_is_looked_at_verified_and_trained_on_by_its_url(
    made: Lab,
    empty: Lab,
    s3: S3,  # noqa: F811
    bucket: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    store, url = made.only("pairs"), f"{bucket}/runs/store"
    where: Any = as_path(url)
    where.fs.put(str(store.path), where.path, recursive=True)
    known = {**s3.environment(), "NFM_CACHE": str(tmp_path / "cache")}

    here, there = (
        json.loads(lab.nfm("pairs", "info", name, "--json", **known).stdout)
        for lab, name in ((made, made.name("pairs")), (empty, url))
    )
    assert there.pop("store") == url
    assert here.pop("store") == made.name("pairs")
    assert here == there
    assert "clean" in empty.nfm("pairs", "verify", url, **known).stdout

    alone = {**known, "NFM_CACHE": str(tmp_path / "student's")}  # which goes when its process ends
    empty.wait(empty.start("student", "--pairs", f"{url}/{store.manifest_name}", "-c", "tiny.toml", **alone))
    student = empty.only("student")
    assert student.spec["inputs"]["pairs"]["artifact"] == url
    assert student.path.name == made.only("student").path.name
    assert student.manifest()["content_digest"] == made.only("student").manifest()["content_digest"]
    assert (
        f"pairs: {url}  content {PairStore.open(store.path).content_digest[:12]}"
        in empty.nfm("lineage", student.path.name, **known).stdout
    )
    assert not list((tmp_path / "student's").iterdir())

    denied = empty.nfm("pairs", "info", "s3://elsewhere/store", exits=2, **known)
    assert denied.stderr.startswith("nfm: s3://elsewhere/store")
    assert "no such bucket" in denied.stderr


def test_urls_name_stores_and_manifests_and_say_what_is_missing(
    made: Lab,
    s3: S3,  # noqa: F811
    bucket: str,  # noqa: F811
) -> None:
    store = made.only("pairs")
    assert find(f"file://{store.path}").path == store.path
    where: Any = as_path(f"{bucket}/store")
    where.fs.put(str(store.path), where.path, recursive=True)
    found = find(str(where))
    assert (found.name, found.manifest_name) == (str(where), store.manifest_name)
    assert (found.started, found.done, found.spec) == (True, True, store.spec)
    assert find(str(found.reference)) == found
    with pytest.raises(ArtifactError, match=f"{bucket}/none: no store there, it has no spec.json"):
        find(f"{bucket}/none")
