"""SiT's training step: the loop over batches of its train.py, its model, transport, optimizer and moving average."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train.cases import Case
from benchmarks.train.checkouts import Script, module, stand_ins
from benchmarks.train.tarflow import shaken
from nfm.stages.trained.architectures import build, sizes_of
from nfm.stages.trained.devices.precision import precision_context
from nfm.stages.trained.student import StudentConfig

NEVER = 10**12
SCALE = 0.18215  # of its latents
# Theirs -> ours; within a block, and the rest. Its frozen positions are a buffer of ours.
_BLOCK = {"attn.qkv": "qkv", "attn.proj": "project", "mlp.fc1": "expand", "mlp.fc2": "contract",
          "adaLN_modulation.1": "modulation"}  # fmt: skip
_REST = {"x_embedder.proj": "embed", "t_embedder.mlp.0": "time_in", "t_embedder.mlp.2": "time_out",
         "y_embedder.embedding_table": "labels", "final_layer.linear": "head",
         "final_layer.adaLN_modulation.1": "modulation"}  # fmt: skip


class Sit:
    """Their training of a case: on latents at hand, without its checkpoints, samples and log lines.

    Its model predicts a variance besides, which nothing is done with in training; here it does not, so that both have
    the same weights. What it computes in bfloat16 is its model, by autocast; its train.py has float32 alone.
    """

    def __init__(self, folder: Path, case: Case, device: str, compiled: bool) -> None:
        config = case.config
        assert isinstance(config, StudentConfig)
        self.case, self.device = case, torch.device(device)
        with stand_ins("torchvision") as self.stand_ins:
            models = module(folder, "models")
            transport = module(folder, "transport")
        channels, side, _ = case.image_shape
        self.model: nn.Module = models.SiT(
            input_size=side, patch_size=config.patch, in_channels=channels, hidden_size=config.width,
            depth=config.depth, num_heads=config.width // config.head_size, class_dropout_prob=config.label_drop,
            num_classes=case.classes, learn_sigma=False,
        ).to(device)  # fmt: skip
        script = Script(folder, self.device.type)
        ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self._names: dict[str, Any] = {
            "torch": torch, "OrderedDict": OrderedDict, "device": device, "rank": 0, "vae": _Latents(), "ema": ema,
            "model": _Alone(self.model, case, torch.compile(self.model) if compiled else self.model),
            "opt": torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0),
            "transport": transport.create_transport(), "logger": logging.getLogger(__name__),
            "args": SimpleNamespace(log_every=NEVER, ckpt_every=NEVER, sample_every=NEVER, wandb=False),
            "train_steps": 0, "log_steps": 0, "running_loss": 0,
        }  # fmt: skip
        script.define("update_ema", self._names)
        self._loop = script.loop("loader")

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """A step for each batch of images and labels."""
        exec(self._loop, {**self._names, "loader": batches})

    def losses(self, image: Tensor, label: Tensor) -> tuple[float, float]:
        """(Theirs, ours) from the same random weights: the mean square of the velocity, with one label dropped.

        Theirs approximates GELU by tanh; the copy that is compared here does not.
        """
        theirs = shaken(self.model).eval()
        for block in theirs.blocks:
            block.mlp.act = nn.GELU()
        ours = build(sizes_of(self.case.config, self.case.image_shape, self.case.classes))
        ours.load_state_dict(weights(theirs.state_dict(), ours.patch))
        ours.positions = theirs.pos_embed[0].detach()  # its columns come first
        t = torch.linspace(0.1, 0.9, len(image), device=image.device)
        null = label.where(label >= 0, self.case.classes)
        return _square(theirs(image, 1000 * t, null)), _square(ours.to(self.device)(image, t, label))


def _square(velocity: Tensor) -> float:
    return float(velocity.square().mean())


def weights(state: Mapping[str, Tensor], patch: int) -> dict[str, Tensor]:
    """Their weights by our names. Theirs convolves patches, and lists the channels of a patch's pixel together."""
    found = {}
    for name, value in state.items():
        if name == "pos_embed":
            continue
        layer, kind = name.rsplit(".", 1)
        if layer.startswith("blocks."):
            _, number, part = layer.split(".", 2)
            found[f"blocks.{number}.{_BLOCK[part]}.{kind}"] = value
            continue
        if layer == "final_layer.linear":
            value = value.unflatten(0, (patch * patch, -1)).transpose(0, 1).flatten(0, 1)
        found[f"{_REST[layer]}.{kind}"] = value.flatten(1) if value.ndim == 4 else value
    return found


class _Alone(nn.Module):
    """A model as DDP holds it, without other processes."""

    def __init__(self, model: nn.Module, case: Case, forward: Any) -> None:
        super().__init__()
        self.module, self._case, self._forward = model, case, [forward]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        with precision_context(x.device.type, self._case.config.precision):
            return self._forward[0](x, t, y)


class _Latents:
    """An encoder whose latents are its images: in training they come from elsewhere too."""

    def encode(self, x: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: x / SCALE))
