"""A short test of a teacher: the batch size at which encoding is fastest, and the error of its precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nfm.stages.base import StageError
from nfm.stages.trained.devices.machine import free_memory, is_out_of_memory
from nfm.stages.trained.devices.machine import threads as on_threads
from nfm.stages.trained.devices.precision import Precision, autocast_dtype
from nfm.storage.files.copies import mirror

if TYPE_CHECKING:
    from torch import Tensor

    from nfm.trainers.couplings.coupling import NFM
    from nfm.trainers.models.tarflow import TarFlow

SIZES = tuple(2**power for power in range(11))  # 1 to 1024
SECONDS = 3.0  # for the comparison; the first two batches of each size come before it
SLOW_BATCH = 1.0  # seconds: larger batches are not faster, and a stop waits for the current batch
WITHIN = 0.04  # of the best rate; two runs differ by more than that
ROUNDS = 5
SEED = 0


@dataclass(frozen=True)
class Proposal:
    """The batch size to use, and images per second for every size that was timed (sizes are text, for JSON)."""

    batch_size: int
    rates: dict[str, float]

    @property
    def rate(self) -> float:
        """Images per second at the proposed size."""
        return self.rates[str(self.batch_size)]


def propose(encode: Callable[[int], object], sizes: Sequence[int], seconds: float) -> Proposal:
    """The smallest size within a few percent of the best rate. `encode(size)` encodes a batch and waits for its end.

    Sizes are tried in ascending order until one is slow, much slower than a smaller one, or too large for memory. The
    promising ones are then timed in turn for about `seconds`. Raises what `encode` raises; out of memory only if no
    size fits.
    """
    times: dict[int, list[float]] = {}
    behind = 0
    for size in sorted(sizes):
        try:
            if not times:
                encode(size)  # the first batch of a process also loads kernels
            times[size] = _warm(encode, size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not times:
                raise StageError(
                    f"a batch of {size} does not fit into memory: this device is too small for the teacher"
                ) from error
            break
        best = max(tried / min(taken) for tried, taken in times.items())
        behind = behind + 1 if size / min(times[size]) < 0.75 * best else 0
        if min(times[size]) > SLOW_BATCH or behind == 2:  # a single size that is slower than smaller ones may be chance
            break
    contenders = [size for size, taken in times.items() if size / min(taken) > 0.75 * best]
    deadline = time.perf_counter() + seconds
    for _ in range(ROUNDS):
        for size in contenders:
            if time.perf_counter() + min(times[size]) < deadline:
                times[size].append(_seconds(encode, size))
    rates = {size: size / statistics.median(taken) for size, taken in times.items()}
    chosen = min(size for size in rates if rates[size] >= (1 - WITHIN) * max(rates.values()))
    return Proposal(chosen, {str(size): float(f"{rate:.3g}") for size, rate in rates.items()})


def for_teacher(
    teacher: str | Path | TarFlow,
    image_shape: Sequence[int],
    classes: int,
    eta: float | None,
    device: str,
    precision: Precision,
    threads: int,
    seconds: float = SECONDS,
    sizes: Sequence[int] = SIZES,
) -> Proposal:
    """The batch size for a teacher, given as the folder or URL of its artifact or as a model on `device`.

    It is timed as the encoder runs it, on `threads` CPU threads, but not compiled: compiling for every size would take
    minutes, and the order of the sizes would be the same.
    """
    from nfm.trainers.couplings.coupling import NFM

    if isinstance(teacher, str | Path):
        from nfm.stages.trained.teacher import load

        teacher, _ = load(Path(mirror.here(str(teacher))), device)
    coupling = NFM(teacher, eta or 0.0, 1.0, device, autocast_dtype(precision), precision == "tf32")
    encode = encoding(coupling, image_shape, classes)
    with on_threads(threads):
        proposal = propose(encode, sizes, seconds)
    free_memory(device)
    return proposal


def encoding(coupling: NFM, image_shape: Sequence[int], classes: int) -> Callable[[int], object]:
    """A function that encodes a batch of random images of a given size and returns the noise, as the encoder does."""

    inputs = inputs_like(image_shape, classes, 1)

    def encode(size: int) -> object:
        nonlocal inputs
        if size > len(inputs[0]):  # sizes ascend, so later timings make no random numbers
            inputs = inputs_like(image_shape, classes, size)
        pairs = coupling(*(part[:size] for part in inputs))
        return [part.float().cpu() for part in pairs if part is not None]  # on a GPU this waits for the end

    return encode


def inputs_like(image_shape: Sequence[int], classes: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random (images in [-1, 1], labels, eps) of a batch, as a coupling takes them. They are the same in every call."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    images = torch.rand((count, *image_shape), generator=generator) * 2 - 1
    labels = torch.randint(max(classes, 1), (count,), generator=generator) - (0 if classes else 1)
    return images, labels, torch.randn((count, *image_shape), generator=generator)


def _warm(encode: Callable[[int], object], size: int) -> list[float]:
    """Seconds of batches after a warm-up batch, which counts only if it is slow itself. Short ones are repeated."""
    if (first := _seconds(encode, size)) > SLOW_BATCH:
        return [first]
    return [_seconds(encode, size) for _ in range(1 if first > 0.05 else 3)]


def _seconds(encode: Callable[[int], object], size: int) -> float:
    started = time.perf_counter()
    encode(size)
    return time.perf_counter() - started
