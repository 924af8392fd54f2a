"""Trainings on several processes, for the tests: one set of processes does all runs, one after another."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nfm.trainers.loop import How, train
from nfm.trainers.models.cnn import FeatureNet, classification_loss
from nfm.trainers.models.sit import SiT
from nfm.trainers.models.tarflow import TarFlow, nll_per_dim
from nfm.trainers.training import parallel
from nfm.trainers.training.checkpoint_folder import CheckpointFolder
from nfm.trainers.training.randomness import Randomness
from nfm.trainers.training.state import Recipe
from tests.support.forkserver import context
from tests.support.sizes import sized

SHAPE, ROWS, BATCH = (1, 4, 4), 40, 8
shared = parallel.shared
STEPS = sized(20, 50)  # of a whole training, in tens


@dataclass(frozen=True)
class Run:
    """A training of some processes: from where `after` stopped, or from the start, to `steps`."""

    name: str
    processes: int = 1
    how: How = field(default_factory=How)
    model: str = "teacher"
    dtype: torch.dtype = torch.float32
    steps: int = STEPS
    whole: int = STEPS  # of the recipe
    after: str | None = None


@dataclass(frozen=True)
class Part:
    """Some records of a batch, in an order that depends on how many processes there are."""

    image: Tensor
    noise: Tensor
    label: Tensor
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.image)


class Parts:
    """What a process reads: its part of every batch, scattered over the whole."""

    def __init__(self, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(3)
        self.image = torch.rand((ROWS, *SHAPE), generator=random, dtype=torch.float64).to(dtype) * 2 - 1
        self.noise = torch.randn((ROWS, *SHAPE), generator=random, dtype=torch.float64).to(dtype)
        self.label = torch.arange(ROWS) % 3
        self.consumed = 0

    def __iter__(self) -> Parts:
        return self

    def __next__(self) -> Part:
        rows = (self.consumed + np.arange(BATCH)) * 7 % ROWS
        mine = np.sort(np.random.default_rng(self.consumed).permutation(BATCH)[parallel.rank() :: parallel.size()])
        self.consumed += BATCH
        chosen = torch.from_numpy(rows[mine])
        return Part(self.image[chosen], self.noise[chosen], self.label[chosen], mine)

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]


def likelihood(model: TarFlow, batch: Part, random: Randomness) -> tuple[Tensor, dict[str, Tensor]]:
    image = batch.image + 0.1 * random.normal(*SHAPE).to(batch.image)
    label = torch.where(random.uniform() < 0.3, -1, batch.label)
    z, logdet = model.encode(image, label)
    return nll_per_dim(z, logdet).mean(), {"power": z.square().mean()}


def velocity(model: nn.Module, batch: Part, random: Randomness) -> tuple[Tensor, dict[str, Tensor]]:
    t = random.uniform().to(batch.image)
    at = t.view(-1, 1, 1, 1)
    error = model((1 - at) * batch.image + at * batch.noise, t, batch.label) - (batch.noise - batch.image)
    return error.square().mean(), {}


def classification(model: FeatureNet, batch: Part, random: Randomness) -> tuple[Tensor, dict[str, Any]]:
    wide = replace(batch, image=batch.image.repeat(1, 1, 2, 2) * batch.noise.repeat_interleave(2, 2).repeat(1, 1, 1, 2))
    return classification_loss(model, wide, random)


def train_one(run: Run, folder: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module
    if run.model == "teacher":
        model, loss = TarFlow(SHAPE, classes=3, patch=2, channels=8, blocks=2, layers=2, head_size=4), likelihood
    elif run.model == "features":
        model, loss = FeatureNet((1, 8, 8), classes=3, width=4, feature_size=8), classification
    else:
        model, loss = SiT(SHAPE, 3, patch=2, width=8, depth=2, head_size=4), velocity
    for name, parameter in model.named_parameters():  # some begin with zeros, which would hide the others
        generator = torch.Generator().manual_seed(len(name))
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    recipe = Recipe(
        examples=run.whole * BATCH, batch_size=BATCH, learning_rate=1e-2, warmup_examples=80, ema=0.9, emas=(0.1,)
    )
    steps = iter(range(run.whole + 1))
    lines: list[dict[str, float]] = []
    with CheckpointFolder(folder / (run.after or run.name)) as checkpoints:
        done = train(
            model.to(run.dtype), loss, Parts(run.dtype), recipe, how=run.how, checkpoints=checkpoints,
            log=lines.append, log_every=10 * BATCH, stop=lambda: next(steps) >= run.steps,
        )  # fmt: skip
    assert not any(isinstance(kept, DistributedDataParallel) for kept in gc.get_objects()), "outlives its group"
    weights = {
        f"{which}.{name}": parallel.whole(value).clone()
        for which, network in (("model", done.model), ("ema", done.ema), ("power", done.emas[0.1]))
        for name, value in network.state_dict().items()
    }
    if parallel.rank() == 0:
        torch.save({"weights": weights, "seen": done.examples_seen, "lines": lines}, folder / f"{run.name}.pt")


def shared_in_a_cycle(*arguments: Any) -> nn.Module:
    """As a process's first DDP may be: the traceback of a late import keeps its frames."""
    objective = shared(*arguments)
    objective.cycle = [objective]  # type: ignore[assignment]
    return objective


def _process(rank: int, runs: Sequence[Run], folder: Path) -> None:
    gc.freeze()  # what the forkserver had: to look through it for garbage costs a second each time
    torch.set_num_threads(1)
    parallel.shared = shared_in_a_cycle
    for run in runs:
        if rank < run.processes:
            if run.processes > 1 or run.how.sharding == "fsdp":
                address = f"file://{folder / run.name}.join"
                parallel.join("cpu", rank, run.processes, address, timedelta(minutes=5))
            train_one(run, folder)
            if dist.is_initialized():
                dist.destroy_process_group()


def done(runs: Sequence[Run], folder: Path) -> dict[str, dict[str, Any]]:
    """What each run ended with: `weights` by name, `seen`, `lines`."""
    processes = max(run.processes for run in runs)
    torch.multiprocessing.start_processes(
        _process, (list(runs), folder), nprocs=processes, start_method=context.get_start_method()
    )
    return {run.name: torch.load(folder / f"{run.name}.pt") for run in runs}
