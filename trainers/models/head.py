"""The last layer of a network, in full precision."""

import torch
from torch import Tensor, autocast, nn

from nfm.trainers.training.products import in_tf32, products


def exact(head: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """The output of the head in its own precision, for any autocast type of the caller, and without TF32.

    The result is added up (velocities by solvers) or exponentiated (log-scales), which needs full precision.
    """
    h = h.to(head.weight.dtype)
    if h.is_meta:  # only shapes, where autocast does not apply
        return head(h)
    with autocast(h.device.type, enabled=False):
        return _without_tf32(head, h) if in_tf32() else head(h)


@torch.compiler.disable
def _without_tf32(head: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    with products(tf32=False):
        return head(h)
