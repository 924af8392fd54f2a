"""The table of student architectures. A new one is one record here and one file, which `build` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nfm.stages.base import StageError, call
from nfm.trainers.models.sizes import check_patch, check_unet_width, check_width

FIRST = "sit"  # the architecture of weights that do not name one


@dataclass(frozen=True)
class Architecture:
    """`build`, as `module:class`, takes image_shape, classes and the given `fields` of [student].

    The network is called as `network(x, t, label)` with x [B, C, H, W], t [B], label int64 [B] (-1: none).
    `check(config, image_shape)` raises ValueError for sizes that do not fit; image_shape is None if unknown. `defaults`
    are for fields that the config does not set. torch counts the FLOPs.
    """

    build: str
    fields: tuple[str, ...]
    check: Callable[[Any, Sequence[int] | None], None] = lambda config, image_shape: None
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _check_sit(config: Any, image_shape: Sequence[int] | None) -> None:
    check_width(config.width, config.head_size)
    if image_shape is not None:
        check_patch(image_shape, config.patch)


def _check_unet(config: Any, image_shape: Sequence[int] | None) -> None:
    check_unet_width(config.width)


# A U-Net with the default width of a transformer would cost tens of times as much, so it has its own defaults.
ARCHITECTURES = {
    "sit": Architecture("nfm.trainers.models.sit:SiT", ("width", "depth", "patch", "head_size"), _check_sit),
    "unet": Architecture("nfm.trainers.models.unet:UNet", ("width", "depth"), _check_unet, {"width": 32, "depth": 1}),
}


def sizes_of(config: Any, image_shape: Sequence[int], classes: int) -> dict[str, Any]:
    """The sizes to store beside the weights. Weights without `arch` are of the first architecture."""
    named = {} if config.arch == FIRST else {"arch": config.arch}
    own = {name: getattr(config, name) for name in ARCHITECTURES[config.arch].fields}
    return {**named, "image_shape": list(image_shape), "classes": classes, **own}


def build(sizes: Mapping[str, Any]) -> Any:
    """The untrained network of these sizes. Raises StageError for an unknown architecture."""
    own = dict(sizes)
    name = own.pop("arch", FIRST)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise StageError(
            f"these weights are of architecture {name!r}, which is not known here; there are "
            f"{', '.join(ARCHITECTURES)}: install what they were trained with"
        )
    return call(ARCHITECTURES[name].build, **own)
