"""The card of a store: a README that hubs read, whatever names and licences say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nfm.stages.stores import card
from nfm.stages.stores.info import info
from nfm.storage import PairStore, PairWriter, StorageError, StoreSpec
from nfm.storage.format import philox
from nfm.storage.format.fields import pair_fields
from nfm.storage.verify import verify
from tests.support.lab import Lab


def external(root: Path, **how: Any) -> Path:
    spec = dataclasses.replace(StoreSpec.external(rows=4, image_shape=(1, 2, 2), origin="a simulation"), **how)
    with PairWriter(root, spec) as writer:
        writer.write(image=np.zeros((4, 1, 2, 2), np.uint8), noise=np.random.default_rng(0).normal(size=(4, 1, 2, 2)))
    return root


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_the_store_is_and_stands_in_a_store_that_is_clean(lab: Lab) -> None:
    store = lab.artifacts / lab.name("pairs")
    lab.nfm("pairs", "card", lab.name("pairs"))
    text = (store / "README.md").read_text()
    assert header(text) == {
        "pretty_name": "nfm pairs of digits",
        "license": "other",
        "license_name": "CC BY 4.0",
        "size_categories": ["n<1K"],
        "tags": ["flow-matching", "coupling", "noise-image-pairs", "nfm-pairs", "webdataset"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "shards/*.tar"}]}],
    }
    assert PairStore.open(store).spec.teacher in text
    assert "two-sample AUC" in text
    assert not verify(store)
    lab.nfm("pairs", "card", lab.name("pairs"))  # its own card is replaced


def test_the_lines_of_a_card_read_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = card.write(external(tmp_path / "FOLDER", rows=4)).read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("batch_size=256", "batch_size=2")
    exec(compile(code, "card", "exec"), {})
    assert "all -1: this store has no labels" in text


def test_images_that_a_student_made_are_not_passed_off_as_the_data(tmp_path: Path) -> None:
    how = {"solver": "euler", "nfe": 2, "guidance": 1.0}
    root = external(tmp_path / "store", coupling="reflow", student="ab" * 32, flips=True, coupling_options=how)
    text = card.card(PairStore.open(root), {"name": "digits"})
    assert header(text)["pretty_name"] == "reflow pairs of a student of digits"
    for line in (
        "| how | solver euler, nfe 2, guidance 1.0 |",
        "| images are | samples of the student, none of the data |",
        "| flips | some of the images are mirrored |",
        "| data that the student learnt | digits |",
        f"| student | {'ab' * 32} |",
    ):
        assert line in text.splitlines()
    shown = info(root)
    assert (shown["student"], shown["coupling solver"], shown["coupling nfe"]) == ("ab" * 32, "euler", 2)
    assert "potential" not in shown


def test_names_and_licences_of_somebody_else_break_neither_header_nor_table(tmp_path: Path) -> None:
    said = {"name": 'a: "b"\n---\n| c', "licence": "x\n- y: [z", "origin": "<script>|"}
    text = card.card(PairStore.open(external(tmp_path / "store")), said)
    assert header(text)["license_name"] == said["licence"]
    assert "<script>" not in text
    row = next(line for line in text.splitlines() if line.startswith("| data |"))
    assert row.replace("\\|", "").count("|") == 3


def test_a_readme_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    root = external(tmp_path / "store")
    (root / "README.md").write_text("my own words")
    with pytest.raises(StorageError, match=r"README\.md: somebody's own file.*-o"):
        card.write(root)
    assert (root / "README.md").read_text() == "my own words"


def test_zarr_shows_no_samples_to_the_viewer(tmp_path: Path) -> None:
    text = card.card(PairStore.open(external(tmp_path / "store", layout="zarr", rows_per_block=4, rows_per_shard=4)))
    assert "configs" not in header(text)
    assert "Zarr opens the folder" in text


def test_a_card_says_that_the_shards_of_codec_seeded_hold_no_noise(tmp_path: Path) -> None:
    spec = StoreSpec(
        rows=4, rows_per_shard=4, fields=pair_fields((1, 2, 2), "seeded"), coupling="independent", source="ab" * 32,
        codec="seeded", classes=2,
    )  # fmt: skip
    slots = np.arange(4)
    noise = philox.normals(0, 0, slots, 4).reshape(-1, 1, 2, 2)
    with PairWriter(tmp_path / "store", spec) as writer:
        writer.write(image=np.zeros((4, 1, 2, 2), np.uint8), noise=noise, label=slots % 2)
    text = card.card(PairStore.open(tmp_path / "store"))
    assert "hold no noise" in text
    assert "--codec float16" in text
    assert "hold no noise" not in card.card(PairStore.open(external(tmp_path / "other")))
