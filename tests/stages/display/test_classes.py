"""The rows of a grid state their classes, and every image is in a row of its own class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfm.stages.display.classes import rows_of
from nfm.stages.display.pictures import save_grid


@pytest.mark.parametrize(("classes", "count"), [(1, 5), (3, 64), (10, 64), (40, 64), (64, 64), (1000, 64), (10, 1)])
def test_every_image_is_once_in_a_row_that_names_its_class(classes: int, count: int) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(count) % classes)
    rows = rows_of(labels, count)
    assert sorted(number for row in rows for number in row.images) == list(range(count))
    for row in rows:
        first, _, last = row.title.removeprefix("class ").partition(" to ")
        assert int(first) <= labels[row.images].min() <= labels[row.images].max() <= int(last or first)


def test_rows_have_the_names_of_the_classes_where_they_are_known() -> None:
    names = ["T-shirt/top", "Trouser", "Pullover"]
    assert [row.title for row in rows_of([2, 0, 0, 2, -1, -1], 6, names=names)] == [
        "no class", "class T-shirt/top", "class Pullover",
    ]  # fmt: skip
    assert [row.title for row in rows_of([0, 1, 2], 3, columns=2, names=names)] == [
        "class T-shirt/top to Trouser", "class Pullover",
    ]  # fmt: skip


@pytest.mark.parametrize("labels", [None, np.full(10, -1)])
def test_images_without_classes_keep_their_order_and_have_no_titles(labels: np.ndarray | None) -> None:
    assert rows_of(labels, 10) == [("", list(range(8))), ("", [8, 9])]


@pytest.mark.parametrize("size", [3, 8, 28])
def test_titles_stand_left_of_the_images_inside_the_picture(tmp_path: Path, size: int) -> None:
    images = np.zeros((6, 1, size, size), np.uint8)
    save_grid(tmp_path / "bare.png", images)
    save_grid(tmp_path / "told.png", images, labels=np.arange(6) % 2)
    bare, told = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("bare.png", "told.png"))
    margin = int((told[told.shape[0] // 4] < 1).argmax())  # of the first row, where the black images begin
    assert margin > 30
    words = told[:, : margin - 2] < 200
    assert words[: len(told) // 2].any()
    assert words[len(told) // 2 :].any()
    assert not words[:, 0].any()  # nothing is cut
    assert not words[0].any()
    assert bare.shape[1] > 0
