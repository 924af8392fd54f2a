"""Whether the sections of a run fit each other and the data, asked before anything is made from them.

A stage that minds has `fits(config, facts)`, which raises Unfit. What is known of the data grows: its config tells the
shape of some sources' images, the finished data stage all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nfm.pipeline.config import image_shape
from nfm.pipeline.graph import Node, manifest_of, optional, upstream
from nfm.stages.data.stage import DataConfig


def check(nodes: Mapping[str, Node], target: str) -> None:
    """Raises Unfit where a stage that is still to be made could not be, as far as can be told yet."""
    known = facts(nodes)
    for node in upstream(nodes, target):
        if not node.made():
            optional(node.stage, "fits", lambda *_: None)(node.config, known)


def facts(nodes: Mapping[str, Node]) -> dict[str, Any]:
    """What is known of the data: its stage's metrics once it ran, else the shape where the config alone tells it."""
    node = nodes.get("data")
    if node is None:
        return {}
    if node.made():
        artifact = node.artifact()
        return {} if artifact is None else dict(manifest_of(artifact)["metrics"])
    assert isinstance(node.config, DataConfig)
    shape = image_shape(node.config)
    return {} if shape is None else {"image_shape": list(shape)}
