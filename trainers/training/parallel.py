"""One training on several processes: how a model is shared out, and what the processes tell each other.

Processes meet in `torch.distributed`, by `join`. For a process that is alone, everything else here does nothing.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

Sharding = Literal["ddp", "fsdp"]
MEETING = timedelta(minutes=10)


def join(device: str | torch.device, rank: int, size: int, address: str, patience: timedelta = MEETING) -> None:
    """Meets the other processes at `address` (env://, tcp://host:port), by NCCL for CUDA devices and gloo for others.

    Raises TimeoutError where they do not meet within ten minutes. Later one may let the others wait for `patience`.
    """
    if dist.is_initialized():
        return
    try:
        store, _, _ = next(dist.rendezvous(address, rank, size, timeout=MEETING))
    except (dist.DistError, RuntimeError) as error:
        raise TimeoutError(f"process {rank} of {size} did not meet the others at {address}: {error}") from error
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)


def rank() -> int:
    """Which of the processes this is; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def layers_of(model: nn.Module) -> list[nn.Module]:
    """What a model repeats: the members of its ModuleLists, inner ones first."""
    members = [
        (name.count("."), child)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child in module
    ]
    return [child for _, child in sorted(members, key=lambda found: -found[0])]


def innermost_layers(model: nn.Module) -> list[nn.Module]:
    """The members of ModuleLists that have none themselves."""
    return [
        layer for layer in layers_of(model) if not any(isinstance(module, nn.ModuleList) for module in layer.modules())
    ]


def recompute(model: nn.Module) -> None:
    """Keeps no activations inside the innermost layers: the backward pass computes them again, a third more work."""
    for layer in innermost_layers(model):
        forward = layer.forward
        layer.forward = lambda *args, f=forward, **options: checkpoint(f, *args, use_reentrant=False, **options)


def shard(model: nn.Module, device: torch.device) -> None:
    """Shares out parameters, gradients and optimizer state (FSDP2): each layer is whole only while it computes."""
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)


class Objective(nn.Module):
    """The loss of a model as a module's forward pass, which is what DDP and FSDP hook into."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, *arguments: Any) -> Any:
        return self._loss(self.model, *arguments)


def shared(objective: Objective, sharding: Sharding, device: torch.device) -> nn.Module:
    """The objective, whose backward pass leaves in every process the gradients of the whole batch."""
    if not dist.is_initialized():
        return objective
    if sharding == "fsdp":
        shard(objective, device)
        return objective
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, forward_sync_buffers=False)


def release() -> None:
    """Frees the DDP that its owner let go, while its group still stands: a late import of PyTorch may keep its frame.

    A DDP that outlives its group is what ends the group, with the interpreter's lock in hand. Gloo's thread may wait
    for that lock just then, and both wait for ever (pytorch/pytorch#56297).
    """
    if dist.is_initialized():
        gc.collect()


def part_of_step(objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around the passes of one microbatch: only after the `last` of a step are gradients exchanged."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)
    elif isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    return contextlib.nullcontext()


def local(tensor: Tensor) -> Tensor:
    """The part of a shared-out tensor that this process holds, in the same memory; of others the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A shared-out tensor put together, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Puts whole `values`, the same in every process, into a tensor that may be shared out."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def mean(figures: Tensor) -> Tensor:
    """The mean over all processes, on the host."""
    if dist.is_initialized():
        dist.all_reduce(figures)
        figures /= dist.get_world_size()
    return figures.cpu()


class _Sum(torch.autograd.Function):
    """The sum over all processes, of values and, on the way back, of their gradients."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over all processes, as a part of the graph that gradients go back through."""
    total: Tensor = _Sum.apply(values)
    return total / size()


def rolled(values: Tensor, places: Any) -> Tensor:
    """Each record's value [n, ...] replaced by that of the record before it in the batch of all processes.

    `places` [n] says where in that batch our records stand.
    """
    if not dist.is_initialized():
        return values.roll(1, 0)
    own = torch.as_tensor(places, device=values.device)
    parts = [torch.empty_like(values) for _ in range(size())]
    wheres = [torch.empty_like(own) for _ in range(size())]
    dist.all_gather(parts, values.contiguous())
    dist.all_gather(wheres, own)
    order = torch.cat(wheres)
    whole = torch.empty_like(torch.cat(parts))
    whole[order] = torch.cat(parts)
    return whole.roll(1, 0)[own]


class Agreement:
    """Whether any process wishes to stop: all hear the same answer at the same step, a step later, without a wait."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._wish = torch.zeros(1, dtype=torch.int32)
        self._asked: dist.Work | None = None

    def reached(self, wish: bool) -> bool:
        """Called once a step by every process."""
        if self._group is None:
            return wish
        agreed = False
        if self._asked is not None:
            self._asked.wait()
            agreed = bool(self._wish.item())
        self._wish = torch.tensor([int(wish)], dtype=torch.int32)
        self._asked = dist.all_reduce(self._wish, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed

    def end(self) -> None:
        """After the last step: nothing is left under way."""
        if self._asked is not None:
            self._asked.wait()
            self._asked = None
