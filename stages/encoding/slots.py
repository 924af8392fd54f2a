"""The data of slots on their way: their sources, the pairs that a coupling made, and the final records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nfm.stages.base import StageError
from nfm.stages.display.pictures import to_uint8
from nfm.storage import ImageDataset
from nfm.storage.format import philox
from nfm.storage.format.spec import StoreSpec

if TYPE_CHECKING:
    import torch

    from nfm.trainers.couplings.coupling import Pairs

Array = np.ndarray


class Sources(NamedTuple):
    """What slots are encoded from, each over n: image as stored (already flipped), label (-1: none), flip, eps'."""

    slots: Array
    image: Array
    label: Array
    flip: Array
    eps: Array


class Found(NamedTuple):
    """`Pairs` of a coupling as arrays; see there."""

    noise: Array
    nll: Array | None
    group: Array | None
    row: Array | None
    image: Array | None


def read(spec: StoreSpec, source: ImageDataset, draw: int, slots: Array) -> Sources:
    """The sources of slots, which are rows of the shuffled data set."""
    flip = drawn_flips(spec, draw, slots)
    image = mirrored(source.images(slots), flip)
    return Sources(slots, image, source.labels(slots), flip, drawn_eps(spec, draw, slots))


def drawn_flips(spec: StoreSpec, draw: int, slots: Array) -> Array:
    """Which of these slots are flipped, bool [n]; none if the store does not flip."""
    return philox.flips(spec.seed, draw, slots) if spec.flips else np.zeros(len(slots), bool)


def drawn_eps(spec: StoreSpec, draw: int, slots: Array) -> Array:
    """eps' of these slots, float32 [n, C, H, W]."""
    shape = spec.image_shape
    return philox.normals(spec.seed, draw, slots, math.prod(shape)).reshape(len(slots), *shape)


def found(pairs: Pairs, count: int) -> Found:
    """The first `count` pairs that a coupling made, as arrays. Raises StageError for an nll that is not finite."""

    def part(field: torch.Tensor | None) -> Array | None:
        return None if field is None else field[:count].cpu().numpy()

    noise, nll = pairs.noise[:count].cpu().numpy(), part(pairs.nll)
    if nll is not None and (bad := int((~np.isfinite(nll)).sum())):
        raise StageError(f"the teacher's nll of {bad} of {len(nll)} images is not finite: check the teacher's training")
    return Found(noise, nll, part(pairs.group), part(pairs.row), part(pairs.image))


def joined(parts: Sequence[Sources]) -> Sources:
    """The parts joined in order."""
    return Sources(*map(np.concatenate, zip(*parts)))


def together(parts: Sequence[Found]) -> Found:
    """The parts joined in order. A field that is None is None in all parts."""
    return Found(*(None if field[0] is None else np.concatenate(field) for field in zip(*parts)))  # type: ignore[arg-type]


def mirrored(images: Array, flip: Array) -> Array:
    """Images or noises [n, C, H, W]; those with a flip are mirrored left to right."""
    return np.where(flip[:, None, None, None], images[..., ::-1], images)


def records(source: ImageDataset, sources: Sources, found: Found) -> dict[str, Array]:
    """The records of these slots.

    Each has the label of its own row, and its own image unless the coupling chose another.
    """
    count = len(sources.slots)
    image, row = sources.image, sources.slots
    if found.row is not None:
        row = found.row
        image = mirrored(source.images(row), sources.flip)
    if found.image is not None:
        image = mirrored(stored(found.image, source.dtype), sources.flip)
    group = np.full(count, -1) if found.group is None else sources.slots[found.group]
    return {
        "image": image,
        "noise": found.noise,
        "label": sources.label,
        "slot": sources.slots,
        "row": row,
        "flip": sources.flip,
        "nll": np.full(count, np.nan, np.float32) if found.nll is None else found.nll,
        "group": group,
    }


def stored(images: Array, dtype: str) -> Array:
    """Generated images, float32 in the data's range, in the dtype of the source. uint8 is as in a file of pixels.

    Raises StageError for images that are not finite.
    """
    out = to_uint8(images) if dtype == "uint8" else images.astype(dtype)
    if bad := int((~np.isfinite(images if dtype == "uint8" else out)).reshape(len(images), -1).any(axis=1).sum()):
        raise StageError(
            f"{bad} of {len(images)} generated images are not finite in {dtype}; train the student longer, or lower "
            "pairs.reflow_guidance"
        )
    return out
