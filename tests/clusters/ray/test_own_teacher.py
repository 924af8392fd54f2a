"""A flow of its user's own on a cluster: its module is beside the config, where no worker runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from nfm.storage import PairStore
from nfm.storage.files import atomic
from tests.e2e.test_own_models import FLOW

if TYPE_CHECKING:
    from tests.clusters.ray.conftest import Nodes
    from tests.conftest import Lab

pytestmark = pytest.mark.faults

SETS = ("teacher.model=flow_of_mine:flow", "teacher.images=9600", "teacher.learning_rate=0.05", "pairs.draws=1")
RAY = ("pairs.executor=ray", "pairs.batch_size=auto", "pairs.threads=2")


@pytest.fixture
def own(lab: Lab) -> Lab:
    (lab.folder / "flow_of_mine.py").write_text(FLOW)
    lab.drop("teacher", "pairs")
    return lab


def test_workers_that_began_elsewhere_probe_and_encode_with_the_flow_beside_the_config(
    own: Lab, start_nodes: Callable[..., Nodes]
) -> None:
    nodes = start_nodes(2)
    own.wait(own.start(*own.arguments("pairs", *SETS, *RAY), **nodes.environment))
    store = own.only("pairs").path
    encoding = atomic.read_json(store / "spec.json")["encoding"]
    assert str(encoding["batch_size"]) in encoding["probe"]
    assert len(PairStore.open(store).index(["key"])["key"]) == 256
    sha256 = atomic.hash_file(own.folder / "flow_of_mine.py")[0]
    assert "0 of 30 pairs bad" in own.nfm("audit", store, "--deep", "--sample", 30, "--run-custom", sha256).stdout
