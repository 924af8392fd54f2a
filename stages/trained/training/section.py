"""The config of every trained stage: its fields, whether they fit, and the recipe that they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from nfm.stages.base import Section, Unfit, named_once, operational
from nfm.stages.display.watching.lines import Watching
from nfm.stages.trained.devices import launched
from nfm.stages.trained.devices.precision import Precision
from nfm.stages.trained.devices.where import AddressField, DeviceField
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.reading.reader import check_enough, check_shared

if TYPE_CHECKING:
    from nfm.trainers.training.state import Recipe

Sharding = Literal["ddp", "fsdp"]


class TrainingSection(Section):
    """Fields of every section that trains a model; lengths are in examples.

    `precision` is of the matrix products; "tf32" is float32 whose products round to 10 bits, on CUDA devices. bfloat16
    gains on GPUs and on CPUs with matrix units; on two AVX-512 cores without them, training in bfloat16 was half as
    fast as in float32, hence the default.

    `workers` processes of a Ray cluster share each batch; `sharding` "ddp" keeps the whole model in each, "fsdp" shares
    it out. `microbatch` is the most records that a process computes at a time, `recompute` keeps no activations inside
    layers, `compile` is torch's. None of these changes the result but for rounding.

    `watch` names who is told of the training beside `metrics.jsonl`, see stages/display/watching/.
    """

    seed: int = Field(0, ge=0)
    batch_size: int = Field(128, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    ema: float = Field(0.999, ge=0, lt=1)
    precision: Precision = "float32"
    device: DeviceField = operational("auto")
    save_every: int = operational(20_000, ge=1)
    log_every: int = operational(5_000, ge=1)
    keep_checkpoints: int = operational(1, ge=1)
    workers: int = operational(1, ge=1)
    sharding: Sharding = operational("ddp")
    microbatch: int | None = operational(None, ge=1)
    recompute: bool = operational(False)
    compile: bool = operational(False)
    ray_address: AddressField | None = operational(None)
    watch: tuple[Watching, ...] = operational(())

    @field_validator("watch")
    @classmethod
    def _is_told_once(cls, watch: tuple[Watching, ...]) -> tuple[Watching, ...]:
        named_once(watch)
        return watch

    @property
    def processes(self) -> int:
        """How many train: those of a launcher, else the workers."""
        return launched.size() if launched.size() > 1 else self.workers

    def averages(self) -> tuple[float, ...]:
        """The relative widths of the moving averages that are kept beside that of `ema`."""
        return ()


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Sizes that do not fit each other, told as an error of what holds them: a config section, an option."""
    try:
        yield
    except WrongArgument as error:  # what else may be passed in Python is no remedy here
        raise Unfit(f"{what}: {error.name} {error.said}") from error
    except ValueError as error:
        raise Unfit(f"{what}: {error}") from error


def check_section(name: str, config: TrainingSection, facts: Mapping[str, Any], sizes: Callable[[], None]) -> None:
    """A stage's `fits`: `sizes` raises ValueError where they do not fit; `facts` are of the data, as far as known."""
    with blaming(f"config section [{name}]"):
        sizes()
        check_shared(config.batch_size, config.processes)
        if "images" in facts:
            check_enough(config.batch_size, facts["images"])


def check_heldout(name: str, facts: Mapping[str, Any]) -> None:
    """Raises Unfit where no image is held out, for a stage that is measured on such images. `facts` as above."""
    if facts.get("heldout") == 0:
        raise Unfit(
            f"{name}: is measured on held-out images, and the data have none: set data.heldout above 0, or give a test "
            "set of which not every image is set aside"
        )


def whole_batches(config: TrainingSection, examples: int) -> int:
    """So many examples, rounded up to whole batches."""
    return -(-examples // config.batch_size) * config.batch_size


def recipe(config: TrainingSection, examples: int) -> Recipe:
    """The section's fields as the loop's recipe, for `examples` in all, rounded up to whole batches."""
    from nfm.trainers.training.state import Recipe

    total = whole_batches(config, examples)
    return Recipe(
        examples=total,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_examples=int(config.warmup * total),
        weight_decay=config.weight_decay,
        clip=config.clip,
        ema=config.ema,
        seed=config.seed,
        emas=config.averages(),
    )
