"""What a training needs of a device's memory, and which settings make it fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nfm.stages.display import units
from nfm.stages.trained.devices.precision import precision_context
from nfm.stages.trained.training.section import TrainingSection

if TYPE_CHECKING:
    import torch

    from nfm.stages.trained.costs import Trial

STATE = 5 * 4  # bytes a parameter: weights, gradients, two moments and the moving average, float32


@dataclass(frozen=True)
class Memory:
    """Bytes that a training takes.

    `state` is what there is of every parameter; `record` what one record keeps for the backward pass; `recomputed` the
    same with `recompute`, which keeps the input of each layer, and all of one layer at a time.
    """

    state: float
    record: float
    recomputed: float

    def of_worker(self, batch_size: int, workers: int, sharding: str, microbatch: int | None, recompute: bool) -> float:
        """Bytes on the device of one worker."""
        records = min(microbatch or batch_size, -(-batch_size // workers))
        state = self.state / (workers if sharding == "fsdp" else 1)
        return state + records * (self.recomputed if recompute else self.record)

    def advice(self, config: TrainingSection, device_bytes: float) -> str:
        """Whether it fits a device, and if not which setting is the first to make it fit."""
        asked = (config.sharding, config.microbatch, config.recompute)
        if self.of_worker(config.batch_size, config.workers, *asked) <= device_bytes:
            return f"fits {units.size(device_bytes)}"
        share = config.batch_size // config.workers
        smaller = [None, *(size for size in (2**power for power in range(15, -1, -1)) if size < share)]
        shardings = [config.sharding] if config.workers == 1 else ["ddp", "fsdp"]
        for sharding in shardings:
            for microbatch, recompute in ((size, again) for again in (False, True) for size in smaller):
                if self.of_worker(config.batch_size, config.workers, sharding, microbatch, recompute) <= device_bytes:
                    settings = [
                        f'sharding = "{sharding}"' if sharding != config.sharding else "",
                        f"microbatch = {microbatch}" if microbatch else "",
                        "recompute = true" if recompute and not config.recompute else "",
                    ]
                    told = ", ".join(setting for setting in settings if setting)
                    return f"does not fit {units.size(device_bytes)}; it would with {told}"
        more = "" if config.sharding == "fsdp" else ' with sharding = "fsdp"'
        return f"does not fit {units.size(device_bytes)} with any setting; take more workers{more}"


def measured(trials: Sequence[Trial], parameters: int, config: TrainingSection, batch: Any) -> Memory:
    """What the first of `trials` takes, from what one record keeps in the last, the shallowest of the same width.

    That one is run once, on the CPU; FLOPs make up the difference in depth.
    """
    kept, inputs, inner = _kept(trials[-1], config, batch)
    deeper = trials[0].flops / trials[-1].flops
    state = STATE + 4 * len(config.averages())
    return Memory(state * parameters, deeper * kept, deeper * inputs + kept / max(inner, 1))


def _kept(trial: Trial, config: TrainingSection, batch: Any) -> tuple[float, float, int]:
    """Of one record: bytes kept for the backward pass, bytes of the layers' inputs, and how many layers there are."""
    import torch

    from nfm.trainers.training import parallel
    from nfm.trainers.training.randomness import Randomness

    model, loss = trial.make()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    inputs: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layers = parallel.innermost_layers(model)
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].nbytes))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    precision = "float32" if config.precision == "tf32" else config.precision  # of as many bytes
    with hooks, precision_context("cpu", precision):
        value, _ = loss(model, batch, Randomness(0, len(batch)))
    del value
    return sum(kept.values()) / len(batch), sum(inputs) / len(batch), len(layers)


def device_bytes(device: str, facts: Mapping[str, Any]) -> float | None:
    """The memory of the device that is there, or the one that the plan was asked for; None of a CPU."""
    import torch

    if (asked := facts.get("device_memory")) is not None:
        return float(asked)
    return float(torch.cuda.get_device_properties(device).total_memory) if device.startswith("cuda") else None
