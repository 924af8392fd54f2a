"""Batch normalisation over the batch of all processes (torch's own SyncBatchNorm runs on GPUs only)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nfm.trainers.training import parallel


class BatchNorm2d(nn.BatchNorm2d):
    """torch's layer, [B, C, H, W]; in training on several processes its statistics are those of all of them."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or parallel.size() == 1:
            return super().forward(x)
        count = x.numel() // x.shape[1] * parallel.size()
        mean, power = parallel.mean_of_all(torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))]))
        variance = power - mean.square()
        buffers = dict(self.named_buffers())
        with torch.no_grad():
            buffers["num_batches_tracked"] += 1
            buffers["running_mean"].lerp_(mean, self.momentum or 0.0)
            buffers["running_var"].lerp_(variance * count / (count - 1), self.momentum or 0.0)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return x * scale.view(-1, 1, 1) + (self.bias - mean * scale).view(-1, 1, 1)
