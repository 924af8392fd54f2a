"""What of a teacher or a student is its user's own, each a function `module:function`.

    teacher.model(image_shape, classes, **options) -> a flow: encode(x, label) -> (noise, log-determinant [B] in nats a
        dimension), and decode(noise, label) -> x, its inverse
    student.model(image_shape, classes, **options) -> a network, called as network(x, t, label) -> velocity
    student.times(random) -> float32 [B] in [0, 1], drawn from a `Randomness`
    student.objective(network, batch, random) -> a scalar, the mean over the batch of image, noise, label
    student.sampler(network, noise, label) -> images, in place of a solver

The digests of their files are part of the fingerprint. Their code runs where a run trains, encodes or samples, and is
tried on two made-up records before anything is trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import StageError, Unfit
from nfm.stages.couplings import custom
from nfm.stages.trained.weights import read_weights
from nfm.storage.errors import by
from nfm.storage.errors.arguments import nearest
from nfm.storage.files import atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nfm.storage.reading.batch import Batch

FIELDS = {"teacher": ("model",), "student": ("model", "times", "objective", "sampler")}
UNKNOWN_COST = "no time or FLOPs (it is code of its user's own, which a plan does not run)"
_LOOK = "look for a division by 0, and for a log or a root of 0"
MOVED = 0.02  # standard deviation of what is added to the parameters
INVERSE = 0.05  # RMS, in image units, of decode(encode(x)) - x


def named(config: Any, stage: str) -> dict[str, str]:
    """The functions that a stage's section names, by its field."""
    values = {name: getattr(config, name) for name in FIELDS[stage]}
    words = ("times", "objective")  # which may also be one that we have
    return {
        f"{stage}.{name}": value
        for name, value in values.items()
        if isinstance(value, str) and (":" in value or name not in words)
    }


def digests(config: Any, stage: str) -> dict[str, str]:
    """The SHA-256 of their files. Raises Unfit where a module is not found; nothing of it runs."""
    return {field.partition(".")[2]: _digest(field, function) for field, function in named(config, stage).items()}


def look_for(config: Any, stage: str) -> None:
    """Raises Unfit where a module or its function is not found; nothing of it runs."""
    for field, function in named(config, stage).items():
        custom.check(custom.source_file(function, field), function, field)


def announce(functions: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Says whose code is about to run, of the files as they are now."""
    announce_code({field: (function, _digest(field, function)) for field, function in functions.items()}, say)


def load(field: str, function: str, sha256: str | None = None) -> Callable[..., Any]:
    """The function, of a file that has this digest, by default the one that it has now. Raises StageError."""
    return custom.load(custom.source_file(function, field), function, sha256 or _digest(field, function), field)


def sampler_of(folder: Path) -> Callable[..., Any]:
    """The sampler of its own of a finished student."""
    return load("student.sampler", *recorded(folder, "student")["student.sampler"])


def recorded(folder: Path, stage: str) -> dict[str, tuple[str, str]]:
    """The functions that a finished teacher or student runs when it is used, with their digests, by field."""
    _, sizes = read_weights(folder)  # which the network is built from, whatever the manifest says
    found = {f"{stage}.model": (str(sizes["model"]), str(sizes.get("sha256")))} if "model" in sizes else {}
    if sampler := atomic.read_json(folder / "manifest.json").get("config", {}).get("sampler"):
        sha256 = atomic.read_json(folder / "spec.json")["external"].get("sampler")
        found[f"{stage}.sampler"] = (str(sampler), str(sha256))
    return found


def announce_made(folder: Path, stage: str, say: Callable[[str], None]) -> None:
    """Says whose code using a finished teacher or student runs. Raises StageError where it is not what was recorded."""
    announce_code(recorded(folder, stage), say)


def announce_code(code: Mapping[str, tuple[str, str]], say: Callable[[str], None]) -> None:
    """Says whose code runs, (function, digest) by field. Raises StageError where a file has another digest."""
    for field, (function, sha256) in code.items():
        say(custom.announced(custom.source_file(function, field), function, sha256, field))


def sizes_of(config: Any, stage: str, image_shape: Sequence[int], classes: int) -> dict[str, Any]:
    """What is stored beside the weights of a network of one's own."""
    sha256 = _digest(f"{stage}.model", config.model)
    own = {"model": config.model, "sha256": sha256, "options": dict(config.options)}
    return {**own, "image_shape": list(image_shape), "classes": classes}


def build(sizes: Mapping[str, Any], stage: str) -> nn.Module:
    """The network, untrained, from the file of the digest in its sizes. Raises StageError where it cannot be made."""
    from torch import nn

    function, shape, options = sizes["model"], tuple(sizes["image_shape"]), sizes["options"]
    maker = load(f"{stage}.model", function, sizes["sha256"])
    _check_options(maker, stage, function, options)
    try:
        network = maker(shape, sizes["classes"], **options)
    except StageError as error:
        if not (options and isinstance(error.__cause__, TypeError)):
            raise
        raise Unfit(f"{error}, or correct {stage}.options ({', '.join(options)})") from error
    if not isinstance(network, nn.Module) or not any(part.requires_grad for part in network.parameters()):
        raise Unfit(
            f"{stage}.model = {function!r}: returned {_kind(network)}; return a torch.nn.Module that has parameters"
        )
    return network


def _check_options(maker: Callable[..., Any], stage: str, function: str, options: Mapping[str, Any]) -> None:
    """Raises Unfit for an option that is no keyword of the function."""
    try:
        taken = list(inspect.signature(maker).parameters.values())
    except (TypeError, ValueError):
        return  # a function without a signature says itself what it does not take
    if any(one.kind is one.VAR_KEYWORD for one in taken):
        return
    known = [one.name for place, one in enumerate(taken) if one.kind is one.KEYWORD_ONLY
             or (one.kind is one.POSITIONAL_OR_KEYWORD and place > 1)]  # fmt: skip
    for name in options:
        if name not in known:
            there = f"it takes {', '.join(known)}{nearest(name, known)}" if known else "it takes none"
            raise Unfit(f"{stage}.options.{name}: {stage}.model = {function!r} has no such keyword; {there}")


def check(config: Any, stage: str, image_shape: Sequence[int], classes: int, network: Callable[[], nn.Module]) -> None:
    """Raises Unfit where a function of the section is not what it should be, tried on two made-up records."""
    functions = named(config, stage)
    if not functions:
        return
    try:
        made = network()
        loaded = {field: load(field, function) for field, function in functions.items()}
        if stage == "teacher":
            _check_flow(config, made, _records(image_shape, classes))
        else:
            _check_student(loaded, config, made, _records(image_shape, classes))
    except StageError as error:
        raise Unfit(str(error)) from error


def _records(image_shape: Sequence[int], classes: int) -> Batch:
    import torch

    from nfm.storage.reading.batch import Batch

    pair = torch.randn(2, 2, *image_shape, generator=torch.Generator().manual_seed(0))
    none, label = torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 0 if classes else -1])
    return Batch(pair[0], pair[1], label, none, none, none, 0, {}, np.arange(2))


def _check_student(functions: Mapping[str, Callable[..., Any]], config: Any, network: nn.Module, batch: Batch) -> None:
    import torch

    from nfm.trainers.training.randomness import Randomness

    shape = tuple(batch.image.shape)
    if (times_of := functions.get("student.times")) is not None:
        times = times_of(Randomness(0, 2))
        _check_tensor(f"student.times = {config.times!r}", times, (2,))
        if not ((times >= 0) & (times <= 1)).all():
            raise Unfit(
                f"student.times = {config.times!r}: gave times from {times.min():.3g} to {times.max():.3g}; give times "
                "in [0, 1], where t = 1 is the noise"
            )
    if (objective := functions.get("student.objective")) is not None:
        loss = objective(network, batch, Randomness(0, 2))
        _check_tensor(f"student.objective = {config.objective!r}", loss, ())
        if not loss.requires_grad:
            raise Unfit(
                f"student.objective = {config.objective!r}: its loss does not depend on the network's parameters"
            )
        _check_gradients(f"student.objective = {config.objective!r}", loss, network)
    elif "student.model" in functions:
        with _blaming_calls(f"student.model = {config.model!r}", batch, "(x, t, label) with t [2]"):
            velocity = network(batch.image, torch.tensor([0.25, 0.75]), batch.label)
        _check_tensor(f"student.model = {config.model!r}", velocity, shape)
        if velocity.requires_grad:
            _check_gradients(f"student.model = {config.model!r}", velocity.square().mean(), network)
    if (sampler := functions.get("student.sampler")) is not None:
        with torch.no_grad():
            images = sampler(network, batch.noise, batch.label)
        _check_tensor(f"student.sampler = {config.sampler!r}", images, shape)


def _check_flow(config: Any, flow: Any, batch: Batch) -> None:
    """As it is made, and a little moved, as by training: a flow that begins as the identity hides a wrong inverse."""
    import torch

    _check_inverse(config, flow, batch, "")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += (MOVED * torch.randn(parameter.shape, generator=random)).to(parameter)
    _check_inverse(config, flow, batch, f", its parameters moved by {MOVED:g}")


def _check_inverse(config: Any, flow: Any, batch: Batch, moved: str) -> None:
    import torch

    said, shape = f"teacher.model = {config.model!r}{moved}", tuple(batch.image.shape)
    with torch.no_grad():
        with _blaming_calls(said, batch, "encode(x, label)"):
            noise, logdet = flow.encode(batch.image, batch.label)
        _check_tensor(f"{said}, noise of encode", noise, shape)
        _check_tensor(f"{said}, log-determinant of encode", logdet, (2,))
        with _blaming_calls(said, batch, "decode(noise, label)"):
            back = flow.decode(noise, batch.label)
        _check_tensor(f"{said}, decode", back, shape)
    error = float((back - batch.image).square().mean().sqrt())
    if not error < INVERSE:
        raise Unfit(f"{said}: decode is not the inverse of encode: an image comes back with an error of {error:.3g}")


def _blaming_calls(said: str, batch: Batch, call: str) -> AbstractContextManager[None]:
    called = f"called as {call} for x {by(batch.image.shape)}, labels {batch.label.tolist()}"
    return blaming_code(f"{said}: its network, {called},", "label -1 is none")


@contextmanager
def blaming_code(said: str, remedy: str) -> Iterator[None]:
    """Tells as wrong use what somebody's code raises within it, whatever that is; our own errors stay."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        raise Unfit(f"{said} raised {type(error).__name__}: {error}; {remedy}") from error


def _check_tensor(said: str, value: Tensor | Any, shape: tuple[int, ...]) -> None:
    import torch

    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
        raise Unfit(f"{said}: gave {_kind(value)} for two records; give floats of shape {by(shape)}")
    if not value.isfinite().all():
        raise Unfit(f"{said}: gave values that are not finite for two records of noise; {_LOOK}")


def _check_gradients(said: str, loss: Tensor, network: nn.Module) -> None:
    import torch

    parts = {name: part for name, part in network.named_parameters() if part.requires_grad}
    given = torch.autograd.grad(loss, list(parts.values()), allow_unused=True)
    for name, gradient in zip(parts, given):
        if gradient is not None and not gradient.isfinite().all():
            raise Unfit(f"{said}: its gradient in {name} is not finite for two records of noise; {_LOOK}")


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}" if shape is None else f"{value.dtype} {by(shape)}"


def _digest(field: str, function: str) -> str:
    return custom.digest(custom.source_file(function, field), field)
