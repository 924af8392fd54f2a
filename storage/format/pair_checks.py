"""Checks pairs that a user passes to `PairWriter` against the recipe of the store, before any of them is kept."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import StorageError, by
from nfm.storage.format import codecs, untrusted
from nfm.storage.format.codecs import CODECS
from nfm.storage.format.fields import Field
from nfm.storage.format.spec import StoreSpec

Array = npt.NDArray[Any]
OPTIONAL = ("row", "flip", "nll")  # columns of the index that are not fields
_FLOAT32 = float(np.finfo(np.float32).max)

CLIPPED = 0.01  # of the noise values of a batch; of N(0, 1) none, of a teacher a few in a million
_FEW = 64  # values, of which nothing is said
UNIT = (0.25, 4.0)  # mean squares of a shard's noise that are taken for unit variance


def checked(spec: StoreSpec, given: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a batch of n records: the spec's fields except `slot`, and the columns in `OPTIONAL`.

    Values may be numpy arrays, torch tensors or anything else that `np.asarray` accepts. None means that a column is
    not given. A single record has no first axis. The noise is returned as float32. Raises StorageError, which names the
    field, the record in the batch and the remedy.
    """
    there = {name: _array(name, value) for name, value in given.items() if value is not None}
    fields = [field for field in spec.fields if field.role != "slot"]
    if lacking := [field.name for field in fields if field.name not in there]:
        raise StorageError(f"{', '.join(lacking)}: not given; the spec of the store lists it, so every record has one")
    known = [field.name for field in fields]
    for name in there:
        if name not in known and name not in OPTIONAL:
            remedy = "give classes to the spec" if name == "label" else f"there are {', '.join((*known, *OPTIONAL))}"
            raise StorageError(f"{name}: the spec of the store has no such field; leave it out, or {remedy}")
    single = there["image"].shape == spec.image_shape
    columns = [Field(name, "int64", (), "label") for name in OPTIONAL if name in there]
    arrays = {field.name: _shaped(field, there[field.name], single) for field in (*fields, *columns)}
    counts = {name: len(array) for name, array in arrays.items()}
    for name, count in counts.items():
        if count != counts["image"]:
            raise StorageError(f"{name}: {count} records, image has {counts['image']}; give one a record")
    arrays["image"] = _image(spec, arrays["image"])
    arrays["noise"] = _noise(spec, arrays["noise"])
    if "label" in arrays:
        arrays["label"] = _whole("label", arrays["label"], spec.classes, "classes of the spec")
    if "row" in arrays:
        arrays["row"] = _whole("row", arrays["row"], spec.rows, "rows of the spec")
    if "flip" in arrays and arrays["flip"].dtype != np.bool_:
        raise StorageError(f"flip: {arrays['flip'].dtype} values; give booleans, True where the image is mirrored")
    if "flip" in arrays and not spec.flips:
        _no(arrays["flip"], "flip", arrays["flip"], "is a mirrored image, and the spec has flips=False; set it True")
    if "nll" in arrays:
        told = "is not finite; leave nll out of a batch that has none"
        arrays["nll"] = _as_float32("nll", arrays["nll"], told, "an nll is a few nats per dimension")
    for field in fields:
        if field.name not in ("image", "noise", "label"):
            arrays[field.name] = _exact(field, arrays[field.name])
    return arrays


class RowImages:
    """Remembers a check sum of the image and label of every source row that a batch named: a row is one image.

    Eight bytes a row of the source. What an earlier writer of the same store named is not known.
    """

    def __init__(self, spec: StoreSpec) -> None:
        self._seen = np.full(spec.rows, -1, np.int64)

    def take(self, arrays: Mapping[str, Array]) -> None:
        """Raises StorageError where a row has another image, or label, than it had before; else remembers them."""
        if "row" not in arrays:
            return
        rows, sums, here = arrays["row"], self._sums(arrays), dict[int, int]()
        for number, (row, before, found) in enumerate(zip(rows.tolist(), self._seen[rows].tolist(), sums)):
            if here.setdefault(row, found if before < 0 else before) != found:
                raise StorageError(
                    f"row: {row} in record {number} of the batch was given before with another image or label; a row "
                    "is one image of the source, so give each its own, or leave row out"
                )
        self._seen[rows] = sums

    @staticmethod
    def _sums(arrays: Mapping[str, Array]) -> list[int]:
        images, labels = arrays["image"], arrays.get("label", np.zeros(len(arrays["image"]), np.int64))
        flips = arrays.get("flip", np.zeros(len(images), bool))
        plain = ((image[..., ::-1] if flip else image).tobytes() for image, flip in zip(images, flips))
        return [zlib.crc32(image, int(label) & 0xFFFFFFFF) for image, label in zip(plain, labels)]


def _array(name: str, value: Any) -> Array:
    """A copy of the array or tensor (any device, no gradient), so that the caller may reuse it."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise StorageError(f"{name}: has masked values, and a store has none; leave those records out")
    try:
        detached = value.detach() if callable(getattr(value, "detach", None)) else value
        on_host = detached.cpu() if callable(getattr(detached, "cpu", None)) else detached
        return np.array(np.asarray(on_host))
    except (TypeError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"{name}: no array can be made of this {type(value).__name__} ({error}); give float32 numbers, "
            "for instance .float() of a tensor of bfloat16"
        ) from error


def _shaped(field: Field, array: Array, single: bool) -> Array:
    """The array as [n, *shape]; a single record gets its first axis here."""
    if single and array.shape == field.shape:
        return array[None]
    if array.ndim == len(field.shape) + 1 and array.shape[1:] == field.shape and not single:
        return array
    raise StorageError(
        f"{field.name}: is {by(array.shape)}; give {'a single record' if single else 'a batch'} of {by(field.shape)} "
        "a record"
    )


def _image(spec: StoreSpec, image: Array) -> Array:
    dtype = spec.field("image").dtype
    if dtype == "uint8":
        if image.dtype != np.uint8:
            raise StorageError(
                f"image: {image.dtype} values, the spec says uint8; give whole pixels from 0 to 255 as uint8, or make "
                "the spec with image_dtype='float32'"
            )
        return image
    low, high = spec.value_range
    image = _floats("image", image)
    # Latents may have any values. Their spec should state a wide range.
    told = f"is outside value_range [{low:g}, {high:g}] of the spec; scale the images, or state their range in the spec"
    _no(~np.isfinite(image), "image", image, "is not finite; leave the record out")
    _no((image < low) | (image > high), "image", image, told)
    stored = _cast(image, dtype)
    _no(~np.isfinite(stored), "image", image, f"is too large for {dtype}; make the spec with image_dtype='float32'")
    return stored


def _noise(spec: StoreSpec, noise: Array) -> Array:
    noise = _as_float32("noise", noise, "is not finite; check what made it", "noise has unit variance")
    stored, clipped = codecs.pack(noise, spec.codec)
    if clipped > CLIPPED * noise.size:
        raise StorageError(
            f"noise: codec {spec.codec} would clip {clipped / noise.size:.1%} of the values; noise has unit variance, "
            "codecs float16 and float32 take more"
        )
    if CODECS[spec.codec].step is None:
        told = f"is too large for codec {spec.codec}; noise has unit variance, codec float32 takes more"
        _no(~np.isfinite(stored), "noise", noise, told)
        lost = np.count_nonzero((stored == 0) & (noise != 0))
        if lost > CLIPPED * noise.size:
            raise StorageError(
                f"noise: codec {spec.codec} would make {lost / noise.size:.1%} of the values 0; noise has unit "
                "variance, scale it"
            )
    return noise


def scale_of(noise: Array) -> str:
    """What is wrong with the scale of so much noise [n, C, H, W]; empty if nothing is.

    Students begin at N(0, I), whatever the pairs have: with noise of another scale their samples are not images.
    """
    square = float(np.square(noise, dtype=np.float64).mean())
    if UNIT[0] <= square <= UNIT[1] or noise.size < _FEW:
        return ""
    remedy = f"divide it by {square**0.5:.3g}, or check what made it" if square else "check what made it"
    return f"the noise has a mean square of {square:.3g}, and students begin at noise of 1: {remedy}"


def _as_float32(name: str, array: Array, not_finite: str, usual: str) -> Array:
    """Floats as float32; `not_finite` is said of inf and nan, `usual` of what float32 cannot hold."""
    array = _floats(name, array)
    _no(~np.isfinite(array), name, array, not_finite)
    found = _cast(array, "float32")
    _no(~np.isfinite(found), name, array, f"is too large for float32; {usual}")
    return found


def _floats(name: str, array: Array) -> Array:
    if array.dtype.kind != "f":
        raise StorageError(f"{name}: {array.dtype} values; give floats")
    return array


def _cast(array: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _whole(name: str, array: Array, end: int | None, what: str) -> Array:
    if array.dtype.kind not in "iu" and array.size:  # an empty list has floats
        raise StorageError(f"{name}: {array.dtype} values; give whole numbers")
    high = np.iinfo(np.int64).max if end is None else end - 1
    _no((array < 0) | (array > high), name, array, f"is outside 0 to {high}, the {what}")
    return array.astype(np.int64)


def _exact(field: Field, array: Array) -> Array:
    if not np.can_cast(array.dtype, field.dtype, "safe"):
        raise StorageError(f"{field.name}: {array.dtype} values, the spec says {field.dtype}; convert them first")
    if array.dtype.kind == "f":
        _no(~np.isfinite(array), field.name, array, "is not finite; leave the record out")
    return array.astype(field.dtype)


def _no(wrong: Array, name: str, array: Array, told: str) -> None:
    """Raises StorageError for the first wrong value, if there is one."""
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        value = untrusted.shown(array[at].item())
        raise StorageError(f"{name}: {value} in record {int(at[0])} of the batch {told}")
