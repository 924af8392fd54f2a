"""A teacher from elsewhere: a published TarFlow checkpoint, measured on this run's data as our own teacher is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from nfm.stages.base import Inputs, LocalField, Reporter, Result, Section, Unfit, operational
from nfm.stages.trained import teacher
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import Precision
from nfm.stages.trained.devices.where import DeviceField
from nfm.stages.trained.teacher import FACTS, TeacherConfig
from nfm.stages.trained.training.section import blaming
from nfm.stages.trained.weights import WEIGHTS
from nfm.storage import ImageDataset
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.small_files import plain
from nfm.trainers.models.sizes import check_channels

NAME, VERSION = teacher.NAME, teacher.VERSION
STOPS_AT_ONCE = True
_CLASSES_SHOWN = 3


def starts_anew(config: Any) -> bool:
    """A stopped import leaves nothing."""
    return True


class ImportConfig(Section):
    """What is imported: the file, by its digest, and how sigma_f is measured, as `[teacher]` says."""

    file: LocalField = operational(...)
    sha256: str
    eta: float = Field(gt=0)
    head_size: int = Field(ge=1)
    seed: int
    sigma_rows: int
    measure_rows: int
    precision: Precision
    device: DeviceField = operational("auto")


def section(config: TeacherConfig, file: Path, eta: float | None, head_size: int | None) -> ImportConfig:
    """The import of a file, with `eta` as given or as the authors write it into names.

    Raises Unfit for a file that is no checkpoint, and where nothing tells eta.
    """
    from nfm.trainers.models import published

    with _of_file(file):
        state = published.read(file)
        sizes = published.sizes_of(state)
        eta = eta or published.eta_of(file.name, sizes)
        head_size = head_size or published.HEAD_SIZE
        check_channels(sizes.channels, head_size)
    if eta is None:
        raise Unfit(
            f"{file}: its name does not tell the noise that it was trained with, as ..._model_2_768_8_8_0.05.pth does: "
            "give --eta"
        )
    measured = {name: getattr(config, name) for name in ("seed", "sigma_rows", "measure_rows", "precision", "device")}
    return ImportConfig(file=str(file), sha256=atomic.hash_file(file)[0], eta=eta, head_size=head_size, **measured)


@contextmanager
def _of_file(file: Path) -> Iterator[None]:
    """What is wrong with a file, told as wrong use of it."""
    try:
        if file.is_dir():
            raise Unfit(f"{file}: a folder; name the checkpoint in it, a file such as ..._model_2_768_8_8_0.05.pth")
        plain(file).close()
    except FileNotFoundError:
        raise Unfit(f"{file}: no such file; name a checkpoint of a TarFlow") from None
    except OSError as error:
        raise Unfit(f"{file}: cannot be read ({error.strerror}); name a file that can") from None
    except StorageError as error:
        raise Unfit(str(error)) from None
    with blaming(str(file)):
        yield


def fits(config: ImportConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit where the flow is not one of such images and classes, as far as `facts` tell of the data."""
    from nfm.trainers.models import published

    with _of_file(Path(config.file)):
        sizes = published.sizes_of(published.read(Path(config.file)))
        if "image_shape" in facts:
            published.architecture(sizes, facts["image_shape"], config.head_size)
        if sizes.classes not in (0, facts.get("classes", sizes.classes)):
            raise ValueError(
                f"a flow of {sizes.classes} classes; the data has {facts['classes']}: name the config of the data that "
                "it was trained on"
            )


def run(config: ImportConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Convert the weights, measure sigma_f, and look whether the labels tell the flow what they should."""
    from nfm.trainers.checkpoint import pack_weights
    from nfm.trainers.models import published
    from nfm.trainers.models.tarflow import TarFlow

    file = Path(config.file)
    train, heldout = (ImageDataset.open(inputs["data"], split) for split in ("train", "heldout"))
    fits(config, {"image_shape": train.image_shape, "classes": len(train.classes)})
    with _of_file(file):
        state = published.read(file)
        sizes = published.sizes_of(state)
        weights, prior = published.convert(state, sizes)
    architecture = published.architecture(sizes, train.image_shape, config.head_size)
    architecture |= {"prior": True} if prior else {}
    sha256, size = atomic.hash_file(file)
    if sha256 != config.sha256:
        raise Unfit(f"{file}: changed while it was read; import it again when nobody writes to it")
    model = TarFlow(**architecture)
    model.load_state_dict(weights)
    model.eval().to(pick_device(config.device))
    atomic.write_bytes(out / WEIGHTS, pack_weights(model, architecture))
    metrics = teacher.write_facts(model, architecture, config, train, heldout, out, report)
    if sizes.classes:
        metrics["unlabelled_bpd"] = _check_order(model, train, config, report)
    origin = {"file": file.name, "sha256": sha256, "bytes": size}
    return Result(payload=[WEIGHTS, FACTS], metrics=metrics, extra={"imported": origin})


def _check_order(model: Any, train: ImageDataset, config: ImportConfig, report: Reporter) -> float:
    """Says whose the classes must be; labels of another order tell a trained flow less than none do."""
    rows = range(min(config.measure_rows, len(train)))
    given, dropped = (teacher.likelihood(model, train, rows, config, labels=labels)[1] for labels in (True, False))
    first = ", ".join(f"{number} = {name}" for number, name in enumerate(train.classes[:_CLASSES_SHOWN]))
    more = f", ... to {len(train.classes) - 1} = {train.classes[-1]}" if len(train.classes) > _CLASSES_SHOWN else ""
    report.say(f"the file's classes must be in the data's order: {first}{more}")
    if given > dropped:
        report.say(
            f"labels do not help it: {given:.4f} bits per dimension with labels, {dropped:.4f} without; its classes "
            "may be of another order, or it was hardly trained"
        )
    return round(dropped, 4)
