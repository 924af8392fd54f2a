"""ml-tarflow's training step: the loop over batches of its train.py, its model, optimizer, schedule and metrics."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train.cases import Case
from benchmarks.train.checkouts import Script, module, stand_ins
from nfm.stages.trained.teacher import TeacherConfig, build, sizes_of
from nfm.trainers.models import published
from nfm.trainers.models.tarflow import nll_per_dim

STEPS = 10**6  # of the schedule's warm-up: weights hardly move while a rate is measured


class Tarflow:
    """Their training of a case. `stand_ins` are packages that its files import and its steps do not call."""

    def __init__(self, folder: Path, case: Case, device: str, compiled: bool) -> None:
        config = case.config
        assert isinstance(config, TeacherConfig)
        self.case, self.device = case, torch.device(device)
        flow = module(folder, "transformer_flow")
        with stand_ins("torchvision", "torchmetrics") as self.stand_ins:
            utils = module(folder, "utils")
        channels, side, _ = case.image_shape
        self.model: nn.Module = flow.Model(
            channels, side, config.patch, config.channels, config.blocks, config.layers, num_classes=case.classes
        ).to(device)
        optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), lr=1e-4, weight_decay=1e-4)
        script = Script(folder, self.device.type)
        self._names: dict[str, Any] = {
            "torch": torch, "model": self.model, "model_ddp": self.model, "num_classes": case.classes,
            "args": SimpleNamespace(
                noise_type="gaussian", noise_std=config.eta, drop_label=config.label_drop, nvp=True, dry_run=False
            ),
            "dist": SimpleNamespace(barrier=lambda: None), "metrics": utils.Metrics(), "optimizer": optimizer,
            "lr_schedule": utils.CosineLRSchedule(optimizer, STEPS, 2 * STEPS, 1e-6, 1e-4),
            "scaler": torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda"),
            "enable_amp": config.precision == "bfloat16",
        }  # fmt: skip
        script.define("compute_loss", self._names)
        if compiled:  # as its train.py does
            self._names["compute_loss"] = torch.compile(self._names["compute_loss"], mode="max-autotune")
        self._loop = script.loop("data_loader")

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """A step for each batch of images and labels."""
        exec(self._loop, {**self._names, "data_loader": batches})

    def losses(self, image: Tensor, label: Tensor) -> tuple[float, float]:
        """(Theirs, ours) from the same random weights, without noise and with one label dropped."""
        theirs = shaken(self.model)
        z, _, logdets = theirs(image, label)
        weights, _ = published.convert(theirs.state_dict(), published.sizes_of(theirs.state_dict()))
        assert isinstance(self.case.config, TeacherConfig)
        ours = build(sizes_of(self.case.config, self.case.image_shape, self.case.classes)).to(self.device)
        ours.load_state_dict(weights)
        return float(theirs.get_loss(z, logdets)), float(nll_per_dim(*ours.encode(image, label)).mean())


def shaken(model: nn.Module) -> Any:
    """A copy with small random weights everywhere: where an output starts at zero a loss would tell nothing."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.02 * noise.to(parameter.device) * parameter.requires_grad
    return model
