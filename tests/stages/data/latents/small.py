"""A few images as the data stage writes them, and a VAE of one's own that loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nfm.stages.base import Result
from nfm.stages.data.latents import stage
from nfm.stages.data.latents.config import LatentsConfig
from nfm.storage.dataset.writer import DatasetWriter
from nfm.storage.files import atomic
from tests.support.recorder import Recorder
from tests.support.torchvision_stub import make_importable

# Folds pixels into channels: decode is exactly the inverse of encode. `std` makes a posterior of it.
FOLDED = """
import pathlib
import torch

pathlib.Path(__file__).with_name("ran.txt").touch()  # a worker stands elsewhere

class Folded(torch.nn.Module):
    scale, shift = 2.0, 0.125

    def __init__(self, std):
        super().__init__()
        self.std = torch.nn.Parameter(torch.tensor(std))

    def encode(self, x):
        mean = torch.nn.functional.pixel_unshuffle(x, 2)
        return (mean, self.std.expand_as(mean)) if self.std else mean

    def decode(self, latents):
        return torch.nn.functional.pixel_shuffle(latents, 2)

def vae(image_shape, std=0.0):
    return Folded(std)
"""
SLOW = FOLDED.replace("import torch\n", "import time\nimport torch\n").replace(
    "    def encode(self, x):\n", "    def encode(self, x):\n        time.sleep(0.05)\n"
)
ROWS, HELDOUT = 11, 4


def save_vae(folder: Path, channels: int) -> Any:
    """An AutoencoderKL of diffusers, in a folder: of 4 latent channels, it halves the sides, with a shift."""
    make_importable()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, "layers_per_block": 1}
    ends = {"in_channels": channels, "out_channels": channels, "sample_size": 8, "shift_factor": 0.25}
    model = AutoencoderKL(**ends, **blocks, **small).eval()
    model.save_pretrained(folder)
    return model


def pixels(rows: int, seed: int, shape: tuple[int, int, int] = (3, 4, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *shape), dtype=np.uint8)


def write_data(
    root: Path, shape: tuple[int, int, int] = (3, 4, 6), captions: bool = True, dtype: str = "uint8"
) -> Path:
    """A data set of two classes whose keys and captions name their rows."""
    writer = DatasetWriter(root, "small", shape, ["even", "odd"], 4, dtype)
    for split, rows, seed in (("train", ROWS, 0), ("heldout", HELDOUT, 1)):
        names = [f"{split}/{row}" for row in range(rows)]
        images = pixels(rows, seed, shape).astype(dtype)
        told = [f"a picture of {row}" for row in range(rows)] if captions else None
        writer.write_split(split, rows, [(images, np.arange(rows) % 2, names)], told)
    writer.close()
    atomic.write_json(root / "manifest.json", {"content_digest": "0" * 64, "dataset": {"name": "small"}})
    return root


def make(out: Path, data: Path, report: Recorder | None = None, **config: Any) -> Result:
    """The latents stage in this process, with the VAE of the module above unless another is named."""
    out.mkdir(exist_ok=True)
    section = LatentsConfig.model_validate(
        {"vae": "mine_vae:vae", "rows_per_shard": 5, "batch_size": 3, "executor": "serial", **config}
    )
    return stage.run(section, {"data": data}, out, report or Recorder())
