"""The last layer of a network, in full precision."""

from torch import Tensor, autocast, nn


def exact(head: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """The head's output in its own precision, whatever the caller's autocast type.

    What is made of it is added up (velocities by solvers) or exponentiated (log-scales).
    """
    h = h.to(head.weight.dtype)
    if h.is_meta:  # shapes alone, to which no autocast applies
        return head(h)
    with autocast(h.device.type, enabled=False):
        return head(h)
