"""A run whose artifacts are in a bucket, and machines that share nothing else."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from nfm.pipeline.artifacts.artifact import Artifact, newest_manifest
from nfm.storage.files.paths import as_path, names_in
from tests.support.buckets.s3server import S3
from tests.support.lab import Lab, Process


@dataclass
class Bucket:
    """`nfm` with NFM_ARTIFACTS in a bucket. Each machine has its own scratch folder and working directory."""

    url: str
    s3: S3
    config: Path
    folder: Path
    machine: str = "one"

    @property
    def lab(self) -> Lab:
        """The working directory of the machine."""
        folder = self.folder / self.machine
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tiny.toml").write_bytes(self.config.read_bytes())
        return Lab(folder)

    @property
    def environment(self) -> dict[str, str]:
        here = self.folder / self.machine
        return {
            **self.s3.environment(), "NFM_ARTIFACTS": self.url, "NFM_SCRATCH": str(here / "scratch"),
            "NFM_CACHE": str(here / "cache"),
        }  # fmt: skip

    def on(self, machine: str) -> Bucket:
        """The same bucket, as another machine sees it."""
        return Bucket(self.url, self.s3, self.config, self.folder, machine)

    def nfm(self, *arguments: object, exits: int = 0) -> subprocess.CompletedProcess[str]:
        return self.lab.nfm(*arguments, exits=exits, **self.environment)

    def run(self, stage: str, *sets: str, exits: int = 0) -> subprocess.CompletedProcess[str]:
        return self.nfm(*self.lab.arguments(stage, *sets), exits=exits)

    def start(self, *arguments: object, **more: str) -> Process:
        return self.lab.start(*arguments, **self.environment, **more)

    def upload(self, lab: Lab, *stages: str, baselines: bool = False) -> None:
        """Puts finished artifacts of a run in a folder here: those of nfm, or of all couplings."""
        where: Any = as_path(self.url)
        for stage in stages:
            for file in sorted((lab.artifacts / stage if baselines else lab.only(stage).path).rglob("*")):
                if file.is_file() and file.parent.name != "events":
                    where.fs.put_file(str(file), f"{where.path}/{file.relative_to(lab.artifacts)}")

    def brought(self, artifact: Artifact) -> Path:
        """The files of a finished artifact, on this machine."""
        with mock.patch.dict(os.environ, self.environment):
            return artifact.readable

    def all(self, stage: str) -> list[Artifact]:
        """The artifacts of a stage, each at its newest manifest."""
        folder = as_path(self.url) / stage
        return [Artifact(folder / name, newest_manifest(folder / name)) for name in names_in(folder)]
