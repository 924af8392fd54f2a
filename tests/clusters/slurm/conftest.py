"""A cluster for each test, and labs in folders with odd names that have a teacher and no pairs yet."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.storage import PairStore
from nfm.storage.files.atomic import read_json
from tests.clusters.slurm.cluster import Cluster, absent

if TYPE_CHECKING:
    from tests.conftest import Lab

ODD = 'a lab\'s 100% "odd" place'
# Small shards, each a whole padded batch: encoding takes long enough for something to happen in the middle.
SETS = ("pairs.rows_per_shard=8", "pairs.rows_per_block=8", "pairs.batch_size=256", "pairs.draws=12")
SHARDS = 12 * 32


@dataclass
class Site:
    """A lab and the cluster that it submits to."""

    lab: Lab
    cluster: Cluster

    def submit(
        self, *arguments: object, stage: str = "pairs", sets: tuple[str, ...] = SETS, exits: int = 0
    ) -> dict[str, str]:
        """`nfm submit STAGE --slurm --go`; the job numbers by the jobs' names."""
        options = [part for text in sets for part in ("--set", text)]
        told = self.lab.nfm("submit", stage, "-c", "tiny.toml", *options, "--slurm", "--go", *arguments, exits=exits)
        if exits:
            return {"message": told.stderr}
        return dict(read_json(self.newest() / "jobs.json")["jobs"])

    def newest(self) -> Path:
        return max((self.lab.artifacts / "submissions").iterdir())

    def log(self, name: str) -> str:
        """What the jobs of this name in the newest submission printed."""
        return "".join(path.read_text() for path in sorted((self.newest() / "logs").glob(f"{name}-*.log")))

    def commits(self, stage: str = "pairs") -> int:
        return len(list(self.lab.artifacts.glob(f"{stage}/*/commits/[a-z]*.json")))

    def ended(self) -> None:
        self.cluster.until(lambda: not self.cluster.active())

    def running(self, job: str) -> bool:
        return self.cluster.states().get(job) == "RUNNING"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running Slurm; settings of slurm.conf as an indirect parameter."""
    if reason := absent():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="nfm-slurm-") as folder:  # sockets have short paths
        found = Cluster(Path(folder) / "c", getattr(request, "param", {}))
        monkeypatch.setenv("SLURM_CONF", str(found.conf))
        try:
            found.start()
            yield found
        finally:
            found.stop()
            jobs = found.folder / "jobs.txt"
            if jobs.exists():
                shutil.copy(jobs, tmp_path / "slurm-jobs.txt")


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Data and teacher of the tiny run."""
    if reason := absent():
        pytest.skip(reason)
    from tests.conftest import CONFIG, Lab

    lab = Lab(tmp_path_factory.mktemp("taught"))
    lab.config.write_text(CONFIG)
    lab.run("teacher")
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def serial_digest(taught: Lab, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The content digest of the store that one serial run makes."""
    lab = type(taught)(tmp_path_factory.mktemp("serial") / "lab")
    shutil.copytree(taught.folder, lab.folder)
    lab.run("pairs", *SETS)
    return PairStore.open(lab.only("pairs").path).content_digest


@pytest.fixture
def site(taught: Lab, cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """A cluster and a lab in a folder whose name needs every kind of quoting."""
    lab = type(taught)(tmp_path / ODD)
    shutil.copytree(taught.folder, lab.folder)
    yield Site(lab, cluster)
    lab.close()
