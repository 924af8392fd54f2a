"""What is measured: models at the paper's sizes, and tiny ones that show on a CPU that all works."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nfm.stages.trained import costs

if TYPE_CHECKING:
    import torch

    from nfm.trainers.models.sit import SiT
    from nfm.trainers.models.tarflow import TarFlow

BACKWARD = 3  # a forward and a backward pass are as much as three forward ones
ETA = 0.1


@dataclass(frozen=True)
class Sizes:
    """A teacher, a student and the images that they are of; batches are of training, encoding and sampling."""

    image_shape: tuple[int, int, int]
    classes: int
    teacher: dict[str, int]
    student: dict[str, int]
    train_batch: int
    student_batch: int
    encode_batch: int
    sample_batch: int

    def flow(self) -> TarFlow:
        from nfm.trainers.models.tarflow import TarFlow

        return TarFlow(self.image_shape, self.classes, **self.teacher)

    def network(self) -> SiT:
        from nfm.trainers.models.sit import SiT

        return SiT(self.image_shape, self.classes, **self.student)

    def teacher_flops(self) -> float:
        """To encode one image; decoding multiplies as much, with its caches."""
        return costs.teacher_flops(self.image_shape, SimpleNamespace(**self.teacher))

    def student_flops(self) -> float:
        """Of one evaluation for one image."""
        return costs.counted(self.network, self.image_shape).flops


@dataclass(frozen=True)
class Plan:
    """All sizes of a run. `seconds` are of one measurement, `train_seconds` of each training of the trial."""

    name: str
    paper: Sizes
    trial: Sizes
    seconds: float
    train_seconds: float
    images: int  # of the trial: training images, and so pairs
    samples: int  # that distances are taken of


def random_images(sizes: Sizes, count: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise in the images' range, and labels: what is computed does not depend on the values."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *sizes.image_shape, generator=generator) * 2 - 1
    return images.to(device), torch.randint(sizes.classes, (count,), generator=generator).to(device)


_SMALL: dict[str, Any] = {
    "image_shape": (1, 8, 8), "classes": 3,
    "teacher": {"patch": 4, "channels": 32, "blocks": 2, "layers": 1, "head_size": 32},
    "student": {"patch": 4, "width": 32, "depth": 1, "head_size": 32},
    "train_batch": 8, "student_batch": 8, "encode_batch": 8, "sample_batch": 8,
}  # fmt: skip
PLANS = {
    "tiny": Plan("tiny", Sizes(**_SMALL), Sizes(**_SMALL), 0.01, 0.3, 64, 200),
    # The paper's teacher of ImageNet64 and SiT-XL/4; the trial has 28x28 images, as Fashion-MNIST.
    "full": Plan(
        "full",
        Sizes(
            (3, 64, 64), 1000,
            {"patch": 2, "channels": 768, "blocks": 8, "layers": 8, "head_size": 64},
            {"patch": 4, "width": 1152, "depth": 28, "head_size": 72},
            train_batch=8, student_batch=32, encode_batch=128, sample_batch=64,
        ),
        Sizes(
            (1, 28, 28), 10,
            {"patch": 2, "channels": 384, "blocks": 8, "layers": 4, "head_size": 64},
            {"patch": 2, "width": 384, "depth": 8, "head_size": 64},
            train_batch=256, student_batch=512, encode_batch=1024, sample_batch=1000,
        ),
        seconds=5.0, train_seconds=400.0, images=60_000, samples=5_000,
    ),
}  # fmt: skip
