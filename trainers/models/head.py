"""The last layer of a network, in full precision."""

from torch import Tensor, autocast, nn


def exact(head: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """The output of the head in its own precision, for any autocast type of the caller.

    The result is added up (velocities by solvers) or exponentiated (log-scales), which needs full precision.
    """
    h = h.to(head.weight.dtype)
    if h.is_meta:  # only shapes, where autocast does not apply
        return head(h)
    with autocast(h.device.type, enabled=False):
        return head(h)
