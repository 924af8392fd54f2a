"""The promises of the training loop: exact resume, the schedule, honest log lines, refusals."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nfm.trainers.checkpoint import CheckpointError
from nfm.trainers.loop import Trained, learning_rate, train
from nfm.trainers.training.checkpoint_folder import CheckpointFolder
from nfm.trainers.training.state import Recipe

RECIPE = Recipe(examples=320, batch_size=16, learning_rate=1e-2, warmup_examples=64, ema=0.9)


class Batches:
    """Endless batches (x, y) of a line with noise, in an order that its state continues."""

    def __init__(self, size: int = 16) -> None:
        random = torch.Generator().manual_seed(7)
        self.x = torch.randn(64, 3, generator=random)
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(64, generator=random)
        self.size = size
        self.consumed = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        epoch, start = divmod(self.consumed, len(self.x))
        rows = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        rows = rows[start : start + self.size]
        self.consumed += self.size
        return self.x[rows], self.y[rows]

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]


def network(seed: int = 0) -> nn.Module:
    """With dropout and batch normalisation, whose randomness and buffers a resume must also continue."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def noisy_regression(model, batch, random):
    x, y = batch
    x = x + 0.1 * random.normal(*x.shape[1:])
    error = (model(x)[:, 0].float() - y).square().mean()
    return error, {"rmse": error.sqrt()}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def stop_after(steps: int):
    calls = iter(range(steps + 1))
    return lambda: next(calls) == steps


TIMES = ("images_per_second", "data_wait_share", "seconds")


def without_times(lines):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("steps", [1, 7, 19])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(steps, autocast, tmp_path):
    def run(folder: Path, lines: list[dict], **options) -> Trained:
        return train(
            network(options.pop("seed", 0)),
            noisy_regression,
            Batches(),
            RECIPE,
            autocast=autocast,
            checkpoints=CheckpointFolder(folder),
            log=lines.append,
            log_every=48,
            **options,
        )

    whole_lines, lines = [], []
    whole = run(tmp_path / "whole", whole_lines)

    stopped = run(tmp_path / "stopped", lines, stop=stop_after(steps))
    assert (stopped.finished, stopped.examples_seen) == (False, steps * 16)
    # Other initial weights: everything must come from the checkpoint.
    resumed = run(tmp_path / "stopped", lines, seed=1)

    assert (resumed.finished, resumed.examples_seen) == (True, 320)
    assert_same_weights(resumed.model, whole.model)
    assert_same_weights(resumed.ema, whole.ema)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert without_times(lines) == without_times(whole_lines)


def contents(folder: Path) -> list[Any]:
    """What the newest checkpoint holds; the bytes of a safetensors header come in any order."""
    newest, state = CheckpointFolder(folder).read()
    tensors = {name: value.numpy().tobytes() for name, value in load_file(next(newest.glob("*.safetensors"))).items()}
    return [newest.name, tensors, state]


def test_resume_from_a_periodic_checkpoint_equals_uninterrupted(tmp_path):
    whole = train(
        network(), noisy_regression, Batches(), RECIPE, checkpoints=CheckpointFolder(tmp_path, keep=9), save_every=100
    )
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [112, 208, 304, 320]
    for name in ("000000000304", "000000000320"):
        shutil.rmtree(tmp_path / name)
    resumed = train(network(1), noisy_regression, Batches(), RECIPE, checkpoints=CheckpointFolder(tmp_path))
    assert_same_weights(resumed.model, whole.model)


def test_resume_keeps_channels_last_weights_exact(tmp_path):
    recipe = Recipe(examples=64, batch_size=8, learning_rate=1e-2)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def convolutional() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        return model.to(memory_format=torch.channels_last)

    def loss(model, batch, random):
        return model(batch).square().mean(), {}

    def endless():
        while True:
            yield images

    whole = train(convolutional(), loss, endless(), recipe)
    folder = CheckpointFolder(tmp_path)
    train(convolutional(), loss, endless(), recipe, checkpoints=folder, stop=stop_after(3))
    resumed = train(convolutional(), loss, endless(), recipe, checkpoints=folder)
    assert_same_weights(resumed.model, whole.model)


def test_a_finished_checkpoint_trains_no_further(tmp_path):
    folder = CheckpointFolder(tmp_path)
    whole = train(network(), noisy_regression, Batches(), RECIPE, checkpoints=folder)
    again = train(network(1), noisy_regression, iter(()), RECIPE, checkpoints=folder)
    assert again.finished
    assert_same_weights(again.ema, whole.ema)


def test_learning_rate_warms_up_linearly_and_falls_along_a_cosine():
    recipe = Recipe(examples=1100, batch_size=10, learning_rate=1.0, warmup_examples=100, final_rate=0.1)
    assert [learning_rate(recipe, seen) for seen in (10, 50, 100)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(recipe, 600) == pytest.approx(0.55)
    assert learning_rate(recipe, 1100) == pytest.approx(0.1)
    assert learning_rate(recipe, 2000) == pytest.approx(0.1)


def test_the_steps_are_those_of_adamw_with_clipping():
    recipe = replace(RECIPE, clip=0.5, weight_decay=0.1)
    trained = train(network().double(), quadratic, Batches(), recipe)

    expected = network().double().train()
    optimizer = torch.optim.AdamW(expected.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=False)
    for seen in range(16, 321, 16):
        optimizer.zero_grad()
        quadratic(expected, None, None)[0].backward()
        gradients = [parameter.grad for parameter in expected.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_(min(1.0, 0.5 / float(norm)))
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, seen)
        optimizer.step()
    for one, other in zip(trained.model.parameters(), expected.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def quadratic(model, batch, random):
    return sum((parameter - 1).square().sum() for parameter in model.parameters()), {}


def test_training_finds_the_line_and_the_log_shows_it():
    lines: list[dict] = []
    recipe = replace(RECIPE, examples=16_000, learning_rate=3e-2)
    model = nn.Linear(3, 1)
    trained = train(model, noisy_regression, Batches(), recipe, unit="pairs", log=lines.append, log_every=1600)
    assert [line["pairs_seen"] for line in lines] == list(range(1600, 16_001, 1600))
    assert lines[-1]["loss"] < 0.2 < lines[0]["loss"]
    assert lines[-1]["learning_rate"] == pytest.approx(recipe.final_rate)
    assert all(0 <= line["data_wait_share"] <= 1 and line["pairs_per_second"] > 0 for line in lines)
    assert all(math.isfinite(line["grad_norm"]) and line["rmse"] > 0 for line in lines)
    weights = trained.ema.weight[0]
    torch.testing.assert_close(weights, torch.tensor([1.0, -2.0, 0.5]), rtol=0, atol=0.15)
    assert not trained.model.training
    assert not trained.ema.training


@pytest.mark.parametrize("every", [16, 160, 10_000])  # it is looked for when a checkpoint is due, and at the end
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(bad, every, tmp_path):
    model = network()
    counted = iter(range(100))
    before = {}

    def breaks_at_the_third_step(model, batch, random):
        loss, figures = noisy_regression(model, batch, random)
        if next(counted) == 2:
            before.update({name: value.clone() for name, value in model.named_parameters()})
            loss = loss * bad
        return loss, figures

    with (
        pytest.raises(FloatingPointError, match=r"after 32 images.*learning_rate"),
        CheckpointFolder(tmp_path) as folder,
    ):
        train(model, breaks_at_the_third_step, Batches(), RECIPE, checkpoints=folder, save_every=every)
    assert [int(path.name) for path in tmp_path.iterdir()] == ([32] if every == 16 else [])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_loss_that_is_not_finite_before_anything_is_learned_is_not_blamed_on_the_rate():
    def breaks(model, batch, random):
        return noisy_regression(model, batch, random)[0] * math.nan, {}

    with pytest.raises(FloatingPointError, match=r"after 0 images: no weight had changed.*whatever the learning rate"):
        train(network(), breaks, Batches(), RECIPE)


def test_a_checkpoint_of_another_recipe_or_model_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path)
    train(network(), noisy_regression, Batches(), RECIPE, checkpoints=folder, stop=stop_after(2))
    with pytest.raises(CheckpointError, match=r"recipe.learning_rate = 0.01, not 0.5"):
        train(network(), noisy_regression, Batches(), replace(RECIPE, learning_rate=0.5), checkpoints=folder)
    with pytest.raises(CheckpointError, match="another model"):
        train(nn.Linear(3, 1), noisy_regression, Batches(), RECIPE, checkpoints=folder)


def test_batches_that_end_too_early_are_named():
    few = [next(Batches()) for _ in range(3)]
    with pytest.raises(ValueError, match="ended after 48 of 320 images"):
        train(network(), noisy_regression, few, RECIPE)


def test_a_recipe_or_autocast_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        Recipe(examples=1, batch_size=0, learning_rate=1.0)
    with pytest.raises(ValueError, match="warmup_examples is 11"):
        Recipe(examples=10, batch_size=1, learning_rate=1.0, warmup_examples=11)
    with pytest.raises(ValueError, match="float16"):
        train(network(), noisy_regression, Batches(), RECIPE, autocast=torch.float16)
