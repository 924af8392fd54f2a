"""The precision of a config: what each means, where it runs, and that nothing else of a run changes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from nfm.pipeline import prechecks
from nfm.pipeline.builder import build
from nfm.pipeline.config import load
from nfm.stages.base import Unfit
from nfm.stages.stores import audit
from nfm.stages.trained import student, teacher
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import Precision, check_precision, precision_context
from nfm.stages.trained.devices.timing import Clock
from nfm.trainers.couplings.coupling import NFM
from nfm.trainers.models.head import exact
from nfm.trainers.models.tarflow import TarFlow
from nfm.trainers.training.products import in_tf32, products

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


def test_choosing_a_device_turns_tf32_off_also_where_torch_convolves_in_it() -> None:
    torch.backends.cudnn.allow_tf32 = True
    pick_device("cpu")
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"


@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_precision_is_that_of_products_within_its_context_alone(precision: Precision) -> None:
    with precision_context("cpu", precision):
        assert in_tf32() == (precision == "tf32")
        assert (torch.eye(2) @ torch.eye(2)).dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
    assert not in_tf32()
    with products(tf32=True), precision_context("cpu", "float32"):
        assert not in_tf32()


def test_a_teacher_encodes_in_tf32_where_it_was_asked_for() -> None:
    flow = TarFlow((1, 4, 4), classes=0, patch=2, channels=8, blocks=1, layers=1, head_size=8)
    inside: list[bool] = []
    flow.register_forward_pre_hook(lambda *_: inside.append(in_tf32()))
    flow.blocks[0].layers[0].register_forward_pre_hook(lambda *_: inside.append(in_tf32()))
    image, label = torch.zeros(2, 1, 4, 4), torch.full((2,), -1)
    for tf32 in (False, True):
        inside.clear()
        NFM(flow, 0.1, 1.0, tf32=tf32)(image, label, image)
        assert set(inside) == {tf32}
    assert not in_tf32()


@pytest.mark.parametrize("head", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), nn.Conv2d(5, 3, 3, padding=1)])
def test_the_last_layer_of_a_network_in_tf32_is_exact(head: nn.Linear | nn.Conv2d) -> None:
    h = torch.randn(2, 5, *(() if isinstance(head, nn.Linear) else (4, 4)), requires_grad=True)
    with products(tf32=True):
        found = exact(head, h)
    found.square().sum().backward()
    wanted = head.double()(h.double()).float()
    assert torch.equal(found, wanted)
    assert h.grad is not None
    assert head.float().weight.grad is not None


def test_whoever_only_uses_a_network_does_not_wait_for_the_compiler() -> None:
    """Its import takes seconds. An optimizer imports it as well, so this is of encoding and sampling."""
    uses = "import sys, nfm.trainers.couplings.coupling, nfm.trainers.models.unet, nfm.trainers.models.sit"
    subprocess.run([sys.executable, "-c", f"{uses}\nassert 'torch._dynamo' not in sys.modules"], check=True)


@NO_GPU
@pytest.mark.parametrize("stage", ["teacher", "student", "features", "pairs", "evaluate"])
def test_tf32_is_refused_without_a_cuda_device_before_anything_is_made(stage: str, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[data]\nsource = "digits"\n[pairs]\nexecutor = "serial"\n')
    with pytest.raises(Unfit, match=rf'{stage}\.precision = "tf32" is of CUDA devices, and the device is cpu'):
        prechecks.ready(build(load(config, [f"{stage}.precision=tf32"])), stage)
    assert sorted(tmp_path.iterdir()) == [config]


@NO_GPU
def test_a_plan_of_tf32_has_no_time_here_and_says_why() -> None:
    said: list[str] = []
    facts = {"image_shape": (1, 8, 8), "classes": 3, "device_memory": 8e9}
    for module, section in ((teacher, teacher.TeacherConfig), (student, student.StudentConfig)):
        cost = module.cost(section(precision="tf32"), facts, Clock(said.append))
        assert cost.seconds is None
        assert 'no time (precision = "tf32" is of CUDA devices' in cost.unknown
    assert not said


def test_float32_and_bfloat16_run_anywhere() -> None:
    for precision in ("float32", "bfloat16"):
        check_precision("cpu", precision)


def test_an_audit_knows_how_near_every_precision_comes() -> None:
    for table in (audit.NOISE_TOLERANCE, audit.DECODE_TOLERANCE, audit.IMAGE_TOLERANCE):
        assert set(table) == set(get_args(Precision))
        assert table["float32"] < table["tf32"] < table["bfloat16"]
