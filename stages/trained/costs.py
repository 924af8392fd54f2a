"""What stages cost before they run: what is counted, products from the sizes, time here, bytes on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nfm.stages.display import units

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Cost:
    """What making an artifact takes, None where that is not known or nothing.

    `count` is of `unit`, such as pairs; `seconds` are of one worker, on the device that `where` says; `bytes` lie on
    disk afterwards. `told` is further words, `unknown` says what is in no figure.
    """

    count: int | None = None
    unit: str = ""
    told: str = ""
    flops: float | None = None
    seconds: float | None = None
    bytes: int | None = None
    unknown: str = ""
    where: str = "here"

    def __str__(self) -> str:
        parts = [
            f"{self.count:,} {self.unit}" if self.count is not None else "",
            self.told,
            f"{units.size(self.bytes)} on disk" if self.bytes else "",
            f"{self.flops:.2g} FLOPs" if self.flops else "",
            f"about {units.about(self.seconds)} {self.where}" if self.seconds is not None else "",
            self.unknown,
        ]
        return ", ".join(part for part in parts if part)

    def figures(self) -> dict[str, Any]:
        """What is known, for machines: numbers by name, and in words what is not."""
        named = {self.unit: self.count, "flops": self.flops, "seconds": self.seconds, "bytes": self.bytes}
        return {name: value for name, value in (named | {"unknown": self.unknown or None}).items() if value is not None}


@dataclass(frozen=True)
class Trial:
    """What can be timed: `flops` are of a forward pass of an example; `make` gives a model and its loss, or a call."""

    flops: float
    make: Callable[[], Any]


class Counted(NamedTuple):
    """Of a network: FLOPs of one forward pass of one image, and the number of its parameters."""

    flops: float
    parameters: int


def tokens_of(image_shape: Sequence[int], patch: int) -> tuple[int, int]:
    """(tokens, features of a token) for images [C, H, W] in patches."""
    channels, height, width = image_shape
    return (height // patch) * (width // patch), channels * patch**2


def teacher_flops(image_shape: Sequence[int], config: Any) -> float:
    """FLOPs to encode one image: 12 width^2 weights in each layer, attention, embedding and head.

    Computed by formula: torch counts twice the work of causal attention, but fused kernels skip what is masked.
    """
    (tokens, features), width = tokens_of(image_shape, config.patch), config.channels
    weights = 12 * config.layers * width**2 + 3 * features * width
    return config.blocks * (2.0 * tokens * weights + 2.0 * config.layers * tokens**2 * width)


def teacher_parameters(image_shape: Sequence[int], classes: int, config: Any) -> int:
    """How many values a teacher learns, by arithmetic."""
    (tokens, features), width = tokens_of(image_shape, config.patch), config.channels
    layer = 12 * width**2 + 13 * width  # four matrices with biases, two norms
    ends = (features + 1 + tokens + classes) * width + 2 * features * (width + 1)
    return int(config.blocks * (config.layers * layer + ends))


def counted(build: Callable[[], nn.Module], image_shape: Sequence[int], with_time: bool = True) -> Counted:
    """What any network g(x, t), or g(x) without time, takes for an image, as torch counts it from shapes alone."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build()
        model.eval()(torch.empty(1, *image_shape), *([torch.empty(1)] if with_time else []))
    return Counted(float(counter.get_total_flops()), sum(values.numel() for values in model.parameters()))
