"""Repair: bad shards of a store are set aside, never deleted, so that the pairs stage encodes them again."""

from __future__ import annotations

import time

from nfm.pipeline.artifact import Artifact, ArtifactError
from nfm.pipeline.lock import Lock
from nfm.stages import pairs_upkeep


def repair_store(artifact: Artifact) -> list[str]:
    """Move bad shards, and before them the manifests that list them, to `quarantine/`; returns the shards' names.

    The pairs stage then encodes exactly these again and seals a new generation. On the same kind of device the bytes
    come out the same, and so does the content digest, by which what was made from the store finds it again.
    """
    if "store" not in artifact.spec:
        raise ArtifactError(f"{artifact.name} is no pair store; make other artifacts again: remove the folder, run it")
    with Lock(artifact.path):
        bad = pairs_upkeep.bad_shards(artifact.path)
        aside = artifact.path / "quarantine" / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        for file in pairs_upkeep.files_of_shards(artifact.path, bad):
            target = aside / file.relative_to(artifact.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
    return bad
