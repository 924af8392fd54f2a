"""A tiny run of the whole pipeline, made once a session by the `nfm` command, and copies of it for tests that write."""

from __future__ import annotations

import hashlib
import os

# Before torch is imported anywhere: two processes that spin on the same cores cost each other five times their speed.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings

from nfm.pipeline.artifact import Artifact, newest_manifest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On several processes a file stays on one, and files that start a Ray, which say so, on the same one."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))


pytest.register_assert_rewrite("tests.stages.shop")  # whose own assertions are to show values, as a test's do
settings.register_profile("nfm", deadline=None)  # a busy machine is no finding
settings.load_profile("nfm")

CONFIG = """
[data]
source = "digits"
limit = 320
heldout = 0.2
rows_per_shard = 128

[features]
images = 1_000
batch_size = 64
log_every = 500

[teacher]
images = 3_000
batch_size = 64
patch = 2
channels = 32
head_size = 32
blocks = 2
layers = 1
eta = 0.15
ema = 0.9
log_every = 1_000
measure_rows = 64
sigma_rows = 256

[pairs]
draws = 2
rows_per_shard = 64
rows_per_block = 32
batch_size = 32
executor = "serial"

[student]
pairs = 2_000
batch_size = 64
patch = 2
width = 32
depth = 2
head_size = 32
ema = 0.9
log_every = 1_000

[evaluate]
baselines = ["independent"]
nfe = [7, 5]
samples = 100
kid_subsets = 5
kid_size = 30
curvature_trajectories = 8
batch_size = 50
speed_batches = [8]
"""
OWN_RECORDS = {"events", "audits", "failed"}  # an artifact's folders that runs and audits add to


@dataclass
class Lab:
    """A folder with a config and its artifacts, and the `nfm` command as a user runs it there."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def config(self) -> Path:
        return self.folder / "tiny.toml"

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """`nfm` with these arguments in a process of its own; it is killed when the test leaves it running."""
        command = [str(Path(sysconfig.get_path("scripts")) / "nfm"), *map(str, arguments)]
        own = {"NFM_ARTIFACTS": str(self.artifacts), **environment}
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def nfm(self, *arguments: object, exits: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `nfm`, wait for it, check its exit code, and that no traceback reaches the user."""
        return self.wait(self.start(*arguments, **environment), exits)

    def run(self, stage: str, *sets: str, exits: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """`nfm run STAGE -c tiny.toml --set ...`."""
        return self.nfm(*self.arguments(stage, *sets), exits=exits, **environment)

    def arguments(self, stage: str, *sets: str) -> list[str]:
        """What `run` gives to `nfm`."""
        return ["run", stage, "-c", "tiny.toml", *(part for text in sets for part in ("--set", text))]

    def wait(self, process: subprocess.Popen[str], exits: int = 0) -> subprocess.CompletedProcess[str]:
        out, err = process.communicate(timeout=240)
        assert process.returncode == exits, f"exit {process.returncode}, not {exits}:\n{out}\n{err}"
        assert "Traceback" not in out + err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def all(self, stage: str) -> list[Artifact]:
        """The artifacts of a stage, each at its newest manifest."""
        found = sorted((self.artifacts / stage).glob("*/spec.json"))
        return [Artifact(spec.parent, newest_manifest(spec.parent)) for spec in found]

    def only(self, stage: str, coupling: str = "nfm") -> Artifact:
        """The one artifact of a stage; of the stages that baselines share, the one on `coupling` pairs."""
        found = self.all(stage)
        if stage == "pairs":
            found = [artifact for artifact in found if artifact.spec["store"]["coupling"] == coupling]
        if stage == "student":
            found = [artifact for artifact in found if artifact.manifest()["metrics"]["coupling"] == coupling]
        assert len(found) == 1, found
        return found[0]

    def name(self, stage: str, coupling: str = "nfm") -> str:
        """`stage/fingerprint` of the one artifact of a stage, as the command shows it."""
        return f"{stage}/{self.only(stage, coupling).path.name}"

    def drop(self, *stages: str) -> None:
        """Remove these stages' artifacts."""
        for stage in stages:
            shutil.rmtree(self.artifacts / stage)

    def committed(self) -> dict[str, str]:
        """SHA-256 of every file that must never change again, by path: all but locks, events and receipts."""
        return {
            str(path.relative_to(self.artifacts)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.artifacts.glob("[a-z]*/**/*"))
            if path.is_file() and not OWN_RECORDS & set(path.parts) and not path.name.startswith((".tmp-", "lock."))
        }

    def until(self, condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
        """Wait until `condition()` is true while `process` works; fail when the process ends before that."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, f"ended too early: {process.communicate()}"
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.001)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The tiny run, complete up to its report. Tests only read it; what writes takes `lab`."""
    lab = Lab(tmp_path_factory.mktemp("made"))
    lab.config.write_text(CONFIG)
    lab.run("report")
    yield lab
    lab.close()


@pytest.fixture
def lab(made: Lab, tmp_path: Path) -> Iterator[Lab]:
    """A copy of the tiny run that a test may change."""
    copy = Lab(tmp_path / "lab")
    shutil.copytree(made.folder, copy.folder)
    yield copy
    copy.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Lab]:
    """The same config with nothing made yet."""
    lab = Lab(tmp_path / "empty")
    lab.folder.mkdir()
    lab.config.write_text(CONFIG)
    yield lab
    lab.close()


@pytest.fixture
def root(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifacts of `lab`, for tests that call the pipeline's functions in this process."""
    monkeypatch.setenv("NFM_ARTIFACTS", str(lab.artifacts))
    return lab.artifacts
