"""Latents without labels, and pixels without labels, through the whole pipeline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from nfm.stages.display.pictures import FALSE_COLOURS
from nfm.storage import ImageDataset, PairStore

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Lab
    from tests.e2e.conftest import Nfm

LATENTS = ("data.image_scale=0.18215", "data.image_decoder=some/vae", "data.max_rejected=0.01")


def write_npz(path: Path, latents: bool) -> np.ndarray:
    """160 records of four kinds without labels; the latents have a NaN in record 7."""
    rng = np.random.default_rng(0)
    shape = (4, 8, 8) if latents else (3, 8, 8)
    values = rng.normal(size=(4, *shape))[rng.integers(0, 4, 160)] * 0.8 + rng.normal(size=(160, *shape)) * 0.6
    if latents:
        values = values.astype(np.float16)
        values[7, 0, 0, 0] = np.nan
    else:
        values = np.clip(values * 40 + 128, 0, 255).astype(np.uint8)
    np.savez(path, data=values)
    return values


@pytest.mark.parametrize(
    "latents", [pytest.param(True, id="latents"), pytest.param(False, id="pixels", marks=pytest.mark.long)]
)
def test_data_without_labels_goes_all_the_way(empty: Lab, nfm_anew: Nfm, latents: bool) -> None:
    values = write_npz(empty.folder / "data.npz", latents)
    sets = ["data.source=npz", "data.path=data.npz", "data.limit=160", *(LATENTS if latents else ())]
    sets += [
        "features.images=256",
        "teacher.images=640",
        "student.pairs=640",
        "evaluate.samples=30",
        "evaluate.nfe=[5]",
    ]
    sets += ["evaluate.speed_batches=[2]", *([] if latents else ["evaluate.baselines=[]"])]
    assert "report.html" in nfm_anew(*empty.arguments("report", *sets))

    data = empty.only("data")
    source, store = ImageDataset.open(data.path), PairStore.open(empty.only("pairs").path)
    rows = np.arange(len(store))
    stored = store.gather(1, rows)
    np.testing.assert_array_equal(stored["image"], source.images(rows))
    keys = [int(key.split("/")[1]) for key in source.keys(rows)]
    np.testing.assert_array_equal(stored["image"], values[keys])
    assert data.manifest()["metrics"]["rejected"] == int(latents)
    assert "label" not in stored
    for batch in store.batches(32):
        assert batch.image.dtype == np.float32
        assert (batch.label == -1).all()
    info = json.loads(nfm_anew("pairs", "info", store.root, "--json"))
    assert info.get("image_scale") == (0.18215 if latents else None)
    assert info.get("image_decoder") == ("some/vae" if latents else None)
    assert info["classes"] is None
    assert ("false colours" in (empty.only("report").path / "report.html").read_text()) == latents

    audited = nfm_anew("audit", "-c", "tiny.toml", *(part for text in sets for part in ("--set", text)), "--deep")
    assert "FINDING" not in audited
    nfm_anew("sample", empty.only("student").path, "-n", "4", "-o", "grid.png")
    assert Image.open(empty.folder / "grid.png").text.get("Description") == (FALSE_COLOURS if latents else None)
    nfm_anew("pairs", "head", store.root, "-n", "4")
    if latents:
        refused = nfm_anew(*empty.arguments("pairs", *sets, "pairs.flips=true"), exits=2)
        assert "a flipped latent is not the latent of the flipped image" in refused
