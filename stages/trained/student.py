"""The student: a network that learns the velocity between the images and noises of a pair store.

It reads only pair stores. Whether a teacher made the pairs is just an entry in a store's manifest. The reader may
soften the pairs, mix stores, or permute noises as a control; this makes the variant of the student.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from nfm.stages.base import Inputs, Reporter, Result, StageError, added, one_of
from nfm.stages.couplings.variant import Variant, check_knobs
from nfm.stages.trained import costs
from nfm.stages.trained.architectures import ARCHITECTURES, FIRST, build, sizes_of
from nfm.stages.trained.costs import Cost, Counted
from nfm.stages.trained.timing import Clock, Trial, cost_of_training
from nfm.stages.trained.training import (
    METRICS,
    WEIGHTS,
    Task,
    TrainingSection,
    blaming,
    check_section,
    fit,
    kept_files,
    parameter_count,
    read_weights,
    recipe,
)
from nfm.storage import Mixture, PairStore
from nfm.storage.files.small_files import read_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nfm.storage.reading.reader import BatchReader
    from nfm.trainers.loop import Loss
    from nfm.trainers.training.randomness import Randomness

NAME = "student"
VERSION = 1


class StudentConfig(TrainingSection):
    """The `[student]` table. `pairs` is the total number of pairs seen.

    With arch "sit", `width` is that of the tokens and `depth` the number of blocks. With "unet", `width` is the number
    of channels at full resolution (default 32) and `depth` the residual blocks at each level (default 1); `patch` and
    `head_size` are not used.

    Three fields change what the reader yields. `soften` mixes new noise in. `mixture` gives other couplings their share
    of the pairs, read from `pairs:<coupling>`. `permuted` gives each image the noise of the next pair in its batch: a
    control that keeps the noises but not the coupling.
    """

    pairs: int = Field(240_000, ge=1)
    patch: int = Field(4, ge=1)
    width: int = Field(128, ge=1)
    depth: int = Field(6, ge=1)
    head_size: int = Field(64, ge=1)
    label_drop: float = Field(0.1, ge=0, le=1)
    arch: Annotated[str, one_of(ARCHITECTURES)] = added(FIRST)
    soften: float = added(0.0)
    permuted: bool = added(False)
    mixture: dict[str, float] = added({})

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_arch(cls, values: Any) -> Any:
        """Sets fields that the config leaves out to the defaults of the architecture."""
        known = ARCHITECTURES.get(str(values.get("arch"))) if isinstance(values, dict) else None
        return {**known.defaults, **values} if known else values

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        check_knobs(self.soften, self.mixture)
        if self.permuted and self.batch_size < 2:
            raise ValueError(f"permuted needs a batch_size of at least 2, not {self.batch_size}: noises change places")
        return self


def fits(config: StudentConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit if sizes do not fit each other or the data, as far as `facts` describe it."""

    def sizes() -> None:
        ARCHITECTURES[config.arch].check(config, facts.get("image_shape"))

    # The reader of a mixture knows how many pairs an epoch has.
    known = {key: value for key, value in facts.items() if key != "images"} if config.mixture else facts
    check_section(NAME, config, known, sizes)


def task(config: StudentConfig, inputs: Inputs, device: str) -> Task:
    """What each process of the training makes."""
    import torch

    store = PairStore.open(inputs["pairs"])
    architecture = sizes_of(config, store.spec.image_shape, store.spec.classes or 0)
    torch.manual_seed(config.seed)
    with blaming("config section [student]"):
        model = build(architecture)
        source = _mixed(store, config, inputs)
        batches = source.batches(config.batch_size, config.seed, epochs=None, device=device, soften=config.soften)

    read = _Permuted(batches) if config.permuted else batches
    return Task(model, _loss(config), read, architecture, config.pairs, "pairs")


class _Permuted:
    """The batches of a reader, each image with the noise of the pair before it in the batch of all processes."""

    def __init__(self, batches: BatchReader) -> None:
        self._batches = batches
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict

    def __iter__(self) -> Iterator[Any]:
        from nfm.trainers.training import parallel

        for batch in self._batches:
            yield replace(batch, noise=parallel.rolled(batch.noise, batch.place))


def run(config: StudentConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Train on the pairs of one generation of each store; the averaged weights are the student."""
    store = PairStore.open(inputs["pairs"])
    with blaming("config section [student]"):
        variant = _variant(store.spec.coupling, config)
    fit(task, config, inputs, out, report)
    final, image_dtype = _last_line(out / METRICS), store.spec.field("image").dtype
    metrics = {
        "loss": final["loss"],
        "pairs_seen": recipe(config, config.pairs).examples,
        "parameters": parameter_count(load(out)),
        "pairs_per_second": final["pairs_per_second"],
        "data_wait_share": final["data_wait_share"],
        "coupling": store.spec.coupling,
        "variant": str(variant),
        "generation": store.generation,
        "draws": store.draws,
        **({} if image_dtype == "uint8" else {"image_dtype": image_dtype}),
    }
    return Result(payload=[WEIGHTS], metrics=metrics, files=kept_files(out))


def cost(config: StudentConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """What training costs."""
    parameters = _counted(config, facts["image_shape"]).parameters
    return cost_of_training(NAME, config, config.pairs, "pairs", facts, parameters, trials(config, facts), clock)


def trials(config: StudentConfig, facts: Mapping[str, Any]) -> list[Trial]:
    """The student and, where its architecture has a depth, shallower ones, to be timed."""
    shape, classes = facts["image_shape"], facts.get("classes", 0)

    def trial(of: StudentConfig) -> Trial:
        return Trial(flops(of, shape), lambda: (build(sizes_of(of, shape, classes)), _loss(of)))

    shallower = (-(-config.depth // 4), 1) if "depth" in ARCHITECTURES[config.arch].fields else ()
    return [trial(config.model_copy(update={"depth": depth})) for depth in dict.fromkeys((config.depth, *shallower))]


def flops(config: StudentConfig, image_shape: Sequence[int]) -> float:
    """FLOPs of one evaluation of the velocity of one image."""
    return _counted(config, image_shape).flops


def _counted(config: StudentConfig, image_shape: Sequence[int]) -> Counted:
    with blaming("config section [student]"):
        return _counted_once(json.dumps(sizes_of(config, image_shape, classes=0)))


@functools.cache
def _counted_once(architecture: str) -> Counted:
    sizes = json.loads(architecture)
    return costs.counted(lambda: build(sizes), sizes["image_shape"])


def _loss(config: StudentConfig) -> Loss:
    from nfm.trainers import flow_matching

    def loss(model: Any, batch: Any, random: Randomness) -> tuple[torch.Tensor, dict[str, float]]:
        return flow_matching.loss(model, batch.image, batch.noise, batch.label, random, config.label_drop), {}

    return loss


def load(folder: Path, device: str = "cpu") -> nn.Module:
    """The trained student of any architecture, in evaluation mode."""
    state, architecture = read_weights(folder)
    model = build(architecture)
    model.load_state_dict(state)
    loaded: nn.Module = model.eval().to(device)
    return loaded


def _mixed(store: PairStore, config: StudentConfig, inputs: Inputs) -> PairStore | Mixture:
    """The store, or its mixture with the stores `pairs:<coupling>`, which have their shares of the pairs."""
    if not config.mixture:
        return store
    members = [(store, 1 - sum(config.mixture.values()))]
    for coupling, share in sorted(config.mixture.items()):
        other = PairStore.open(inputs[f"pairs:{coupling}"])
        if other.spec.coupling != coupling:
            raise StageError(
                f"{other.root}: a store of coupling {other.spec.coupling}, and student.mixture wants {coupling} there; "
                f"give the role pairs:{coupling} a store of that coupling"
            )
        if other.order_key != store.order_key:
            raise StageError(
                f"{other.root}: its order key {other.order_key[:12]} is not that of {store.root}, "
                f"{store.order_key[:12]}: a mixture of them would not have every image once an epoch; make both of the "
                "same data with the same pairs.draws and rows, without excluded shards"
            )
        members.append((other, share))
    return Mixture(members)


def _variant(coupling: str, config: StudentConfig) -> Variant:
    return Variant(coupling, config.soften, config.permuted, config.mixture)


def _last_line(path: Path) -> dict[str, float]:
    return json.loads(read_bytes(path).decode().splitlines()[-1])
