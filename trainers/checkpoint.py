"""Training states and weights as safetensors bytes: named tensors with one JSON text, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class CheckpointError(ValueError):
    """Bytes that are no checkpoint, or the checkpoint of something else; the message says what to do."""


def pack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """Safetensors bytes of tensors (any device and strides) and a JSON-able `meta`; equal in, equal out."""
    stored = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(stored, metadata={"meta": json.dumps(meta, sort_keys=True)})


def unpack(data: bytes) -> tuple[Tensors, dict[str, Any]]:
    """The (tensors on the CPU, meta) that `pack` was given; CheckpointError if the bytes are damaged."""
    try:
        tensors = safetensors.torch.load(data)
        # safetensors checked the header above; it has no call that reads the metadata of bytes in memory.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header["__metadata__"]["meta"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{len(data)} bytes are not a readable checkpoint ({error!r}); remove the file to train from the start"
        ) from error
    return tensors, meta


def pack_weights(model: nn.Module | Mapping[str, Tensor], architecture: Mapping[str, Any]) -> bytes:
    """A model's weights alone, with the JSON-able keyword arguments that build the model again."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return pack(state, {"architecture": dict(architecture)})


def unpack_weights(data: bytes) -> tuple[Tensors, dict[str, Any]]:
    """The (state dict, architecture) that `pack_weights` was given; JSON made tuples of it into lists."""
    state, meta = unpack(data)
    if "architecture" not in meta:
        raise CheckpointError("no architecture beside the weights: this is a training state, not weights alone")
    return state, meta["architecture"]


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under `prefix.name`, so that several states share one file."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `with_prefix`: only the tensors under `prefix`, by their own names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state of every parameter as `parameter.key`, such as `head.weight.exp_avg`.

    Hyperparameters are left out: they are the recipe's, and the learning rate follows from the examples seen.
    """
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
