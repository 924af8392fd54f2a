"""What is trained, at which sizes: a section of a config, and the images that it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nfm.stages.trained import student, teacher
from nfm.stages.trained.costs import Trial
from nfm.stages.trained.student import StudentConfig
from nfm.stages.trained.teacher import TeacherConfig

Config = TeacherConfig | StudentConfig


@dataclass(frozen=True)
class Case:
    """A training of ours: `config` is its section; `image_shape` and `classes` are the data's."""

    name: str
    config: Config
    image_shape: tuple[int, int, int]
    classes: int

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the data, as stages are told them."""
        return {"image_shape": self.image_shape, "classes": self.classes}

    @cached_property
    def trial(self) -> Trial:
        """FLOPs of a forward pass of one image, and what makes the model and its loss."""
        if isinstance(self.config, TeacherConfig):
            return teacher.trials(self.config, self.facts)[0]
        return student.trials(self.config, self.facts)[0]


def _teacher(name: str, image_shape: tuple[int, int, int], classes: int, **fields: Any) -> Case:
    return Case(name, TeacherConfig(**fields), image_shape, classes)


def _student(name: str, image_shape: tuple[int, int, int], classes: int, **fields: Any) -> Case:
    return Case(name, StudentConfig(**fields), image_shape, classes)


_FASHION = {"channels": 128, "blocks": 4, "layers": 2, "batch_size": 32}
# "cpu": configs/fashion14.toml and fashion.toml, a flow of 256 tokens, the default student, SiT-S/2 on latents.
# "paper": configs/imagenet64.toml, and SiT-XL/4 as its authors have it (16 heads) on the same images.
SIZES: dict[str, list[Case]] = {
    "tiny": [
        _teacher("teacher", (1, 8, 8), 3, patch=4, channels=64, blocks=2, layers=1, batch_size=4),
        _student("student", (1, 8, 8), 3, patch=4, width=64, depth=2, head_size=32, batch_size=4),
    ],
    "cpu": [
        _teacher("teacher 14 px", (1, 14, 14), 10, patch=2, **_FASHION),
        _teacher("teacher 28 px", (1, 28, 28), 10, patch=4, **_FASHION),
        _teacher("teacher 64 px", (3, 64, 64), 100, patch=4, channels=256, blocks=4, layers=2, batch_size=8),
        _student("student 28 px", (1, 28, 28), 10, batch_size=64),
        _student("SiT-S/2", (4, 32, 32), 1000, patch=2, width=384, depth=12, batch_size=4),
    ],
    "paper": [
        _teacher("teacher ImageNet64", (3, 64, 64), 1000, patch=2, channels=768, blocks=8, layers=8, batch_size=8),
        _student("SiT-XL/4", (3, 64, 64), 1000, patch=4, width=1152, depth=28, head_size=72, batch_size=32),
    ],
}  # fmt: skip
