"""Nodes that share nothing but a bucket make one store, also when one of them is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from nfm.storage import PairStore
from nfm.storage.files.paths import as_path, names_in
from nfm.storage.verify import verify
from tests.support.in_bucket import Bucket

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clusters.ray.conftest import Nodes
    from tests.conftest import Lab
    from tests.support.s3server import S3

pytestmark = [pytest.mark.faults, pytest.mark.seconds(120)]

DRAWS = 3  # of 32 shards each
SETS = (
    *("pairs.rows_per_shard=8", "pairs.rows_per_block=8", "pairs.batch_size=8", f"pairs.draws={DRAWS}"),
    *("pairs.executor=ray", "pairs.report=false"),
)


def test_nodes_that_share_only_a_bucket_lose_no_pair_and_make_none_twice(
    made: Lab, s3: S3, bucket: str, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    there = Bucket(f"{bucket}/run", s3, made.config, tmp_path / "machines", "driver")
    there.upload(made, "data", "teacher")
    nodes = start_nodes(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        nodes.add(name, folder=tmp_path / name)
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
