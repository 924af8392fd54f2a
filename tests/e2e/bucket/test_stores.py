"""What `nfm pairs` and `nfm teacher` add to artifacts that are in a bucket."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import torch

from nfm.storage.files.paths import as_path
from nfm.storage.files.small_files import read_bytes
from nfm.storage.ledger.row_fields import RowField
from tests.support.authors_tarflow import Model, random

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.support.buckets.in_bucket import Bucket


def test_a_card_and_a_field_are_added_to_a_store_there(made: Lab, lab: Lab, there: Bucket) -> None:
    there.upload(made, "data", "pairs")
    name = made.name("pairs")
    told = there.nfm("pairs", "card", name)
    assert told.stdout == f"{there.url}/{name}/README.md\n"
    assert told.stderr == ""
    shutil.copytree(made.only("pairs").path, lab.folder / "copy")
    lab.nfm("pairs", "card", "copy")
    assert read_bytes(as_path(f"{there.url}/{name}/README.md")) == (lab.folder / "copy/README.md").read_bytes()
    values = np.arange(256 * 3, dtype="float32").reshape(256, 3)
    np.save(there.lab.folder / "words.npy", values)
    assert "256 rows" in there.nfm("pairs", "add-field", name, "words", "words.npy").stdout
    rows = np.array([5, 255, 0])
    np.testing.assert_array_equal(RowField.open(f"{there.url}/{name}", "words").gather(rows), values[rows])


def test_a_teacher_is_imported_there_from_a_file_of_one_machine(made: Lab, there: Bucket) -> None:
    there.upload(made, "data")
    torch.manual_seed(0)
    flow = random(Model(1, 8, 2, 64, 2, 1, classes=10))
    file = "digits_model_2_64_2_1_0.15.pth"
    torch.save(flow.state_dict(), there.lab.folder / file)
    told = there.nfm("teacher", "import", file, "-c", "tiny.toml")
    (artifact,) = there.all("teacher")
    assert told.stdout == f"{artifact.path}\n"
    assert artifact.manifest()["imported"]["file"] == file
    again = there.on("two").run(
        "pairs", "pairs.report=false", "pairs.draws=1", f'teacher.artifact="teacher/{artifact.path.name}"'
    )
    assert "pairs: done" in again.stderr
