"""Every mode that Pillow knows becomes the right 8-bit pixels or is set aside, as the table of docs/data.md says."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nfm.stages.data.reading import pixels
from nfm.stages.data.reading.pixels import ALPHA, FULL_RANGE, PLAIN, MisfitError, converted
from nfm.stages.data.source import Loaded
from nfm.stages.data.sources import ImageFolder
from tests.stages.data.image_files import COLOUR, COLOUR_ALPHA, GREY, GREY_ALPHA, PALETTE, picture, raw_png, save
from tests.support.recorder import Recorder

RAMP = np.array([[0, 255, 30000, 65535]], np.uint16)
RAMP_8 = [0, 1, 117, 255]  # to the nearest of 255 v / 65535
REFUSED = ("F",)


def load(root: Path, **options: Any) -> Loaded:
    source, scratch = ImageFolder(str(root), **options), root.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return source.load(np.arange(len(source.keys)), scratch, Recorder())


def grey(root: Path, **options: Any) -> list[int]:
    """The first row of the only image, read as grey and checked to be the same grey in RGB."""
    one, three = load(root, channels=1, **options), load(root, channels=3, **options)
    assert (one.rejected, three.rejected) == ({}, {})
    np.testing.assert_array_equal(three.images[0], np.repeat(one.images[0], 3, axis=0))
    return one.images[0, 0, 0].tolist()


def colours(root: Path, **options: Any) -> list[tuple[int, ...]]:
    """The first row of the only image, as RGB."""
    loaded = load(root, **options)
    assert loaded.rejected == {}
    return [tuple(pixel) for pixel in loaded.images[0, :, 0].T.tolist()]


def reason(root: Path, **options: Any) -> str:
    rejected = load(root, **options).rejected
    assert list(rejected) == [0]
    return rejected[0]


def big_endian_tiff(path: Path, values: np.ndarray) -> Path:
    return save(path, Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()))


SIXTEEN_BITS: dict[str, Callable[[Path], Any]] = {
    "png": lambda root: raw_png(root / "a" / "1.png", RAMP, 16, GREY),
    "tiff": lambda root: save(root / "a" / "1.tif", Image.fromarray(RAMP)),
    "compressed tiff": lambda root: save(root / "a" / "1.tif", Image.fromarray(RAMP), compression="tiff_lzw"),
    "big-endian tiff": lambda root: big_endian_tiff(root / "a" / "1.tif", RAMP),
    "jpeg 2000": lambda root: save(root / "a" / "1.jp2", Image.fromarray(RAMP), irreversible=False),
    "pgm": lambda root: save(root / "a" / "1.pgm", Image.fromarray(RAMP)),
    "white is zero": lambda root: save(root / "a" / "1.tif", Image.fromarray(~RAMP), tiffinfo={262: 0}),
}


@pytest.mark.parametrize("made", SIXTEEN_BITS.values(), ids=SIXTEEN_BITS)
def test_greys_of_16_bits_become_the_nearest_of_8(tmp_path: Path, made: Callable[[Path], Any]) -> None:
    made(tmp_path / "in")
    assert grey(tmp_path / "in") == RAMP_8


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_the_byte_order_of_16_bits_does_not_matter(mode: str) -> None:
    image = Image.frombytes(mode, (4, 1), RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    image.format = "TIFF"
    assert np.asarray(converted(image, 1, "white")[0]).tolist() == [RAMP_8]


def test_greys_of_16_bits_among_rgb_images_keep_their_shades(tmp_path: Path) -> None:
    ramp = np.linspace(0, 60000, 64).astype(np.uint16).reshape(8, 8)
    raw_png(tmp_path / "in" / "a" / "1.png", ramp, 16, GREY)
    picture(tmp_path / "in" / "a" / "2.png", size=8)
    images = load(tmp_path / "in").images
    np.testing.assert_array_equal(images[0], np.repeat((ramp / 257).round()[None], 3, axis=0))
    assert (images[1] == 100).all()


def test_greys_of_12_bits_are_taken_by_their_own_range(tmp_path: Path) -> None:
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10])  # 0, 2048, 4095, 16
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    file = tmp_path / "in" / "a" / "1.tif"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"II*\0" + struct.pack("<I", 14) + packed + directory + struct.pack("<I", 0))
    assert grey(tmp_path / "in") == [0, 128, 255, 1]


@pytest.mark.parametrize(
    ("kind", "row"), [(GREY_ALPHA, (0x1234, 65535)), (COLOUR, (0x1234,) * 3), (COLOUR_ALPHA, (0x1234,) * 3 + (65535,))]
)
def test_other_pngs_of_16_bits_lose_their_low_byte(tmp_path: Path, kind: int, row: tuple[int, ...]) -> None:
    raw_png(tmp_path / "in" / "a" / "1.png", np.array([[row]]), 16, kind)
    assert grey(tmp_path / "in") == [0x12]


def test_numbers_without_a_stated_black_and_white_are_set_aside(tmp_path: Path) -> None:
    for name, values in {"I": np.int32, "F": np.float32}.items():
        save(tmp_path / name / "a" / "1.tif", Image.fromarray(RAMP.astype(values)))
        for channels in (1, 3):
            assert re.match(f"mode {name} .*save it as 8-bit grey", reason(tmp_path / name, channels=channels))
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    4", "NAXIS2  =                    1", "END"]
    fits = tmp_path / "fits" / "a" / "1.fits"
    fits.parent.mkdir(parents=True)
    fits.write_bytes("".join(card.ljust(80) for card in cards).ljust(2880).encode() + RAMP.astype(">i2").tobytes())
    assert reason(tmp_path / "fits").startswith("mode I;16 of FITS does not say which values are black and white")


def test_an_unknown_image_mode_is_set_aside_by_name() -> None:
    class Tomorrow(Image.Image):
        mode = "OKLAB"

    image = Tomorrow()
    image.im, image._size = Image.new("L", (2, 2)).im, (2, 2)
    with pytest.raises(MisfitError, match="mode OKLAB has no one right conversion"):
        converted(image, 3, "white")


def test_every_mode_of_this_pillow_was_decided_on() -> None:
    assert {*PLAIN, *ALPHA, *FULL_RANGE, *REFUSED} == set(Image.MODES)


def test_bits_greys_and_colours_are_what_they_were(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        image = Image.fromarray(pixels).convert(mode)
        save(tmp_path / mode / "a" / "1.tif", image)
        for channels, target in ((1, "L"), (3, "RGB")):
            expected = np.asarray(image.convert(target)).reshape(4, 6, channels).transpose(2, 0, 1)
            np.testing.assert_array_equal(load(tmp_path / mode, channels=channels).images[0], expected)


def test_cmyk_is_counted_since_no_profile_was_applied(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a" / "1.jpg", Image.new("CMYK", (4, 4), (0, 255, 255, 0)))
    assert load(tmp_path / "in").notes == {"CMYK is converted without a colour profile": 1}


def test_lab_is_converted_to_srgb(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a" / "1.tif", Image.merge("LAB", [Image.new("L", (1, 1), v) for v in (137, 128, 128)]))
    [value] = grey(tmp_path / "in")
    assert abs(value - 128) <= 1  # L* = 53.7


def test_hsv_and_padded_rgb_are_colours_of_one_meaning() -> None:
    for image in (Image.new("HSV", (1, 1), (0, 255, 255)), Image.new("RGBX", (1, 1), (255, 0, 0, 7))):
        assert converted(image, 3, "white")[0].getpixel((0, 0)) == (255, 0, 0)


# What is under alpha 0 is red here, which must not surface; half of black over white is grey.
SEE_THROUGH: dict[str, Callable[[Path], Any]] = {
    "rgba": lambda file: save(
        file, Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 128], [9, 9, 9, 255]]], np.uint8))
    ),
    "la": lambda file: raw_png(file, np.array([[[77, 0], [0, 128], [9, 255]]]), 8, GREY_ALPHA),
    "palette with alpha": lambda file: raw_png(
        file, np.array([[0, 1, 2]]), 8, PALETTE, bytes([0, 128, 255]), bytes([255, 0, 0, 0, 0, 0, 9, 9, 9])
    ),
}


@pytest.mark.parametrize("made", SEE_THROUGH.values(), ids=SEE_THROUGH)
def test_transparent_pixels_lie_over_the_background(tmp_path: Path, made: Callable[[Path], Any]) -> None:
    made(tmp_path / "in" / "a" / "1.png")
    assert grey(tmp_path / "in") == [255, 127, 9]
    assert grey(tmp_path / "in", background="black") == [0, 0, 9]
    assert colours(tmp_path / "in", background="#00ff80")[0] == (0, 255, 128)
    assert load(tmp_path / "in").notes == {"transparent pixels lie over data.background = 'white'": 1}


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_one_transparent_entry_of_a_palette_lies_over_the_background(tmp_path: Path, ending: str) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 9, 9, 9])
    save(tmp_path / "in" / "a" / f"1.{ending}", image, transparency=0)
    assert grey(tmp_path / "in") == [255, 9]


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_alpha_of_the_rarer_kinds_is_composited_alike(mode: str) -> None:
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 128], [0, 0, 0, 255]]], np.uint8))
    image = image.convert({"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}[mode])
    if mode == "PA":
        alpha, image = image.getchannel("A"), Image.new("P", (3, 1)).convert("PA")
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    assert np.asarray(converted(image, 1, "white")[0]).tolist() == [[255, 127, 0]]


@pytest.mark.parametrize(
    ("bits", "kind", "row", "transparent", "expected"),
    [
        (1, GREY, [0, 1], struct.pack(">H", 0), [255, 255]),
        (2, GREY, [0, 1, 2, 3], struct.pack(">H", 2), [0, 85, 255, 255]),
        (4, GREY, [0, 1, 2, 3], struct.pack(">H", 2), [0, 17, 255, 51]),
        (8, GREY, [7, 8], struct.pack(">H", 7), [255, 8]),
        (8, GREY, [7, 8], struct.pack(">H", 0x0307), [255, 8]),
        (16, GREY, [300, 30000], struct.pack(">H", 300), [255, 117]),
        (8, COLOUR, [[7, 7, 7], [8, 8, 8]], struct.pack(">3H", 7, 7, 7), [255, 8]),
    ],
)
def test_the_transparent_value_of_a_png_lies_over_the_background(
    tmp_path: Path, bits: int, kind: int, row: Any, transparent: bytes, expected: list[int]
) -> None:
    raw_png(tmp_path / "in" / "a" / "1.png", np.array([row]), bits, kind, transparent)
    assert grey(tmp_path / "in") == expected


def test_a_transparent_colour_of_16_bits_is_set_aside(tmp_path: Path) -> None:
    raw_png(tmp_path / "in" / "a" / "1.png", np.array([[[300] * 3]]), 16, COLOUR, struct.pack(">3H", 300, 300, 300))
    assert reason(tmp_path / "in").startswith("16-bit colour with a transparent one")


def test_opaque_alpha_changes_nothing_and_is_not_counted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    save(tmp_path / "in" / "a" / "1.png", Image.fromarray(pixels))
    loaded = load(tmp_path / "in")
    np.testing.assert_array_equal(loaded.images[0], pixels[..., :3].transpose(2, 0, 1))
    assert loaded.notes == {}


def test_what_is_under_alpha_0_does_not_surface_when_images_are_resized(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 255  # red everywhere, seen nowhere
    save(tmp_path / "in" / "a" / "1.png", Image.fromarray(pixels))
    assert (load(tmp_path / "in", image_size=4).images == 255).all()


@pytest.mark.parametrize("ending", ["gif", "png", "tif", "webp", "mpo"])
def test_the_first_of_several_frames_is_taken_and_counted(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("L", (4, 4), value).convert("RGB") for value in (50, 200)]
    options = {"lossless": True} if ending == "webp" else {}
    save(tmp_path / "in" / "a" / f"1.{ending}", frames[0], save_all=True, append_images=frames[1:], **options)
    picture(tmp_path / "in" / "a" / "2.png")
    loaded = load(tmp_path / "in")
    assert (loaded.images[0] == 50).all()
    assert loaded.notes == {"only the first of several frames is taken": 1}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path: Path, ending: str, orientation: int) -> None:
    dark = np.full((16, 32), 255, np.uint8)
    dark[:8, :8] = 0  # the upper left corner of the upright image
    turned = {  # what a camera stores of it
        1: dark, 2: dark[:, ::-1], 3: dark[::-1, ::-1], 4: dark[::-1], 5: dark.T,
        6: dark.T[::-1], 7: dark.T[::-1, ::-1], 8: dark.T[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if ending == "webp" else {}
    image = Image.fromarray(np.ascontiguousarray(turned)).convert("RGB")
    save(tmp_path / "in" / "a" / f"1.{ending}", image, exif=exif, **options)
    found = load(tmp_path / "in").images  # without image_size, so that the shape too must be upright
    assert found.shape == (1, 3, 16, 32)
    np.testing.assert_allclose(found[0, 0], dark, atol=3)


def test_garbage_for_exif_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a" / "1.jpg", Image.new("L", (8, 8), 60), exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert grey(tmp_path / "in") == [60] * 8


def test_images_of_many_pixels_are_taken_up_to_the_limit_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(pixels, "MOST_PIXELS", 32)
    for side in (4, 5, 6):  # half of the limit, below it, above it
        picture(tmp_path / "in" / "a" / f"{side}.png", size=side).rename(tmp_path / "in" / "a" / str(side))
    loaded = load(tmp_path / "in", image_size=4)
    assert loaded.rejected == {2: "more than 32 pixels, the most that are read: make it smaller"}
    assert [str(warning.message) for warning in recwarn] == []


def test_the_limit_of_pixels_is_the_one_that_is_documented(tmp_path: Path) -> None:
    documented = Path(__file__).parents[3].joinpath("docs", "data.md").read_text()
    assert f"more than {pixels.MOST_PIXELS:,} pixels" in documented
    before = Image.MAX_IMAGE_PIXELS
    file = raw_png(tmp_path / "in" / "a" / "1.png", np.zeros((1, 1), np.uint8), 8, GREY)
    size = pixels.MOST_PIXELS.to_bytes(4, "big")
    head = b"IHDR" + size + (2).to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    raw = file.read_bytes()
    file.write_bytes(raw[:12] + head + zlib.crc32(head).to_bytes(4, "big") + raw[33:])
    assert reason(tmp_path / "in", image_size=4).startswith("more than 178,956,970 pixels")
    assert before == Image.MAX_IMAGE_PIXELS
