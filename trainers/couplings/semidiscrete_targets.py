"""The images of one class as targets of transport: products with noise in blocks, and the best image of each noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

# Scores of a block of noises against a block of images. On a CPU they should fit into a core's cache until their argmax
# is taken.
_NOISES = {"cpu": 256, "cuda": 4096}
_IMAGES = {"cpu": 2048, "cuda": 16384}
_PAIR_BYTES = 64 << 20  # of float64 images and noises while close candidates are compared


class Targets:
    """Images y_j of one class, float32 [N, D], read by `read(start, stop)` in blocks.

    They stay in memory from `keep` to `release` if they need at most `keep_bytes`; otherwise they are read again for
    each batch of noise. `rows` int64 [N] are their source rows. Scores use images minus their mean: this shifts all
    scores of a noise equally, and float32 keeps more digits of the rest.
    """

    def __init__(
        self,
        rows: Tensor,
        read: Callable[[int, int], Tensor],
        device: str | torch.device = "cpu",
        keep_bytes: int = 1 << 30,
    ) -> None:
        if not len(rows):
            raise ValueError("a class without images has no potential; leave it out")
        self.rows = rows
        self.device = torch.device(device)
        self._read = read
        self._images = _IMAGES.get(self.device.type, 2048)
        self._noises = _NOISES.get(self.device.type, 256)
        self._keep_bytes = keep_bytes
        self._kept: list[Tensor] | None = None
        self.dimension = read(0, 1)[0].numel()

        mean = torch.zeros(self.dimension, dtype=torch.float64, device=self.device)
        squares = []
        for _, block in self._raw():
            exact = block.double()
            mean += exact.sum(0)
            squares.append(exact.square().sum(1))
        self._mean = mean / len(rows)
        self.half_squares = torch.cat(squares) / 2  # |y_j|^2 / 2, float64 [N]
        self.keep()
        radii = [block.double().square().sum(1).sqrt() for _, block in self._blocks()]
        self.radii = torch.cat(radii)  # |y_j - mean y|, float64 [N]
        self.radius = float(self.radii.square().mean().sqrt())

    @classmethod
    def of(cls, images: Tensor, rows: Tensor | None = None, device: str = "cpu") -> Targets:
        """Targets from images in memory, float32 [N, ...]."""
        rows = torch.arange(len(images)) if rows is None else rows
        return cls(rows, lambda start, stop: images[start:stop], device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """The memory of the images while they are kept."""
        return 4 * len(self) * self.dimension if self._kept is not None else 0

    def keep(self) -> None:
        """Reads the images into memory if they fit."""
        if self._kept is None and 4 * len(self) * self.dimension <= self._keep_bytes:
            self._kept = [block for _, block in self._blocks()]

    def release(self) -> None:
        """Frees the images' memory. They are read again when they are needed."""
        self._kept = None

    def offsets(self, potential: Tensor) -> Tensor:
        """g_j - |y_j|^2 / 2 of a potential float64 [N], minus their largest, so that float32 keeps their
        differences.
        """
        offsets = potential.to(self.device) - self.half_squares
        return offsets - offsets.max()

    def counts(self, z: Tensor, offsets: Tensor) -> Tensor:
        """The number of noises of z [n, D] that each image gets, int64 [N]; in float32."""
        return torch.bincount(self.best(z, offsets), minlength=len(self))

    def best(self, z: Tensor, offsets: Tensor) -> Tensor:
        """argmax_j <z, y_j> + offsets_j for noises z [n, D]: int64 [n], by float32 products."""
        best = torch.empty(len(z), dtype=torch.int64, device=self.device)
        top = torch.full((len(z),), -torch.inf, device=self.device)
        for start, images in self._blocks():
            added = offsets[start : start + len(images)].float()
            for at in range(0, len(z), self._noises):
                part = slice(at, at + self._noises)
                value, index = _largest(torch.mm(z[part], images.t()).add_(added))
                better = value > top[part]
                top[part] = torch.where(better, value, top[part])
                best[part] = torch.where(better, index + start, best[part])
        return best

    def decide(self, z: Tensor, offsets: Tensor) -> Tensor:
        """As `best`, but independent of the rest of the batch: near ties in float32 are decided in float64, noise by
        noise.

        The rounding error of a float32 score is at most (D + 3) 2^-24 (|z| |y_j| + |offset_j|) (Higham 2002, section
        3.1, the sum in any order). So the winner is among the images within twice that of the largest score.
        """
        slack = 2.0**-24 * (self.dimension + 3)
        reach = z.double().norm(dim=1) * float(self.radii.max()) + float(offsets.abs().max())
        margin = (2 * slack * reach).float() * 1.001
        top = torch.full((len(z),), -torch.inf, device=self.device)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for start, images in self._blocks():
            added = offsets[start : start + len(images)].float()
            for at in range(0, len(z), self._noises):
                part = slice(at, at + self._noises)
                scores = torch.mm(z[part], images.t()).add_(added)
                top[part] = torch.maximum(top[part], scores.amax(1))
                who, image = torch.nonzero(scores >= (top[part] - margin[part])[:, None], as_tuple=True)
                found.append((who + at, image + start, scores[who, image]))
        who, image, score = (torch.cat(parts) for parts in zip(*found, strict=True))
        close = score >= (top - margin)[who]
        who, image = who[close], image[close]
        candidates = torch.bincount(who, minlength=len(z))
        best = torch.empty(len(z), dtype=torch.int64, device=self.device)
        alone = candidates[who] == 1
        best[who[alone]] = image[alone]
        return self._settle(z, offsets, who[~alone], image[~alone], best)

    def _settle(self, z: Tensor, offsets: Tensor, who: Tensor, image: Tensor, best: Tensor) -> Tensor:
        """Sets `best` of the noises `who` to their `image` with the largest float64 score; the first one if several are
        equal.

        A noise occurs once for each of its candidates.
        """
        top = torch.full((len(z),), -torch.inf, dtype=torch.float64, device=self.device)
        order = torch.argsort(image, stable=True)
        who, image = who[order], image[order]
        many = max(1, _PAIR_BYTES // (16 * self.dimension))
        for start, images in self._blocks():
            first, last = torch.searchsorted(
                image, torch.tensor([start, start + len(images)], device=self.device)
            ).tolist()
            for at in range(first, last, many):
                part = slice(at, min(at + many, last))
                y = images[image[part] - start].double()
                score = (z[who[part]].double() * y).sum(1) + offsets[image[part]]
                # If this part has several candidates of a noise, the largest score wins, then the lowest image.
                highest = torch.full_like(top, -torch.inf).scatter_reduce_(0, who[part], score, "amax")
                wins = (score == highest[who[part]]) & (score > top[who[part]])
                lowest = torch.full_like(best, len(self)).scatter_reduce_(0, who[part][wins], image[part][wins], "amin")
                best = torch.where(lowest < len(self), lowest, best)
                top = torch.maximum(top, highest)
        return best

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first image, float32 [n, D] of images minus their mean), in order."""
        if self._kept is not None:
            for number, block in enumerate(self._kept):
                yield number * self._images, block
            return
        for start, block in self._raw():
            yield start, (block - self._mean).float()

    def _raw(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self), self._images):
            block = self._read(start, min(start + self._images, len(self)))
            yield start, block.to(self.device).flatten(1)


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(value, index) of the largest in each row. numpy's argmax is vectorised, torch's is not."""
    if scores.device.type != "cpu":
        value, index = scores.max(1)
        return value, index
    index = torch.from_numpy(np.argmax(scores.numpy(), 1))
    return scores.gather(1, index[:, None])[:, 0], index
