"""The student: a network that learns the velocity between the images and noises of a pair store.

It reads only pair stores. Whether a teacher made the pairs is just an entry in a store's manifest. The reader may
soften the pairs, mix stores, or permute noises as a control; this makes the variant of the student.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Inputs, Reporter, Result, StageError, Unfit
from nfm.stages.couplings.variant import Variant
from nfm.stages.display.watching.lines import METRICS, read_lines
from nfm.stages.trained import costs
from nfm.stages.trained.architectures import ARCHITECTURES, build, sizes_of
from nfm.stages.trained.costs import Cost, Counted, Trial
from nfm.stages.trained.devices.timing import Clock, cost_of_training
from nfm.stages.trained.foreign import own
from nfm.stages.trained.student.config import LOGIT_NORMAL, OBJECTIVE, StudentConfig
from nfm.stages.trained.training import Task, fit, over_all, parameter_count
from nfm.stages.trained.training.checkpoints import kept_files
from nfm.stages.trained.training.samples import Samples
from nfm.stages.trained.training.section import blaming, check_section, recipe, whole_batches
from nfm.stages.trained.weights import WEIGHTS, files_of, read, read_weights
from nfm.storage import Mixture, PairStore
from nfm.trainers.nfe import pick_solver

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nfm.storage.reading.reader import BatchReader
    from nfm.trainers.flow_matching import Times
    from nfm.trainers.loop import Loss
    from nfm.trainers.training.randomness import Randomness

NAME = "student"
VERSION = 1
SHOWN, SHOWN_NFE = 64, 7  # of the grids that are drawn while training: images, evaluations of the velocity


def fits(config: StudentConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit if sizes do not fit each other or the data, as far as `facts` describe it."""

    def sizes() -> None:
        own.look_for(config, NAME)
        if config.model is None:
            ARCHITECTURES[config.arch].check(config, facts.get("image_shape"))

    # The reader of a mixture knows how many pairs an epoch has.
    known = {key: value for key, value in facts.items() if key != "images"} if config.mixture else facts
    check_section(NAME, config, known, sizes)


def external(config: StudentConfig) -> dict[str, str]:
    """The digests of the functions that are one's own."""
    return own.digests(config, NAME)


def tries(config: StudentConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit where a function of one's own is not what it should be: its code runs here."""
    if "image_shape" in facts:
        shape, classes = facts["image_shape"], facts.get("classes", 1)
        own.check(config, NAME, shape, classes, lambda: build(sizes_of(config, shape, classes)))


def fits_init(config: StudentConfig, folder: Path) -> None:
    """Raises Unfit where a student that is to begin with the weights in `folder` is of other sizes, as far as known."""
    _, there = read_weights(folder)
    here = sizes_of(config, there["image_shape"], there["classes"])
    other = [name for name in {**here, **there} if name != "sha256" and here.get(name) != there.get(name)]
    if other:
        told = ", ".join(f"{name} {there.get(name)!r} there and {here.get(name)!r} here" for name in other)
        raise Unfit(f"student.init = {config.init}: it has {told}; name a student of the same network")


def task(config: StudentConfig, inputs: Inputs, device: str) -> Task:
    """What each process of the training makes."""
    import torch

    store = PairStore.open(inputs["pairs"])
    architecture = sizes_of(config, store.spec.image_shape, store.spec.classes or 0)
    torch.manual_seed(config.seed)
    with blaming("config section [student]"):
        model = build(architecture)
        _begin(model, config, inputs)
        source = _mixed(store, config, inputs)
        batches = source.batches(config.batch_size, config.seed, epochs=None, device=device, soften=config.soften)

    read = _Permuted(batches) if config.permuted else batches
    image_dtype = store.spec.field("image").dtype
    samples = None
    if config.sample_every:
        real = _real(store, config.sample_distance) if config.sample_distance else None
        samples = Samples(config.sample_every, SHOWN, _decode(config), image_dtype, real)
    return Task(
        model, _loss(config), read, architecture, config.pairs, "pairs", snapshots=config.snapshots, samples=samples
    )


def _decode(config: StudentConfig) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]:
    """How images are made of noise while training: by a sampler of its own, or unguided with SHOWN_NFE evaluations."""
    from nfm.trainers import solvers
    from nfm.trainers.flow_matching import velocity

    if config.sampler is not None:
        return own.load("student.sampler", config.sampler)

    def decode(model: Any, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return solvers.sample(velocity(model, labels), noise, SHOWN_NFE, pick_solver("auto", SHOWN_NFE), "square")

    return decode


def _real(store: PairStore, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of draw 0 and their labels, `count` of them or all that there are."""
    slots = store.slots(0)[:count]
    out = {"image": np.empty((len(slots), *store.spec.image_shape), np.float32)}
    labels = np.full(len(slots), -1)
    if store.spec.has("label"):
        out["label"] = labels
    return store.gather(0, slots, out)["image"], labels


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
    own.announce(own.named(config, NAME), report.say)
    tries(config, {"image_shape": store.spec.image_shape, "classes": store.spec.classes or 0})
    with blaming("config section [student]"):
        variant = _variant(store.spec.coupling, config)
    fit(task, config, inputs, out, report)
    lines, image_dtype = read_lines(out / METRICS), store.spec.field("image").dtype
    metrics = {
        "loss": lines[-1]["loss"],
        "pairs_seen": recipe(config, config.pairs).examples,
        "parameters": parameter_count(load(out)),
        **over_all(lines, "pairs"),
        "coupling": store.spec.coupling,
        "variant": str(variant),
        "generation": store.generation,
        "draws": store.draws,
        **({} if image_dtype == "uint8" else {"image_dtype": image_dtype}),
    }
    return Result(payload=[WEIGHTS, *files_of(out).values()], metrics=metrics, files=kept_files(out))


def _begin(model: nn.Module, config: StudentConfig, inputs: Inputs) -> None:
    """The weights that training begins with, where they are another student's."""
    if "init" not in inputs:
        return
    state, _ = read_weights(inputs["init"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        told = str(error).partition("\n")[2].strip() or str(error)
        raise Unfit(f"student.init = {config.init}: its weights are of another network: {told}") from error


def _times(config: StudentConfig) -> Times:
    from nfm.trainers import flow_matching

    if (found := LOGIT_NORMAL.fullmatch(config.times)) is not None:
        return functools.partial(flow_matching.logit_normal, mean=float(found[1]), deviation=float(found[2]))
    return flow_matching.uniform if config.times == "uniform" else own.load("student.times", config.times)


def cost(config: StudentConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """What training costs."""
    if config.model is not None:  # a plan runs nobody's code
        return Cost(whole_batches(config, config.pairs), "pairs", unknown=own.UNKNOWN_COST)
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
    """FLOPs of one evaluation of the velocity of one image; 0 of a network of one's own, whose code is not run here."""
    return _counted(config, image_shape).flops if config.model is None else 0.0


def _counted(config: StudentConfig, image_shape: Sequence[int]) -> Counted:
    with blaming("config section [student]"):
        return _counted_once(json.dumps(sizes_of(config, image_shape, classes=0)))


@functools.cache
def _counted_once(architecture: str) -> Counted:
    sizes = json.loads(architecture)
    return costs.counted(lambda: build(sizes), sizes["image_shape"])


def _loss(config: StudentConfig) -> Loss:
    from nfm.trainers import flow_matching

    times = _times(config)
    objective = None if config.objective == OBJECTIVE else own.load("student.objective", config.objective)

    def loss(model: Any, batch: Any, random: Randomness) -> tuple[torch.Tensor, dict[str, float]]:
        if objective is not None:
            return objective(model, batch, random), {}
        return flow_matching.loss(model, batch.image, batch.noise, batch.label, random, config.label_drop, times), {}

    return loss


def load(folder: Path, device: str = "cpu", ema: str | None = None) -> nn.Module:
    """The trained student of any architecture, in evaluation mode; of the moving average `ema`, see weights.py."""
    state, architecture = read(folder, ema)
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
