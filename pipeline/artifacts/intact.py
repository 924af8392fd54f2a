"""Whether the files of an artifact are those of its manifest. An audit asks it, and a run before it reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError, is_store, readable
from nfm.stages.display import units
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import inside, size_of

REMEDY = "restore the file from a copy, or remove the artifact's folder and run its stage again"
SHARDED = ("data", "latents")  # stages whose shards fail alone
_TOLD = 1 << 30  # bytes of inputs from which on it is said that they are read


def problem(folder: Path, file: Mapping[str, Any], hashed: bool = True) -> str | None:
    """What is wrong with a file that a manifest lists: its place, its size or, with `hashed`, its SHA-256."""
    path = folder / file["path"]
    try:
        inside(folder, file["path"])
    except StorageError as error:
        return str(error).removeprefix(f"{path}: ").partition("; ")[0]
    if (size := size_of(path)) is None:
        return "missing"
    if size != file["bytes"]:
        return f"{size} bytes, the manifest says {file['bytes']}"
    if hashed and atomic.hash_file(path)[0] != file["sha256"]:
        return "its SHA-256 is not the manifest's: the bytes changed"
    return None


def checked_inputs(inputs: Mapping[str, Artifact], say: Callable[[str], None]) -> dict[str, Path]:
    """Where a stage reads its inputs, as `readable` has it, when their bytes are those of their manifests.

    Raises ArtifactError for a file whose bytes changed, before anything is made of it. A file of data or latents that
    is missing or has another size is left to its reader, which names it. So the shards of a source that can be read are
    made although others cannot. Shards of pair stores are left to `nfm pairs verify`: a student may read a part of
    them, from far away.
    """
    paths = readable(inputs)
    asked = [
        (paths[role], file)
        for role, found in inputs.items()
        if not is_store(found.path)
        for file in found.manifest().get("files", [])
        if size_of(paths[role] / file["path"]) == file["bytes"]
        or (file["payload"] and found.path.parent.name not in SHARDED)
    ]
    if (held := sum(file["bytes"] for _, file in asked)) > _TOLD:
        say(f"reading {units.size(held)} of inputs, to see that they are what their manifests say")
    for (folder, file), wrong in zip(asked, parallel(lambda one: problem(*one), asked), strict=True):
        if wrong is not None:
            raise ArtifactError(f"{folder / file['path']}: {wrong}; {REMEDY}")
    return paths
