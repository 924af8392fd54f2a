"""Models, losses and the loop give on every device what they give on the CPU; `make gpu` runs this too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfm.trainers import flow_matching, likelihood, loop, solvers
from nfm.trainers.couplings.coupling import NFM
from nfm.trainers.metrics.frechet import frechet_distance
from nfm.trainers.models.sit import SiT
from nfm.trainers.models.tarflow import TarFlow
from nfm.trainers.training.checkpoint_folder import CheckpointFolder
from nfm.trainers.training.products import forbid_tf32
from nfm.trainers.training.randomness import Randomness

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPE, CLASSES, BATCH = (1, 8, 8), 3, 6
on_every_device = pytest.mark.parametrize("device", DEVICES)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device is not there")


@pytest.fixture(autouse=True)
def _float32_is_float32() -> None:
    forbid_tf32()


def flow() -> TarFlow:
    torch.manual_seed(0)
    model = TarFlow(SHAPE, CLASSES, patch=2, channels=32, blocks=2, layers=2, head_size=16)
    return shaken(model)


def student() -> SiT:
    torch.manual_seed(0)
    return shaken(SiT(SHAPE, CLASSES, patch=2, width=32, depth=2, head_size=16))


def shaken(model: Any) -> Any:
    """With small random weights everywhere: where an output starts at zero nothing would be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def batch(device: str) -> SimpleNamespace:
    random = torch.Generator().manual_seed(1)
    image = torch.rand(BATCH, *SHAPE, generator=random) * 2 - 1
    noise = torch.randn(BATCH, *SHAPE, generator=random)
    label = torch.tensor([0, 1, 2, -1, 0, 1])
    return SimpleNamespace(image=image.to(device), noise=noise.to(device), label=label.to(device))


@on_every_device
def test_the_flow_encodes_as_on_the_cpu_and_decodes_what_it_encoded(device: str) -> None:
    given, here = batch(device), batch("cpu")
    model = flow().to(device)
    with torch.no_grad():
        z, logdet = model.encode(given.image, given.label)
        if device != "cpu":
            expected, expected_logdet = flow().encode(here.image, here.label)
            torch.testing.assert_close(z.cpu(), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logdet.cpu(), expected_logdet, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.decode(z, given.label), given.image, rtol=1e-3, atol=1e-3)


@on_every_device
def test_in_bfloat16_noise_is_near_that_of_float32_and_its_affine_steps_are_float32(device: str) -> None:
    given = batch(device)
    found = NFM(flow().to(device), 0.1, 1.0, device, torch.bfloat16)(given.image, given.label, given.noise)
    exact = NFM(flow().to(device), 0.1, 1.0, device)(given.image, given.label, given.noise)
    assert found.noise.dtype == found.nll.dtype == torch.float32  # type: ignore[union-attr]
    error = (found.noise - exact.noise).square().mean().sqrt() / exact.noise.square().mean().sqrt()
    assert 0 < error < 0.03


def loss_and_gradient(model: nn.Module, device: str, teacher: bool) -> tuple[float, Tensor]:
    given, drawn = batch(device), Randomness(3, BATCH)  # the same numbers on every device
    random = SimpleNamespace(
        uniform=lambda *shape: drawn.uniform(*shape).to(device), normal=lambda *shape: drawn.normal(*shape).to(device)
    )
    model = model.to(device)
    value = (
        likelihood.loss(model, given.image, given.label, random, 0.1, flips=True)  # type: ignore[arg-type]
        if teacher
        else flow_matching.loss(model, given.image, given.noise, given.label, random)  # type: ignore[arg-type]
    )
    value.backward()
    return float(value.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu()


@on_cuda
@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "student"])
def test_a_loss_and_its_gradient_are_those_of_the_cpu(teacher: bool) -> None:
    make = flow if teacher else student
    value, gradient = loss_and_gradient(make(), "cuda", teacher)
    expected, expected_gradient = loss_and_gradient(make(), "cpu", teacher)
    assert value == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-4)


class Endless:
    """One batch without end, which knows how often it was given."""

    def __init__(self, device: str) -> None:
        self.given, self.taken = batch(device), 0

    def __iter__(self) -> Endless:
        return self

    def __next__(self) -> SimpleNamespace:
        self.taken += 1
        return self.given

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def trained(device: str, folder: Path | None = None, most: int = 100) -> loop.Trained:
    def loss(model: Any, given: Any, random: Randomness) -> tuple[Tensor, dict[str, float]]:
        return flow_matching.loss(model, given.image, given.noise, given.label, random), {}

    batches = Endless(device)
    recipe = loop.Recipe(8 * BATCH, BATCH, 1e-3, ema=0.5)
    checkpoints = CheckpointFolder(folder) if folder else None
    return loop.train(
        student(), loss, batches, recipe, device=device, autocast=torch.bfloat16, checkpoints=checkpoints,
        stop=lambda: batches.taken >= most,
    )  # fmt: skip


@on_every_device
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(device: str, tmp_path: Path) -> None:
    whole = trained(device)
    assert not trained(device, tmp_path, most=3).finished
    again = trained(device, tmp_path)
    assert (whole.finished, again.finished) == (True, True)
    for one, other in zip(whole.ema.parameters(), again.ema.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@on_cuda
def test_samples_are_those_of_the_cpu() -> None:
    found = []
    for where in ("cuda", "cpu"):
        given, model = batch(where), student().to(where)
        found.append(solvers.sample(flow_matching.velocity(model, given.label), given.noise, 7, "heun").cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@on_cuda
def test_distances_are_those_of_the_cpu() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 8, generator=random), torch.randn(40, 8, generator=random) + 1
    assert frechet_distance(a.to("cuda"), b.to("cuda")) == pytest.approx(frechet_distance(a, b), rel=1e-6)
