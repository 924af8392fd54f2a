"""The cost of stages: torch's count from shapes equals the count by formula and the multiplications that
really happen.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nfm.stages.base import StageError
from nfm.stages.trained import costs, student
from nfm.stages.trained.student import StudentConfig
from nfm.trainers.models.tarflow import TarFlow
from nfm.trainers.models.unet import UNet

LARGE = (3, 64, 64)


def test_a_transformers_count_is_its_weights_and_attention_within_two_per_cent() -> None:
    for shape, patch, width, depth in (((1, 28, 28), 4, 128, 6), (LARGE, 4, 576, 3)):
        tokens, features = costs.tokens_of(shape, patch)
        weights = 12 * depth * width**2 + 2 * features * width
        by_hand = 2.0 * tokens * weights + 4.0 * depth * tokens**2 * width
        counted = student.flops(StudentConfig(patch=patch, width=width, depth=depth), shape)
        assert by_hand < counted < 1.02 * by_hand  # the condition is modulated once an image


def test_a_u_nets_count_is_what_its_layers_multiply_on_a_cpu() -> None:
    shape = (3, 28, 20)
    model = UNet(shape, 0, width=16, depth=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape), torch.zeros(1))
    seen = sum(n for kind, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(kind))
    attention = 4 * 5 * (7 * 5) ** 2 * 32  # a CPU's own kernel, which torch does not count
    assert student.flops(StudentConfig(arch="unet", width=16, depth=2), shape) == seen + attention


def test_the_teachers_arithmetic_is_what_torch_counts_with_half_of_the_attention() -> None:
    sizes = {"patch": 4, "channels": 128, "blocks": 2, "layers": 2}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        TarFlow(LARGE, 10, **sizes)(torch.empty(1, *LARGE))
    counts = counter.get_flop_counts()["Global"]
    attention = counts[torch.ops.aten.bmm]
    assert attention > 0.1 * sum(counts.values())  # it matters here
    assert costs.teacher_flops(LARGE, SimpleNamespace(**sizes)) == sum(counts.values()) - attention / 2


def test_the_teachers_parameters_are_those_that_it_has() -> None:
    sizes = {"patch": 4, "channels": 128, "blocks": 3, "layers": 2}
    for classes in (0, 10):
        with torch.device("meta"):
            model = TarFlow(LARGE, classes, **sizes)
        own = sum(values.numel() for values in model.parameters())
        assert costs.teacher_parameters(LARGE, classes, SimpleNamespace(**sizes)) == own


def test_sizes_that_make_no_student_are_told_with_the_section_before_anything_runs() -> None:
    with pytest.raises(StageError, match=r"config section \[student\]: patch = 5 does not divide the image 28 x 28"):
        student.flops(StudentConfig(patch=5), (1, 28, 28))
