"""Repair: bad shards of a store are set aside, never deleted, so that the pairs stage encodes them again."""

from __future__ import annotations

import time
from pathlib import Path

from nfm.pipeline.artifact import Artifact, ArtifactError
from nfm.pipeline.lock import Lock
from nfm.stages import pairs


def repair_store(artifact: Artifact) -> list[str]:
    """Move bad shards, their commits and the manifests that list them to `quarantine/`; returns the shards' names.

    The pairs stage then encodes exactly these again. On the same kind of device their bytes come out the same, and
    so does the store's content digest.
    """
    if artifact.spec["stage"] != pairs.NAME:
        raise ArtifactError(f"{artifact.name} is no pair store; make other artifacts again: remove the folder, run it")
    with Lock(artifact.path):
        bad = pairs.bad_shards(artifact.path)
        aside = artifact.path / "quarantine" / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        files = [file for name in bad for file in pairs.files_of_shard(artifact.path, name)]
        if bad:
            files += sorted(artifact.path.glob("manifest.g*.json"))
        for file in files:
            _move(file, aside / file.relative_to(artifact.path))
    return bad


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
