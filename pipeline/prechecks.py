"""Checks that the sections of a run fit each other and the data, before anything is made from them.

A stage with such rules has `fits(config, facts)`, which raises Unfit. The facts are of the images that it sees, those
of the data or their latents. They grow: the config gives the shape of some sources' images, the finished data stage
gives everything.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from nfm.pipeline.artifacts.artifact import Artifact, artifacts_root
from nfm.pipeline.config import image_shape
from nfm.pipeline.graph import Node, manifest_of, optional, upstream
from nfm.stages.base import Section, StageError
from nfm.stages.data.config import DataConfig
from nfm.stages.display.watching.lines import check_watching
from nfm.stages.executors import ray_cluster
from nfm.stages.trained.devices import launched
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import check_precision
from nfm.stages.trained.training.section import TrainingSection
from nfm.storage.files.paths import is_remote


def check(nodes: Mapping[str, Node], target: str) -> None:
    """Raises Unfit where a stage that is still to be made could not be, as far as can be told yet."""
    check_fits((node for node in upstream(nodes, target) if not node.made()), Facts(nodes))


def check_fits(nodes: Iterable[Node], known: Facts) -> None:
    """Raises Unfit for a section that does not fit images of which this is known."""
    for node in nodes:
        optional(node.stage, "fits", lambda *_: None)(node.config, known.of(node))


def ready(nodes: Mapping[str, Node], target: str) -> None:
    """The same before a run. Also raises StageError for anything that the stages need and that is missing here.

    A stage says so in `needs(config)`, in `room(config, facts)` how many bytes it writes, and in `tries(config, facts)`
    what only its user's own code can tell, which runs here and never where a run is planned.
    """
    check(nodes, target)
    known = Facts(nodes)
    left = [node for node in upstream(nodes, target) if not node.made()]
    for node in left:
        optional(node.stage, "needs", partial(_where, node.name))(node.config)
    for node in left:
        optional(node.stage, "tries", lambda *_: None)(node.config, known.of(node))
    for node in left:
        _check_room(node, optional(node.stage, "room", lambda *_: 0)(node.config, known.of(node)))


def _where(name: str, config: Section) -> None:
    """Checks where a stage computes, a device or a cluster of workers, and who is to be told of a training."""
    if isinstance(config, TrainingSection):
        check_watching(name, config.watch)
    if isinstance(config, TrainingSection) and config.workers > 1 and launched.size() == 1:
        who, without = f"{name}.workers = {config.workers}", f"--set {name}.workers=1, or torchrun"
        ray_cluster.check_reachable(config.ray_address, who, without)
    elif (device := getattr(config, "device", None)) is not None:
        found = pick_device(device)
        if (precision := getattr(config, "precision", None)) is not None:
            check_precision(found, precision, f"{name.partition(':')[0]}.precision")


def _check_room(node: Node, size: int) -> None:
    """Raises StageError if the disk has less space than the artifact still needs."""
    root, folder = artifacts_root(), node.folder()
    if is_remote(root):  # a bucket has room, and what the disk here needs is known to nobody
        return
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder is not None else 0
    where = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(where).free
    if size - there > free:
        raise StageError(
            f"{node.name}: writes about {size - there:,} bytes more, and {where} has {free:,} free: free space, let "
            "NFM_ARTIFACTS name a folder of another disk, or make fewer (pairs.draws); nothing was begun"
        )


class Facts:
    """What is known of the images: the metrics of the finished stage that made them, else what the configs determine.

    `data` stands for a data stage that is not looked at.
    """

    def __init__(self, nodes: Mapping[str, Node], data: Mapping[str, Any] | None = None) -> None:
        self.data = _of_data(nodes.get("data")) if data is None else dict(data)
        self.latents, node = self.data, nodes.get("latents")
        if node is not None:
            artifact = node.artifact() if data is None else None
            made = artifact is not None and artifact.done
            self.latents = _metrics(artifact) if made else optional(node.stage, "told", dict)(node.config, self.data)

    def of(self, node: Node) -> dict[str, Any]:
        """Of the images that this node sees."""
        return self.data if node.sees_pixels() else self.latents


def _of_data(node: Node | None) -> dict[str, Any]:
    if node is None:
        return {}
    if node.made():
        return _metrics(node.artifact())
    assert isinstance(node.config, DataConfig)
    shape = image_shape(node.config)
    return {} if shape is None else {"image_shape": list(shape)}


def _metrics(artifact: Artifact | None) -> dict[str, Any]:
    return {} if artifact is None else dict(manifest_of(artifact)["metrics"])
