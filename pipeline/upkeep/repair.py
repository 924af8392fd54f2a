"""Repair: bad shards and manifests are moved aside, never deleted, so that the pairs stage makes them again."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from nfm.pipeline.artifacts.artifact import Artifact, check_store
from nfm.pipeline.artifacts.lock import Lock
from nfm.stages.stores import repair
from nfm.storage.files.paths import inside, is_remote, move_objects


def repair_store(artifact: Artifact) -> list[str]:
    """Moves bad shards, after the manifests that list them, to `quarantine/`. Returns what was bad.

    The pairs stage then encodes exactly these again and seals a new generation. On the same kind of device the bytes
    are the same, and so is the content digest. Artifacts that were made from the store find it again by this digest. An
    unreadable manifest is also moved aside: its contents are sealed again from the commits.
    """
    check_store(artifact, f"only stores are repaired; `nfm audit {artifact.name}` says how this is mended")
    with Lock(artifact.path):
        aside = artifact.path / "quarantine" / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        damaged = repair.damaged_manifests(artifact.path)
        _set_aside(artifact.path, damaged, aside)
        bad = repair.bad_shards(artifact.path)
        _set_aside(artifact.path, repair.files_of_shards(artifact.path, bad), aside)
    return [*(path.name for path in damaged), *bad]


def _set_aside(root: Path, files: Iterable[Path], aside: Path) -> None:
    for file in files:
        for path in (file, aside):  # raises if a link would lead out of the store, or into it
            inside(root, str(path.parent.relative_to(root)))
        target = aside / str(file.relative_to(root))
        if is_remote(root):
            move_objects(file, target)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
