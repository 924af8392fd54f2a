"""What of a student is its user's own, each a function `module:function`: network, times, objective and sampler.

    model(image_shape, classes, **options) -> a network, called as network(x, t, label) -> velocity (architectures.py)
    times(random) -> float32 [B] in [0, 1], drawn from a `Randomness`
    objective(network, batch, random) -> a scalar, the mean over the batch of image, noise, label
    sampler(network, noise, label) -> images, in place of a solver

The digests of their files are part of the fingerprint. Their code runs where a run trains or samples, and is tried on
two made-up pairs before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import StageError, Unfit
from nfm.stages.couplings import custom
from nfm.stages.trained.training import read_weights
from nfm.storage.files import atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

FIELDS = ("model", "times", "objective", "sampler")


def named(config: Any) -> dict[str, str]:
    """The functions that a section names, by its field."""
    values = {field: getattr(config, field, None) for field in FIELDS}
    return {field: value for field, value in values.items() if isinstance(value, str) and ":" in value}


def digests(config: Any) -> dict[str, str]:
    """The SHA-256 of their files. Raises Unfit where a module is not found; nothing of it runs."""
    return {field: _digest(field, function) for field, function in named(config).items()}


def announce(functions: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Says whose code is about to run."""
    for field, function in functions.items():
        file = custom.source_file(function, _told(field))
        say(custom.announced(str(file), function, custom.digest(file, _told(field)), _told(field)))


def load(field: str, function: str, sha256: str | None = None) -> Callable[..., Any]:
    """The function, of a file that has this digest, by default the one that it has now. Raises StageError."""
    file = custom.source_file(function, _told(field))
    return custom.load(file, function, sha256 or _digest(field, function), _told(field))


def of_student(folder: Path, field: str) -> Callable[..., Any] | None:
    """The function that a finished student was made with, if that is its user's own."""
    found = recorded(folder).get(field)
    return load(field, *found) if found is not None else None


def recorded(folder: Path) -> dict[str, tuple[str, str]]:
    """The functions that sampling a finished student runs, with their digests, by field."""
    _, sizes = read_weights(folder)  # which the network is built from, whatever the manifest says
    found = {"model": (str(sizes["model"]), str(sizes.get("sha256")))} if "model" in sizes else {}
    if sampler := atomic.read_json(folder / "manifest.json").get("config", {}).get("sampler"):
        found["sampler"] = (str(sampler), str(atomic.read_json(folder / "spec.json")["external"].get("sampler")))
    return found


def announce_student(folder: Path, say: Callable[[str], None]) -> None:
    """Says whose code sampling a finished student runs."""
    announce({field: function for field, (function, _) in recorded(folder).items()}, say)


def sizes_of(config: Any, image_shape: Sequence[int], classes: int) -> dict[str, Any]:
    """What is stored beside the weights of a network of one's own."""
    own = {"model": config.model, "sha256": _digest("model", config.model), "options": dict(config.options)}
    return {**own, "image_shape": list(image_shape), "classes": classes}


def build(sizes: Mapping[str, Any]) -> nn.Module:
    """The network, untrained, from the file of the digest in its sizes. Raises Unfit where it cannot be made."""
    from torch import nn

    function, shape, options = sizes["model"], tuple(sizes["image_shape"]), sizes["options"]
    network = load("model", function, sizes["sha256"])(shape, sizes["classes"], **options)
    if not isinstance(network, nn.Module) or not any(part.requires_grad for part in network.parameters()):
        raise Unfit(
            f"student.model = {function!r}: returned {_kind(network)}; return a torch.nn.Module that has parameters"
        )
    return network


def check(config: Any, image_shape: Sequence[int], classes: int, network: Callable[[], nn.Module]) -> None:
    """Raises Unfit where a function of the section is not what it should be, tried on two made-up pairs."""
    functions = named(config)
    if not functions:
        return
    try:
        _check({field: load(field, function) for field, function in functions.items()}, config, image_shape, classes,
               network())  # fmt: skip
    except StageError as error:
        raise Unfit(str(error)) from error


def _check(
    functions: Mapping[str, Callable[..., Any]], config: Any, image_shape: Sequence[int], classes: int,
    network: nn.Module,
) -> None:  # fmt: skip
    import torch

    from nfm.storage.reading.batch import Batch
    from nfm.trainers.training.randomness import Randomness

    pair = torch.randn(2, 2, *image_shape, generator=torch.Generator().manual_seed(0))
    none, label = torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 0 if classes else -1])
    batch = Batch(pair[0], pair[1], label, none, none, none, 0, {}, np.arange(2))
    if "times" in functions:
        times = functions["times"](Randomness(0, 2))
        _check_tensor("times", config, times, (2,))
        if not ((times >= 0) & (times <= 1)).all():
            raise Unfit(
                f"student.times = {config.times!r}: gave times from {times.min():.3g} to {times.max():.3g}; give times "
                "in [0, 1], where t = 1 is the noise"
            )
    if "objective" in functions:
        loss = functions["objective"](network, batch, Randomness(0, 2))
        _check_tensor("objective", config, loss, ())
        if not loss.requires_grad:
            raise Unfit(
                f"student.objective = {config.objective!r}: its loss does not depend on the network's parameters"
            )
    elif "model" in functions:
        _check_tensor("model", config, _called(config, network, batch), tuple(batch.image.shape))
    if "sampler" in functions:
        with torch.no_grad():
            images = functions["sampler"](network, batch.noise, batch.label)
        _check_tensor("sampler", config, images, tuple(batch.noise.shape))


def _called(config: Any, network: nn.Module, batch: Any) -> Any:
    import torch

    try:
        return network(batch.image, torch.tensor([0.25, 0.75]), batch.label)
    except Exception as error:  # whatever somebody's network makes of the call
        raise Unfit(
            f"student.model = {config.model!r}: its network, called with x {list(batch.image.shape)}, t [2] and labels "
            f"{batch.label.tolist()}, raised {type(error).__name__}: {error}; it takes (x, t, label), label -1 for none"
        ) from error


def _check_tensor(field: str, config: Any, value: Tensor | Any, shape: tuple[int, ...]) -> None:
    import torch

    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
        raise Unfit(
            f"student.{field} = {getattr(config, field)!r}: gave {_kind(value)} for two pairs; give floats of shape "
            f"{list(shape)}"
        )


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}" if shape is None else f"{value.dtype} {list(shape)}"


def _digest(field: str, function: str) -> str:
    return custom.digest(custom.source_file(function, _told(field)), _told(field))


def _told(field: str) -> str:
    return f"student.{field}"
