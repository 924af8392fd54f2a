"""The student: a diffusion transformer that learns the velocity between the store's images and noises.

It reads a pair store and nothing else; that a teacher made the pairs is a line in the store's manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from nfm.stages import costs
from nfm.stages.stage import Inputs, Reporter, Result
from nfm.stages.training import (
    CHECKPOINT,
    METRICS,
    WEIGHTS,
    TrainingSection,
    blaming,
    fit,
    parameter_count,
    pick_device,
    read_weights,
    recipe,
)
from nfm.storage import PairStore, atomic

if TYPE_CHECKING:
    import torch

    from nfm.trainers.sit import SiT

NAME = "student"
VERSION = 1


class StudentConfig(TrainingSection):
    """The `[student]` table; `pairs` is the number of pairs seen in all."""

    pairs: int = Field(240_000, ge=1)
    patch: int = Field(4, ge=1)
    width: int = Field(128, ge=1)
    depth: int = Field(6, ge=1)
    head_size: int = Field(64, ge=1)
    label_drop: float = Field(0.1, ge=0, le=1)


def run(config: StudentConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Train on the pairs of one generation of a store; the averaged weights are the student."""
    import torch

    from nfm.trainers import flow_matching
    from nfm.trainers.checkpoint import pack_weights
    from nfm.trainers.sit import SiT

    store = PairStore.open(inputs["pairs"])
    architecture: dict[str, Any] = {
        "image_shape": list(store.spec.image_shape), "classes": store.spec.classes or 0, "patch": config.patch,
        "width": config.width, "depth": config.depth, "head_size": config.head_size,
    }  # fmt: skip
    torch.manual_seed(config.seed)
    with blaming("config section [student]"):
        model = SiT(**architecture)
        batches = store.batches(config.batch_size, seed=config.seed, epochs=None, device=pick_device(config.device))

    def loss(model: SiT, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return flow_matching.loss(model, batch.image, batch.noise, batch.label, generator, config.label_drop), {}

    plan = recipe(config, config.pairs)
    trained = fit(model, loss, batches, config, plan, out, report, "pairs")
    atomic.write_bytes(out / WEIGHTS, pack_weights(trained.ema, architecture))
    final, image_dtype = _last_line(out / METRICS), store.spec.field("image").dtype
    metrics = {
        "loss": final["loss"],
        "pairs_seen": plan.examples,
        "parameters": parameter_count(model),
        "pairs_per_second": final["pairs_per_second"],
        "data_wait_share": final["data_wait_share"],
        "coupling": store.spec.coupling,
        "generation": store.generation,
        "draws": store.draws,
        **({} if image_dtype == "uint8" else {"image_dtype": image_dtype}),
    }
    return Result(payload=[WEIGHTS], metrics=metrics, files=[CHECKPOINT, METRICS])


def cost(config: StudentConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    """What training costs: a backward pass is two forward ones."""
    flops = 3 * config.pairs * costs.student_flops(facts["image_shape"], config)
    return {"pairs": f"{config.pairs:,}", **costs.describe(flops)}


def load(folder: Path, device: str = "cpu") -> SiT:
    """The trained student in evaluation mode."""
    from nfm.trainers.sit import SiT

    state, architecture = read_weights(folder)
    model = SiT(**architecture)
    model.load_state_dict(state)
    return model.eval().to(device)


def _last_line(path: Path) -> dict[str, float]:
    import json

    return json.loads(path.read_text().splitlines()[-1])
