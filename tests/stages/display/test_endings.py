"""The ending of a file name fits the contents, or the name is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfm.stages.display.endings import JSON, PICTURE, check_ending, write_picture
from nfm.stages.display.pictures import FALSE_COLOURS, save_grid

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@pytest.mark.parametrize("ending", [*PICTURE, ".PNG", ".JPG"])
def test_a_picture_is_of_the_format_that_its_ending_says(tmp_path: Path, ending: str) -> None:
    write_picture(tmp_path / f"a{ending}", Image.new("RGB", (40, 30), "#2566d8"))
    with Image.open(tmp_path / f"a{ending}") as found:
        assert found.format == FORMATS[ending.lower()]
        assert found.size == (40, 30)
        np.testing.assert_allclose(np.asarray(found.convert("RGB"))[3, 3], (0x25, 0x66, 0xD8), atol=3)


@pytest.mark.parametrize("name", ["g", "g.xyz", "g.pdf", "g.png.gz", ".png", "g.", "g.jpg "])
def test_another_ending_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.jpg, \.jpeg or \.webp"):
        write_picture(tmp_path / name, Image.new("RGB", (4, 4)))
    assert not list(tmp_path.iterdir())


def test_the_message_names_the_file_and_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"out\.txt: its ending is \.txt, .* name a file in \.json$"):
        check_ending(Path("out.txt"), JSON)


@pytest.mark.parametrize("ending", PICTURE)
def test_false_colours_are_told_in_every_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"latents{ending}"
    save_grid(path, np.random.default_rng(0).normal(size=(4, 4, 6, 6)), image_dtype="float16")
    with Image.open(path) as found:
        assert found.info.get("Description") == FALSE_COLOURS or found.getexif()[0x010E] == FALSE_COLOURS
