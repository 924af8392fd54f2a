"""A lab with data and a teacher for every case, what an uninterrupted run makes of it, a Ray of several nodes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nfm.storage import PairStore
from tests.clusters.ray.conftest import Nodes
from tests.clusters.ray.conftest import start_nodes as start_nodes
from tests.conftest import Lab
from tests.faults.counts import COUNTS
from tests.faults.harness import Making

EXECUTORS = ("serial", "ray", "slurm")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The counts of the session, and as JSON where NFM_FAULTS_REPORT says."""
    if not COUNTS.checked:
        return
    terminalreporter.section("pairs under faults")
    for line in COUNTS.lines():
        terminalreporter.write_line(line)
    if path := os.environ.get("NFM_FAULTS_REPORT"):
        Path(path).write_text(COUNTS.as_json(), encoding="utf-8")


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> str:
    """Each of the executors."""
    return str(request.param)


@pytest.fixture
def bare(made: Lab, tmp_path: Path) -> Iterator[Lab]:
    """Data and teacher of the tiny run, and nothing made of them."""
    lab = copied(made, tmp_path / "lab")
    yield lab
    lab.close()


def copied(made: Lab, folder: Path) -> Lab:
    """A lab in `folder` with the config, the data and the teacher."""
    lab = Lab(folder)
    lab.artifacts.mkdir(parents=True)
    shutil.copy(made.config, lab.config)
    for stage in ("data", "teacher"):
        shutil.copytree(made.artifacts / stage, lab.artifacts / stage)
    return lab


@dataclass
class Uninterrupted:
    """Serial runs in this process that nothing gets in the way of: the content digest by draws."""

    lab: Lab
    digests: dict[int, str]

    def __call__(self, draws: int) -> str:
        """The content digest of a store of so many draws; draws are added to the same store, one run each."""
        if draws not in self.digests:
            making = Making(self.lab, "serial", draws)
            self.lab.nfm(*making.arguments())
            self.digests[draws] = PairStore.open(making.store).content_digest
            shutil.rmtree(making.store)
        return self.digests[draws]


@pytest.fixture(scope="session")
def uninterrupted(made: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uninterrupted]:
    """What an uninterrupted serial run makes."""
    lab = copied(made, tmp_path_factory.mktemp("uninterrupted") / "lab")
    yield Uninterrupted(lab, {})
    lab.close()


@pytest.fixture
def nodes(start_nodes: Callable[..., Nodes]) -> Nodes:
    """A Ray cluster of a head without CPUs and two nodes, a and b, with one each."""
    found = start_nodes(0)
    found.add("a")
    found.add("b")
    return found
