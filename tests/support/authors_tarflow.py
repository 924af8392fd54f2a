"""TarFlow with the names and the arithmetic of its authors' code (arXiv 2412.06329), as small as tests need it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, channels: int, head_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.head_size = head_size

    def forward(self, x: Tensor, mask: Tensor, temperature: float) -> Tensor:
        count, tokens, channels = x.shape
        heads = channels // self.head_size
        q, k, v = self.qkv(self.norm(x)).reshape(count, tokens, 3 * heads, -1).transpose(1, 2).chunk(3, dim=1)
        scores = q @ k.transpose(-1, -2) * self.head_size**-0.5 / temperature
        weights = scores.masked_fill(mask == 0, float("-inf")).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, tokens, channels))


class MLP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.norm(x))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, head_size: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(channels, head_size), MLP(channels)

    def forward(self, x: Tensor, mask: Tensor, temperature: float) -> Tensor:
        x = x + self.attention(x, mask, temperature)
        return x + self.mlp(x)


class MetaBlock(nn.Module):
    attn_mask: Tensor

    def __init__(
        self, features: int, channels: int, tokens: int, flipped: bool, layers: int, head_size: int, nvp: bool,
        classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.flipped, self.nvp = flipped, nvp
        self.proj_in = nn.Linear(features, channels)
        self.pos_embed = nn.Parameter(torch.randn(tokens, channels) * 1e-2)
        self.class_embed = nn.Parameter(torch.randn(classes, 1, channels) * 1e-2) if classes else None
        self.attn_blocks = nn.ModuleList(AttentionBlock(channels, head_size) for _ in range(layers))
        self.proj_out = nn.Linear(channels, features * 2 if nvp else features)
        nn.init.zeros_(self.proj_out.weight)
        self.register_buffer("attn_mask", torch.tril(torch.ones(tokens, tokens)))

    def parameters_of(self, x: Tensor, y: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-scales and shifts of tokens in the block's order, whose outputs are shifted by one."""
        h = self.proj_in(x) + self.ordered(self.pos_embed, 0)
        if self.class_embed is not None:
            mean = self.class_embed.mean(dim=0)
            h = h + (mean if y is None else torch.where((y < 0).view(-1, 1, 1), mean, self.class_embed[y]))
        for block in self.attn_blocks:
            h = block(h, self.attn_mask, temperature)
        h = self.proj_out(h)
        h = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
        return h.chunk(2, dim=-1) if self.nvp else (torch.zeros_like(h), h)

    def ordered(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.flip(dim) if self.flipped else x

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.ordered(x)
        a, b = self.parameters_of(x, y)
        return self.ordered((x - b) * (-a).exp()), -a.mean(dim=[1, 2])

    def reverse(
        self, z: Tensor, y: Tensor | None, guidance: float, what: str, temperature: float, annealed: bool
    ) -> Tensor:
        x = self.ordered(z).clone()
        for i in range(x.shape[1] - 1):
            a, b = (part[:, i + 1] for part in self.parameters_of(x, y))
            if guidance > 0:
                a_free, b_free = (part[:, i + 1] for part in self.parameters_of(x, None, temperature))
                g = (i + 1) / (x.shape[1] - 1) * guidance if annealed else guidance
                a = a + g * (a - a_free) if "a" in what else a
                b = b + g * (b - b_free) if "b" in what else b
            x[:, i + 1] = x[:, i + 1] * a.exp() + b
        return self.ordered(x)


class Model(nn.Module):
    """As the authors make it; their head size is always 64."""

    var: Tensor

    def __init__(
        self, image_channels: int, side: int, patch: int, channels: int, blocks: int, layers: int, classes: int = 0,
        nvp: bool = True, head_size: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.side, self.patch = side, patch
        tokens, features = (side // patch) ** 2, image_channels * patch**2
        self.blocks = nn.ModuleList(
            MetaBlock(features, channels, tokens, bool(number % 2), layers, head_size, nvp, classes)
            for number in range(blocks)
        )
        self.register_buffer("var", torch.ones(tokens, features))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise as patches [B, T, D], of variance `var`, and the log-determinant [B]."""
        u = nn.functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        logdet = torch.zeros((), dtype=x.dtype)
        for block in self.blocks:
            u, more = block(u, y)
            logdet = logdet + more
        return u, logdet

    def image(self, u: Tensor) -> Tensor:
        return nn.functional.fold(u.transpose(1, 2), (self.side, self.side), self.patch, stride=self.patch)

    @torch.no_grad()
    def reverse(
        self, z: Tensor, y: Tensor | None = None, guidance: float = 0.0, what: str = "ab", temperature: float = 1.0,
        annealed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Patches of standard normal noise [B, T, D] to images."""
        u = z * self.var.sqrt()
        for block in reversed(self.blocks):
            u = block.reverse(u, y, guidance, what, temperature, annealed)
        return self.image(u)


def random(model: Model, seed: int = 0) -> Model:
    """The model with every weight moved, so that none is mistaken for another; without nvp `var` too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # small heads keep it as tame as a trained one
            parameter += (0.01 if "proj_out" in name else 0.1) * torch.randn(parameter.shape, generator=generator)
        if not model.blocks[0].nvp:
            model.var.copy_(0.5 + torch.rand(model.var.shape, generator=generator))
    return model
