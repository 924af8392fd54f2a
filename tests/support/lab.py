"""A folder with a config and its artifacts, and the `nfm` command as a user runs it there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from nfm.pipeline.artifacts.artifact import Artifact, newest_manifest
from nfm.pipeline.cli import main
from tests.support.forked import Forked
from tests.support.patience import PATIENCE

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
Process = subprocess.Popen[str] | Forked
OWN_RECORDS = {"events", "audits", "failed"}  # an artifact's folders that runs and audits add to


@dataclass
class Lab:
    """A folder with a config and its artifacts, and the `nfm` command as a user runs it there."""

    folder: Path
    started: list[Process] = field(default_factory=list)

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def config(self) -> Path:
        return self.folder / "tiny.toml"

    def environment(self, **changes: str) -> dict[str, str]:
        return {**os.environ, "NFM_ARTIFACTS": str(self.artifacts), **changes}

    def start(self, *arguments: object, **environment: str) -> Process:
        """`nfm` with these arguments in a process of its own, for tests that send it signals or look at it at work.

        It is killed when the test leaves it running.
        """
        words, whole = [*map(str, arguments)], self.environment(**environment)
        process: Process
        if any(name.startswith("PYTHON") and name != "PYTHONPATH" for name in environment):  # read when Python starts
            process = self.script(*words, **environment)
        else:
            process = Forked(words, self.folder, whole)
        self.started.append(process)
        return process

    def script(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """The installed script, from the start of Python on, as a user's shell starts it."""
        return subprocess.Popen(
            [str(Path(sysconfig.get_path("scripts")) / "nfm"), *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def nfm(self, *arguments: object, exits: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `nfm` in this process, which saves the seconds of a start, and check its exit code."""
        assert "RAY_AUTH_TOKEN_PATH" not in environment, "Ray reads a token once in each process: use `start`"
        words, out, err, code = ["nfm", *map(str, arguments)], io.StringIO(), io.StringIO(), 0
        with (
            mock.patch.dict(os.environ, self.environment(**environment)),
            mock.patch.object(sys, "argv", words),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        return self._checked(words, code, exits, out.getvalue(), err.getvalue())

    def run(self, stage: str, *sets: str, exits: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """`nfm run STAGE -c tiny.toml --set ...`."""
        return self.nfm(*self.arguments(stage, *sets), exits=exits, **environment)

    def arguments(self, stage: str, *sets: str) -> list[str]:
        """What `run` gives to `nfm`."""
        return ["run", stage, "-c", "tiny.toml", *(part for text in sets for part in ("--set", text))]

    def wait(self, process: Process, exits: int = 0) -> subprocess.CompletedProcess[str]:
        """What a started command printed, when it has ended as it should."""
        out, err = process.communicate(timeout=PATIENCE)
        return self._checked(process.args, process.returncode, exits, out, err)

    def _checked(
        self, words: Any, code: int | None, exits: int, out: str, err: str
    ) -> subprocess.CompletedProcess[str]:
        assert code == exits, f"exit {code}, not {exits}:\n{out}\n{err}"
        assert "Traceback" not in out + err, f"{out}\n{err}"
        return subprocess.CompletedProcess(words, code, out, err)

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

    def until(self, condition: Callable[[], object], process: Process, seconds: float = PATIENCE) -> None:
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
