"""TarFlow: an autoregressive normalizing flow over patches (Zhai et al. 2024, arXiv 2412.06329).

Encoding maps an image to noise in one parallel pass. Decoding inverts it token by token. Tokens are non-overlapping p x
p patches in raster order with D = C p^2 features each, channel-major.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfm.trainers.models.head import exact
from nfm.trainers.models.sizes import check_channels, check_patch

Cache = tuple[Tensor, Tensor]  # keys and values of one layer, [B, heads, T, head_size]


class Layer(nn.Module):
    """A pre-LayerNorm transformer layer with causal attention (the diagonal included)."""

    def __init__(self, channels: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.contract = nn.Linear(4 * channels, channels)

    def forward(self, h: Tensor, cache: Cache | None = None, position: int = 0) -> Tensor:
        """h [B, T, C] -> [B, T, C]. With a cache, h [B, 1, C] is only token `position`.

        If no gradient is recorded, the result uses the memory of h.
        """
        parts = self.qkv(self.attention_norm(h)).chunk(3, dim=-1)
        # [B, heads, T, head_size] each, views
        query, key, value = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in parts)
        if cache is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            keys, values = cache
            keys[:, :, position] = key[:, :, 0]
            values[:, :, position] = value[:, :, 0]
            seen = slice(0, position + 1)
            attended = F.scaled_dot_product_attention(query, keys[:, :, seen], values[:, :, seen])
        h = _added(h, self.project(attended.transpose(1, 2).flatten(2)))
        return _added(h, self.contract(_gelu(self.expand(self.mlp_norm(h)))))


# New large tensors cost CPUs a page fault for every 4 kB. In place, encoding is a fifth to a half faster, with the same
# bits.
def _added(h: Tensor, update: Tensor) -> Tensor:
    return h + update if torch.is_grad_enabled() else h.add_(update)


def _gelu(h: Tensor) -> Tensor:
    return F.gelu(h) if torch.is_grad_enabled() else torch.ops.aten.gelu_(h)


class MetaBlock(nn.Module):
    """One autoregressive affine map over tokens [B, T, D], in raster order or, if `reverse`, in the opposite order."""

    def __init__(
        self,
        tokens: int,
        features: int,
        classes: int,
        channels: int,
        layers: int,
        head_size: int,
        reverse: bool,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.cache_shape = (channels // head_size, tokens, head_size)
        self.embed = nn.Linear(features, channels)
        self.positions = nn.Parameter(1e-2 * torch.randn(tokens, channels))  # in raster order
        self.classes = nn.Parameter(1e-2 * torch.randn(classes, channels)) if classes else None
        self.layers = nn.ModuleList(Layer(channels, head_size) for _ in range(layers))
        self.head = nn.Linear(channels, 2 * features)
        nn.init.zeros_(self.head.weight)  # the bias keeps its default start, as in the authors' code

    def forward(self, u: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """z = (u - m) exp(-a) [B, T, D] and the log-determinant, mean(-a) over T and D, [B]."""
        u = self._order(u)
        a, m = self.scale_and_shift(u, y)
        return self._order((u - m) * torch.exp(-a)), -a.mean(dim=(1, 2))

    def scale_and_shift(self, u: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale a and shift m of every token from the tokens before it; all are [B, T, D] in block order."""
        h = self.embed(u) + self._order(self.positions, dim=0) + self._class_embedding(y)
        for layer in self.layers:
            h = layer(h)
        # The outputs are shifted, not the inputs: token t gets the output of position t-1, token 0 gets zeros.
        a, m = F.pad(exact(self.head, h)[:, :-1], (0, 0, 1, 0)).chunk(2, dim=-1)
        return a, m

    def inverse(self, z: Tensor, y: Tensor | None, guidance: float = 0.0) -> Tensor:
        """u from z [B, T, D], token by token in T - 1 steps, with preallocated key and value caches.

        Guidance moves (a, m) away from the prediction without a label, with a weight that grows over tokens as (i + 1)
        / (T - 1).
        """
        z = self._order(z)
        count, tokens, _ = z.shape
        positions, context = self._order(self.positions, dim=0), self._class_embedding(y)
        guided = guidance != 0 and self.classes is not None
        if guided:  # the second half of the batch has no label
            context = torch.cat([part.expand(count, 1, -1) for part in (context, self._class_embedding(None))])
        caches = [self._empty_cache(count * (1 + guided), z) for _ in self.layers]
        u = z.clone()
        for i in range(tokens - 1):
            token = u[:, i : i + 1].repeat(1 + guided, 1, 1)
            h = self.embed(token) + positions[i] + context
            for layer, cache in zip(self.layers, caches):
                h = layer.forward(h, cache, i)  # not compiled: it would be compiled again for every position
            parameters = exact(self.head, h)
            if guided:
                conditional, dropped = parameters.chunk(2)
                parameters = conditional + guidance * (i + 1) / (tokens - 1) * (conditional - dropped)
            a, m = parameters.chunk(2, dim=-1)
            u[:, i + 1 : i + 2] = z[:, i + 1 : i + 2] * torch.exp(a) + m
        return self._order(u)

    def _order(self, u: Tensor, dim: int = 1) -> Tensor:
        """Tokens from raster to block order, and back."""
        return u.flip(dim) if self.reverse else u

    def _empty_cache(self, count: int, like: Tensor) -> Cache:
        device = like.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
        keys, values = like.new_empty((2, count, *self.cache_shape), dtype=dtype)
        return keys, values

    def _class_embedding(self, y: Tensor | None) -> Tensor:
        if self.classes is None:
            return self.positions.new_zeros(1, 1, 1)
        mean = self.classes.mean(0, keepdim=True)
        if y is None:
            return mean[None]
        # A dropped label (-1) is the mean of all classes, with its gradient. It is in the last row.
        return F.embedding(y.where(y >= 0, len(self.classes)), torch.cat([self.classes, mean]))[:, None]


class TarFlow(nn.Module):
    """The teacher: meta-blocks that alternate between raster order and its reverse."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        patch: int,
        channels: int,
        blocks: int,
        layers: int,
        head_size: int = 64,
    ) -> None:
        """`classes` = 0 makes an unconditional flow, which ignores labels."""
        super().__init__()
        image_channels, height, width = image_shape
        check_patch(image_shape, patch)
        check_channels(channels, head_size)
        self.patch = patch
        self.grid = (height // patch, width // patch)
        tokens, features = math.prod(self.grid), image_channels * patch**2
        self.blocks = nn.ModuleList(
            MetaBlock(tokens, features, classes, channels, layers, head_size, reverse=index % 2 == 1)
            for index in range(blocks)
        )

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles the layers for encoding, with the arguments of `torch.compile`. All layers share one compilation.

        This happens at the first batch, for its shape. Compiling whole blocks took three times as long and was not
        faster on CPUs.
        """
        for block in cast("Iterable[MetaBlock]", self.blocks):
            for layer in block.layers:
                layer.compile(*args, **options)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same as `encode`."""
        return self.encode(x, y)

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image to noise: x [B, C, H, W] in [-1, 1], y int64 [B], -1 (or None for all) = no label.

        Returns z [B, C, H, W] and the log-determinant [B] in nats per dimension, both float32 (float64 for a float64
        model).
        """
        u = self._patches(x.to(self._dtype))
        logdet = u.new_zeros(len(u))
        for block in self.blocks:
            u, block_logdet = block(u, y)
            logdet = logdet + block_logdet
        return self._image(u), logdet

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor | None = None, guidance: float = 0.0) -> Tensor:
        """Noise to image, the inverse of `encode`: z [B, C, H, W], y int64 [B] -> x [B, C, H, W]."""
        u = self._patches(z.to(self._dtype))
        for block in cast("Iterable[MetaBlock]", reversed(self.blocks)):
            u = block.inverse(u, y, guidance)
        return self._image(u)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, D]; feature c p^2 + i p + j is channel c at (i, j) of its patch."""
        return F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)

    def _image(self, u: Tensor) -> Tensor:
        return F.pixel_shuffle(u.transpose(1, 2).unflatten(2, self.grid), self.patch)


def nll_per_dim(z: Tensor, logdet: Tensor) -> Tensor:
    """The training loss, [B] nats per dimension without the constant log(2 pi)/2: mean(z^2)/2 - logdet."""
    return z.square().flatten(1).mean(1) / 2 - logdet


def bits_per_dim(nll: Tensor) -> Tensor:
    """Bits per dimension of 8-bit images scaled to [-1, 1] (a step is 1/127.5), from `nll_per_dim`."""
    return (nll + math.log(2 * math.pi) / 2) / math.log(2) + math.log2(127.5)


def denoise(model: TarFlow, x: Tensor, y: Tensor | None, eta: float) -> Tensor:
    """One score step that removes the training noise: x + eta^2 grad_x log p(x | y), in [-1, 1] units."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        nll = nll_per_dim(*model.encode(x, y)).sum() * x[0].numel()
        (gradient,) = torch.autograd.grad(nll, x)
    return x.detach() - eta**2 * gradient
