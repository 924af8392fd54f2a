"""One image file as upright L or RGB pixels, for every mode of Pillow (docs/data.md has the table).

A mode is converted if there is one right way. Otherwise, and for unknown modes, the image is set aside with a reason.
Colour profiles are not applied.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageColor

GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
# Formats whose 16-bit greys run from black to white. Pillow gives those of PPM, and in older releases of PNG, as I.
FULL_RANGE = {"I": ("PNG", "PPM"), **dict.fromkeys(GREY_16, ("PNG", "TIFF", "JPEG2000", "IM"))}
PLAIN = ("1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV", "CMYK", "LAB")
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}

MOST_PIXELS = 178_956_970  # Pillow refuses more by default. It warns above half of it, without the file's name.
ORIENTATION, WHITE_IS_ZERO = 0x0112, 262  # tags of EXIF and of TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = tuple(UPRIGHT[value] for value in (5, 6, 7, 8))


class MisfitError(ValueError):
    """An image that can be decoded but not used. Its message is the reason in the table."""


@contextmanager
def own_limit() -> Iterator[None]:
    """Lets Pillow open images of up to MOST_PIXELS without a warning.

    It raises DecompressionBombError for larger ones.
    """
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():  # for all threads, so enter it before they start
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def converted(opened: Image.Image, channels: int, background: str) -> tuple[Image.Image, list[str]]:
    """The first frame as an upright L (1 channel) or RGB (3) image, and notes about decisions on the way.

    Transparent pixels are put over `background` before any resizing. Raises MisfitError for a mode without one right
    conversion, and what Pillow raises for an unreadable file.
    """
    notes = ["only the first of several frames is taken"] if getattr(opened, "is_animated", False) else []
    depth = _depth(opened)
    opened.load()
    turn = _turn(opened)
    image = opened if turn is None else opened.transpose(turn)
    if image.mode in FULL_RANGE:
        image = _grey_of_16_bits(image, opened, depth)
    elif image.mode not in PLAIN + ALPHA:
        raise MisfitError(f"mode {image.mode} has no one right conversion to 8 bits: save it as 8-bit grey or RGB")
    if image.mode == "LAB":
        image = image.convert("RGB")  # the only conversion that Pillow offers for this mode
    if image.mode == "CMYK":
        notes.append("CMYK is converted without a colour profile")
    if image.mode in ALPHA or image.has_transparency_data:
        image, seen_through = _composited(_with_alpha(image, depth), background)
        notes += [f"transparent pixels lie over data.background = {background!r}"] if seen_through else []
    return image.convert("RGB" if channels == 3 else "L"), notes


def fitted(
    image: Image.Image, size: tuple[int, int], image_size: int | None, crop: str
) -> tuple[np.ndarray, list[str]]:
    """[C, height, width] uint8, and notes: an image of this `size`, or one that is cut to the square `image_size`."""
    height, width = size
    notes: list[str] = []
    if image_size is None and image.size != (width, height):
        raise MisfitError(f"{image.width}x{image.height} pixels, the others {width}x{height}: set data.image_size")
    if image_size is not None and crop == "adm":
        if image_size * max(image.size) > MOST_PIXELS * min(image.size) // image_size:
            raise MisfitError(f'{image.width}x{image.height} pixels, too long and narrow for data.crop = "adm"')
        notes += ["smaller than data.image_size and made larger, as ADM does"] if min(image.size) < image_size else []
        image = adm_square(image, image_size)
    elif image_size is not None:
        image = _central_square(image, image_size)
    return np.asarray(image, np.uint8).reshape(height, width, -1).transpose(2, 0, 1), notes


def _central_square(image: Image.Image, image_size: int) -> Image.Image:
    side = min(image.size)
    if side < image_size:
        raise MisfitError(
            f"{image.width}x{image.height} pixels, smaller than data.image_size = {image_size}: take a smaller one, "
            'or data.crop = "adm", which makes images larger'
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.BICUBIC)


def adm_square(image: Image.Image, image_size: int) -> Image.Image:
    """The square that ADM trains on (Dhariwal and Nichol 2021): the reference statistics of ImageNet are of these.

    The shorter side is halved with a box filter while it is at least twice `image_size`, then resized to it
    (bicubic), and the centre of the longer side is taken. Smaller images become larger.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """(width, height) of the result of `converted`."""
    if _turn(opened) is not None:
        opened.load()  # this turns a TIFF and does not change other formats
    return opened.size[::-1] if _turn(opened) in SIDEWAYS else opened.size


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes the image upright by its EXIF orientation; None if there is none to read."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken metadata can raise anything, and the pixels may still be good
        return None


def _depth(opened: Image.Image) -> int:
    """Bits of a grey or colour value in the file, by the name of Pillow's decoder. The pixels are not read for this."""
    tiles = getattr(opened, "tile", ())  # only an opened image has tiles
    args: Any = tiles[0][3] if tiles else ""
    raw = str(args[0] if isinstance(args, tuple) and args else args)
    digits = "".join(letter for letter in raw.partition(";")[2] if letter.isdigit())
    return int(digits) if digits else 8


def _grey_of_16_bits(image: Image.Image, opened: Image.Image, depth: int) -> Image.Image:
    """L, or LA if one value is transparent: the range of the file scaled to 0..255 and rounded."""
    if opened.format not in FULL_RANGE[image.mode]:
        raise MisfitError(
            f"mode {image.mode} of {opened.format} does not say which values are black and white: save it as 8-bit grey"
        )
    values = np.asarray(image).astype(np.int64)
    top = 4095 if depth == 12 else 65535
    grey = (255 * values + top // 2) // top
    if getattr(opened, "tag_v2", {}).get(WHITE_IS_ZERO) == 0:
        grey = 255 - grey
    found = Image.fromarray(grey.astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        found = Image.merge("LA", (found, Image.fromarray(alpha)))
    return found


def _with_alpha(image: Image.Image, depth: int) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and depth > 8:
        raise MisfitError(
            f"{depth}-bit colour with a transparent one: Pillow reads 8 bits, which do not tell it apart; "
            "save it with an alpha channel"
        )
    if image.mode in ("L", "RGB") and isinstance(transparent, int | tuple):
        # PNG gives the transparent value in the file's own bits, the low ones. Pillow has scaled the pixels to 8 bits.
        most = 2**depth - 1
        eight = [(value & most) * 255 // most for value in np.atleast_1d(transparent).tolist()]
        image = image.copy()
        image.info["transparency"] = eight[0] if image.mode == "L" else tuple(eight)
    return image.convert(PREMULTIPLIED.get(image.mode, "RGBA")).convert("RGBA")


def _composited(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """RGB of an RGBA image over the background, and whether the background is visible anywhere."""
    lowest: Any = image.getchannel("A").getextrema()[0]
    if lowest == 255:
        return image.convert("RGB"), False
    ground = Image.new("RGBA", image.size, (*ImageColor.getrgb(background), 255))
    return Image.alpha_composite(ground, image).convert("RGB"), True
