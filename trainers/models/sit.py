"""SiT: a diffusion transformer that predicts a velocity.

Peebles & Xie 2022 (DiT, arXiv 2212.09748), Ma et al. 2024 (SiT, arXiv 2401.08740).
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfm.trainers.models.head import exact
from nfm.trainers.models.sizes import check_patch, check_width

FREQUENCIES = 128
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class Block(nn.Module):
    """A transformer block. The condition shifts, scales and gates its two branches (adaLN-zero)."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Tokens h [B, T, width], condition [B, 1, width] -> [B, T, width]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        parts = self.qkv(_modulate(self.attention_norm(h), shift_a, scale_a)).chunk(3, dim=-1)
        # [B, heads, T, head_size] each, views
        query, key, value = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        h = torch.addcmul(h, gate_a, self.project(attended))
        hidden = F.gelu(self.expand(_modulate(self.mlp_norm(h), shift_m, scale_m)))
        return torch.addcmul(h, gate_m, self.contract(hidden))


class SiT(nn.Module):
    """The student: the velocity of x_t at time t (0 = data, 1 = noise), with or without a label."""

    positions: Tensor

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        patch: int,
        width: int,
        depth: int,
        head_size: int = 64,
    ) -> None:
        """`classes` = 0 makes an unconditional student, which ignores labels."""
        super().__init__()
        channels, height, image_width = image_shape
        check_patch(image_shape, patch)
        check_width(width, head_size)
        self.patch = patch
        self.grid = (height // patch, image_width // patch)
        features = channels * patch**2
        self.embed = nn.Linear(features, width)
        self.register_buffer("positions", _grid_positions(self.grid, width), persistent=False)
        self.time_in = nn.Linear(2 * FREQUENCIES, width)
        self.time_out = nn.Linear(width, width)
        self.labels = nn.Embedding(classes + 1, width)  # the last row is the null label
        self.blocks = nn.ModuleList(Block(width, head_size) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.head = zeroed(nn.Linear(width, features))
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Velocity [B, C, H, W] of x [B, C, H, W] at t [B] in [0, 1]; y int64 [B], -1 or None = no label."""
        condition = self._condition(t, y)
        h = self.embed(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        h = _modulate(self.norm(h), shift, scale)
        return F.pixel_shuffle(exact(self.head, h).transpose(1, 2).unflatten(2, self.grid), self.patch)

    def _condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """The condition of every block: SiLU(time + label), [B, 1, width]."""
        time = self.time_out(F.silu(self.time_in(sinusoids(t.to(self.positions.dtype)))))
        null = self.labels.num_embeddings - 1
        if y is None or null == 0:
            y = torch.full_like(t, -1, dtype=torch.long)
        label = y.where(y >= 0, null)
        return F.silu(time + self.labels(label))[:, None]

    def _initialise(self) -> None:
        """Initialises as DiT does: Xavier everywhere, small embeddings. Modulations and head are already zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and (module.weight.is_meta or module.weight.any()):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.labels.weight, self.time_in.weight, self.time_out.weight):
            nn.init.normal_(weight, std=0.02)


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, h, 1 + scale)


def zeroed(layer: Layer) -> Layer:
    """A layer that starts at zero, so that its branch adds nothing at first."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def sinusoids(t: Tensor) -> Tensor:
    """cos and sin of 1000 t at geometric frequencies 1 ... 1e-4: [B] -> [B, 2 FREQUENCIES]."""
    frequencies = torch.exp(-math.log(10_000) / FREQUENCIES * torch.arange(FREQUENCIES, device=t.device))
    angles = 1000 * t[:, None] * frequencies.to(t.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _grid_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, half of the width for each axis: [T, width]."""
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
