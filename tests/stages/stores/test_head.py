"""`nfm pairs head`: the picture and the table show the records that the store holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from nfm.stages.base import Unfit
from nfm.stages.display.pictures import FALSE_COLOURS, as_pixels, false_colours, in_false_colours, save_grid
from nfm.stages.stores import head
from nfm.storage import PairStore, PairWriter
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec

if TYPE_CHECKING:
    from tests.conftest import Lab


def lines_after(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    table = text.split(heading)[1].split("\n\n")[0].splitlines()[2:]
    return [line.split() for line in table]


def test_the_first_pairs_and_the_worst_nll_in_order(made: Lab, tmp_path: Path) -> None:
    store = PairStore.open(made.only("pairs").path)
    text = head.draw(store.root, 5, 1, made.only("teacher").path, tmp_path / "head.png")
    index = store.index(["key", "label", "nll"], draw=1).to_pydict()
    first = lines_after(text, "the first 5 pairs of draw 1")
    assert [row[0] for row in first] == index["key"][:5]
    assert [int(row[1]) for row in first] == index["label"][:5]
    worst = lines_after(text, "the 5 worst nll of draw 1")
    by_nll = sorted(zip(index["nll"], index["key"]), reverse=True)[:5]
    assert [row[0] for row in worst] == [key for _, key in by_nll]
    assert [float(row[3]) for row in worst] == pytest.approx([nll for nll, _ in by_nll], abs=1e-4)
    picture = np.asarray(Image.open(tmp_path / "head.png").convert("RGB"))
    assert picture.shape[0] > 500
    assert picture.std() > 20


def test_the_teacher_decodes_its_noise_to_image_plus_eta_eps(made: Lab, tmp_path: Path) -> None:
    text = head.draw(made.only("pairs").path, 4, 0, made.only("teacher").path, tmp_path / "head.png")
    errors = [float(row[-1]) for row in lines_after(text, "the first 4 pairs of draw 0")]
    assert all(0.1 < error < 0.2 for error in errors)  # eta is 0.15
    assert "eta eps' alone gives 0.15" in text


def test_without_a_teacher_nothing_is_decoded(made: Lab, tmp_path: Path) -> None:
    store = made.only("pairs", "independent").path
    assert head.teacher_of(store) is None
    text = head.draw(store, 3, 0, None, tmp_path / "head.png")
    assert [row[-1] for row in lines_after(text, "the first 3 pairs of draw 0")] == ["-"] * 3
    assert "worst nll" not in text
    with pytest.raises(Unfit, match="has no teacher"):
        head.draw(store, 3, 0, made.only("teacher").path, tmp_path / "head.png")


@pytest.mark.parametrize(("shape", "count"), [((4, 6, 6), 1), ((2, 3, 5), 20)])
def test_latents_are_shown_in_false_colours(tmp_path: Path, shape: tuple[int, int, int], count: int) -> None:
    fields = pair_fields(shape, "int8", "float16", label=False)
    spec = StoreSpec(rows=12, rows_per_shard=12, fields=fields, codec="int8", coupling="independent", source="ab" * 32)
    noise = np.random.default_rng(0).normal(size=(12, *shape)).astype(np.float32)
    with PairWriter(tmp_path / "store", spec) as writer:
        writer.write(image=np.clip(noise / 4, -1, 1).astype(np.float16), noise=noise)
    text = head.draw(tmp_path / "store", count, 0, None, tmp_path / "head.png")
    assert len(lines_after(text, f"the first {min(count, 12)} pairs of draw 0")) == min(count, 12)
    assert Image.open(tmp_path / "head.png").width > 800


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_pixels_of_any_number_of_channels_are_drawn(tmp_path: Path, channels: int) -> None:
    shape = (channels, 3, 5)
    spec = StoreSpec(
        rows=4, rows_per_shard=4, fields=pair_fields(shape, "float32", "uint8", label=False), codec="float32",
        coupling="independent", source="ab" * 32,
    )  # fmt: skip
    random = np.random.default_rng(0)
    image, noise = random.integers(0, 256, (4, *shape), np.uint8), random.normal(size=(4, *shape)).astype(np.float32)
    with PairWriter(tmp_path / "store", spec) as writer:
        writer.write(image=image, noise=noise)
    head.draw(tmp_path / "store", 4, 0, None, tmp_path / "head.png")
    assert Image.open(tmp_path / "head.png").width > 800
    shown = as_pixels(image.astype(np.float32) / 127.5 - 1, "uint8")
    assert shown.shape[1] == (3 if channels >= 3 else 1)  # never a fourth, which would be drawn as alpha
    assert in_false_colours("uint8", channels) == (channels not in (1, 3))


def test_false_colours_use_the_whole_range_and_say_so(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(50, 4, 6, 6)) * np.array([9, 1, 0.1, 1]).reshape(4, 1, 1)
    shown = false_colours(latents)
    assert shown.shape == (50, 3, 6, 6)
    for channel in range(3):
        assert (shown[:, channel] == 0).mean() == pytest.approx(0.01, abs=0.005)
        assert (shown[:, channel] == 255).mean() == pytest.approx(0.01, abs=0.005)
    assert false_colours(np.ones((3, 2, 4, 4))).shape == (3, 1, 4, 4)
    save_grid(tmp_path / "latents.png", latents.astype(np.float32), image_dtype="float16")
    assert Image.open(tmp_path / "latents.png").text["Description"] == FALSE_COLOURS
    save_grid(tmp_path / "pixels.png", np.zeros((2, 3, 4, 4), np.float32))
    assert not Image.open(tmp_path / "pixels.png").text
