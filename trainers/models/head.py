"""The last layer of a network, in full precision."""

from torch import Tensor, autocast, nn
from torch.nn import functional as F

from nfm.trainers.training.products import in_tf32


def exact(head: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """The output of the head in its own precision, for any autocast type of the caller, and without TF32.

    The result is added up (velocities by solvers) or exponentiated (log-scales), which needs full precision.
    """
    h = h.to(head.weight.dtype)
    if h.is_meta:  # only shapes, where autocast does not apply
        return head(h)
    with autocast(h.device.type, enabled=False):
        return _in_double(head, h) if in_tf32() else head(h)


def _in_double(head: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """TF32 is a setting of the process, which compiled code cannot change, and does not touch float64."""
    weight, bias = head.weight.double(), None if head.bias is None else head.bias.double()
    if isinstance(head, nn.Linear):
        return F.linear(h.double(), weight, bias).to(h.dtype)
    return F.conv2d(h.double(), weight, bias, head.stride, head.padding, head.dilation, head.groups).to(h.dtype)
