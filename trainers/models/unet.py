"""A small convolutional U-Net that predicts a velocity, for small images and small budgets.

Ho et al. 2020 (DDPM, arXiv 2006.11239): residual blocks on the way down and up, joined by skips. Dhariwal & Nichol 2021
(arXiv 2105.05233): the condition scales and shifts the second norm of each block; attention at the smallest resolution.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfm.trainers.models.head import exact
from nfm.trainers.models.sit import FREQUENCIES, sinusoids, zeroed
from nfm.trainers.models.sizes import UNET_GROUP, check_unet_width

_HEAD = 64  # channels of an attention head, if there are that many
_SMALLEST = 4  # sides up to this are not halved


class ResidualBlock(nn.Module):
    """Two convolutions and a norm that the condition scales and shifts. It starts as the identity or a projection."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(inputs // UNET_GROUP, inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = zeroed(nn.Linear(condition, 2 * outputs))
        self.norm_out = nn.GroupNorm(outputs // UNET_GROUP, outputs, affine=False)
        self.conv_out = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """h [B, inputs, H, W], condition [B, condition] -> [B, outputs, H, W]."""
        shift, scale = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        inner = self.norm_out(self.conv_in(F.silu(self.norm_in(h))))
        return self.shortcut(h) + self.conv_out(F.silu(torch.addcmul(shift, inner, 1 + scale)))


class Attention(nn.Module):
    """Self-attention over all positions, added to the identity. It starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // _HEAD))
        self.norm = nn.GroupNorm(channels // UNET_GROUP, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zeroed(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same."""
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        parts = self.qkv(tokens).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return h + self.project(attended).transpose(1, 2).unflatten(2, h.shape[2:])


class UNet(nn.Module):
    """The student: the velocity of x_t at time t (0 = data, 1 = noise), with or without a label."""

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        width: int = 32,
        depth: int = 1,
        multipliers: Sequence[int] = (1, 2, 2),
    ) -> None:
        """`width` channels at full resolution, times `multipliers` level by level; `depth` blocks at each level, down
        and up.

        A level halves sides above 4, rounded up (28, 14, 7; 14, 7, 4), so small images have fewer levels. `classes` = 0
        makes an unconditional student, which ignores labels.
        """
        super().__init__()
        check_unet_width(width)
        channels, height, image_width = image_shape
        self.widths = [width * multiple for multiple in multipliers[: _levels(max(height, image_width))]]
        lowest, condition = self.widths[-1], 4 * width
        self.time_in = nn.Linear(2 * FREQUENCIES, condition)
        self.time_out = nn.Linear(condition, condition)
        self.labels = nn.Embedding(classes + 1, condition)  # the last row is the null label
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            nn.ModuleList(ResidualBlock(here, here, condition) for _ in range(depth)) for here in self.widths
        )
        self.shrink = nn.ModuleList(
            nn.Conv2d(here, below, 3, stride=2, padding=1) for here, below in pairwise(self.widths)
        )
        self.middle = nn.ModuleList(ResidualBlock(lowest, lowest, condition) for _ in range(2))
        self.up = nn.ModuleList(
            nn.ModuleList(ResidualBlock(2 * here, here, condition) for _ in range(depth)) for here in self.widths
        )
        self.enlarge = nn.ModuleList(nn.Conv2d(below, here, 3, padding=1) for here, below in pairwise(self.widths))
        self.attention = nn.ModuleList(Attention(lowest) for _ in range(2 * depth + 1))  # down, middle, up
        self.norm = nn.GroupNorm(width // UNET_GROUP, width)
        self.head = zeroed(nn.Conv2d(width, channels, 3, padding=1))
        for embedding in (self.labels, self.time_in, self.time_out):
            nn.init.normal_(embedding.weight, std=0.02)
        # A tenth faster on CPUs, and best for tensor cores.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Velocity [B, C, H, W] of x [B, C, H, W] at t [B] in [0, 1]; y int64 [B], -1 or None = no label."""
        condition = self._condition(t, y)
        attention = iter(self.attention)
        lowest = len(self.widths) - 1
        h, skips = self.stem(x.contiguous(memory_format=torch.channels_last)), []
        for level, blocks in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](h)
            for block in blocks.children():
                h = block(h, condition)
                h = next(attention)(h) if level == lowest else h
                skips.append(h)
        h = self.middle[1](next(attention)(self.middle[0](h, condition)), condition)
        for level, blocks in reversed(list(enumerate(self.up))):
            for block in blocks.children():
                h = block(torch.cat([h, skips.pop()], dim=1), condition)
                h = next(attention)(h) if level == lowest else h
            if level:  # to the size of the next skip, which is odd if the image's was
                h = self.enlarge[level - 1](F.interpolate(h, skips[-1].shape[2:], mode="nearest"))
        return exact(self.head, F.silu(self.norm(h)))

    def _condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """The condition of every block: SiLU(time + label), [B, 4 width]."""
        time = self.time_out(F.silu(self.time_in(sinusoids(t.to(self.time_in.weight.dtype)))))
        null = self.labels.num_embeddings - 1
        if y is None or null == 0:
            y = torch.full_like(t, -1, dtype=torch.long)
        return F.silu(time + self.labels(y.where(y >= 0, null)))


def _levels(side: int) -> int:
    """One plus the number of times that a side is halved until it is small."""
    return 1 if side <= _SMALLEST else 1 + _levels(-(-side // 2))
