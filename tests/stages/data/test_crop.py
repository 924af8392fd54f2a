"""data.crop = "adm" gives the pixels that ADM's published preprocessing gives, and the default stays what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from nfm.stages.base import StageError, Unfit
from nfm.stages.data.config import DataConfig
from nfm.stages.data.sources import ImageFolder
from nfm.stages.data.stage import open_source
from tests.support.recorder import Recorder

SIZES = [(64, 64), (65, 40), (40, 65), (31, 32), (16, 90), (17, 17), (12, 9), (200, 130)]  # width, height


def published(image: Image.Image, side: int) -> np.ndarray:
    """ADM's formula: halve by boxes while the shorter side is 2 x side or more, resize it to side, cut the centre."""
    width, height = image.size
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = side / min(width, height)
    pixels = np.array(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side].transpose(2, 0, 1)


def photo(path: Path, size: tuple[int, int], seed: int = 0) -> Image.Image:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def test_adms_crop_is_the_published_one_pixel_for_pixel(tmp_path: Path) -> None:
    images = [photo(tmp_path / "in" / "a" / f"{n}.png", size, n) for n, size in enumerate(SIZES)]
    source, report = ImageFolder(str(tmp_path / "in"), image_size=16, crop="adm"), Recorder()
    loaded = source.load(np.arange(len(SIZES)), tmp_path, report)
    assert loaded.rejected == {}
    for found, image in zip(loaded.images, images):
        np.testing.assert_array_equal(found, published(image, 16))
    assert loaded.notes == {"smaller than data.image_size and made larger, as ADM does": 1}
    ours = ImageFolder(str(tmp_path / "in"), image_size=16).load(np.arange(1), tmp_path, report).images
    assert (ours[0] != published(images[0], 16)).any()  # 64 to 16: the default has no boxes


def test_a_thin_line_is_set_aside_before_it_fills_the_memory(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a" / "1.png", (60_000, 1))
    loaded = ImageFolder(str(tmp_path / "in"), image_size=64, crop="adm").load(np.arange(1), tmp_path, Recorder())
    assert loaded.rejected == {0: '60000x1 pixels, too long and narrow for data.crop = "adm"'}


def test_a_crop_needs_a_size_and_a_source_of_image_files(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a" / "1.png", (8, 8))
    with pytest.raises(Unfit, match=r'data\.crop = "adm" cuts to data\.image_size, which is not set'):
        ImageFolder(str(tmp_path / "in"), crop="adm")
    with pytest.raises(StageError, match=r'data\.crop = \'adm\': source "digits" does not cut images'):
        open_source(DataConfig(crop="adm"))
    with pytest.raises(ValidationError, match="crop"):
        DataConfig.model_validate({"crop": "ADM"})
    assert "crop" not in DataConfig().semantic()  # fingerprints of before stay
