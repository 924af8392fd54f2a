"""Settings of [data] that do not fit the data are wrong use, and what cannot be used is told with its true reasons."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfm.pipeline import builder, runner
from nfm.pipeline.config import load
from nfm.stages.base import StageError, Unfit
from nfm.stages.data.config import DataConfig
from tests.stages.data.sources.test_parquet import table, write
from tests.stages.data.sources.test_webdataset import make, pack, picture
from tests.support.recorder import Recorder

ROOT = Path(__file__).resolve().parents[3]
SETTING = re.compile(rf"data\.({'|'.join(DataConfig.model_fields)})\b|data\.\0")
# The images are at fault, and the setting only says how many such images are too many.
NO_SETTING = {"stages/data/stage.py: _set_aside"}


def failures(file: Path) -> Iterator[tuple[str, str]]:
    """(function, text of the message) of every `raise StageError` in a file; a zero stands for what is filled in."""
    for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and ast.unparse(node.exc.func) == "StageError"
            ):
                texts = [one.value for one in ast.walk(node.exc) if isinstance(one, ast.Constant)]
                yield function.name, "\0".join(map(str, texts))


def test_a_message_that_names_a_setting_is_of_wrong_use() -> None:
    """So that the command ends with 2, and the artifact that was begun is gone."""
    found = {
        f"{file.relative_to(ROOT)}: {function}"
        for file in (ROOT / "stages/data").rglob("*.py")
        for function, text in failures(file)
        if SETTING.search(text)
    }
    assert found == NO_SETTING


def npz(folder: Path) -> Path:
    np.savez(folder / "in.npz", data=np.zeros((6, 1, 4, 4), np.uint8), labels=np.arange(6) % 2)
    return folder / "in.npz"


def tar(folder: Path) -> Path:
    members: dict[str, bytes] = {}
    for row in range(6):
        about = {"kind": row % 2, "title": "t"}
        members |= {f"{row}.png": picture(row), f"{row}.json": json.dumps(about).encode()}
    return pack(folder / "in.tar", members)


def parquet(folder: Path) -> Path:
    return write(folder / "in.parquet", table())


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "npz images": (npz, {"images": "x"}, "no array 'x' for the images"),
    "npz labels": (npz, {"labels": "x"}, "no array 'x', which data.labels names"),
    "npz classes of no labels": (npz, {"labels": "", "classes": ["a", "b"]}, "data.classes is of labels"),
    "tar images": (tar, {"images": "gif"}, "data.images = 'gif': no sample of"),
    "tar labels": (tar, {"labels": "klass"}, "data.labels = 'klass': no .json of"),
    "tar captions": (tar, {"captions": "caption"}, "has that field; there are kind, title"),
    "parquet images": (parquet, {"images": "x"}, "no column 'x', which data.images names"),
    "parquet labels": (parquet, {"labels": "x"}, "no column 'x', which data.labels names"),
    "parquet captions": (parquet, {"captions": "x"}, "no column 'x', which data.captions names"),
    "parquet classes": (parquet, {"classes": ["a", "b"]}, "its schema names 3 classes, data.classes 2"),
}
SOURCE_OF = {npz: "npz", tar: "webdataset", parquet: "parquet"}


@pytest.mark.parametrize("what", WRONG)
def test_a_setting_that_names_nothing_leaves_no_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    made_by, settings, says = WRONG[what]
    root = tmp_path / "artifacts"
    monkeypatch.setenv("NFM_ARTIFACTS", str(root))
    config = tmp_path / "config.toml"
    config.write_text(f'[data]\nsource = "{SOURCE_OF[made_by]}"\npath = "{made_by(tmp_path)}"\n[teacher]\n')
    sets = [f"data.{field}={json.dumps(value)}" for field, value in settings.items()]
    with pytest.raises(Unfit, match=re.escape(says)):
        runner.run(builder.build(load(config, sets)), "data")
    assert not list(root.glob("data/*"))


def test_a_tar_without_a_json_says_so_of_a_field_of_it(tmp_path: Path) -> None:
    file = pack(tmp_path / "in.tar", {"a.png": picture(0), "b.png": picture(1)})
    with pytest.raises(Unfit, match=r"data\.labels = 'kind' names a field of the \.json members, and .* has none"):
        make(tmp_path / "out", file, labels="kind")


def test_where_no_image_can_be_read_the_reasons_are_counted_and_kept(tmp_path: Path) -> None:
    members = {f"{row:03d}.png": picture(1)[:50] if row % 3 else b"no image" for row in range(600)}
    file = pack(tmp_path / "in.tar", members)
    with pytest.raises(
        StageError, match=r"600 of 600 images cannot be used.*: 200 x not an image.*; 400 x unreadable: image"
    ):
        make(tmp_path / "out", file)
    assert pq.read_table(tmp_path / "out" / "rejected.parquet").num_rows == 600


def test_one_readable_image_among_many_gives_the_size(tmp_path: Path) -> None:
    """Also where it is none of those whose shape is looked at first."""
    members = {f"{row:03d}.png": b"no image" for row in range(600)} | {"301.png": picture(7)}
    result = make(tmp_path / "out", pack(tmp_path / "in.tar", members), max_rejected=1.0, heldout=0)
    assert (result.metrics["images"], result.metrics["rejected"]) == (1, 599)


def test_rows_whose_labels_are_all_outside_the_classes_are_told_as_such(tmp_path: Path) -> None:
    images = pa.array([{"bytes": picture(0), "path": None}] * 4, table().schema.field("image").type)
    what = pa.table({"image": images, "label": pa.array([7, 8, 7, 7])})
    file = write(tmp_path / "in.parquet", what)
    with pytest.raises(StageError, match=r"4 of 4 images .*: 3 x label 7 is outside the 2 classes.*; 1 x label 8"):
        make(tmp_path / "out", file, source="parquet", classes=["a", "b"])


def test_json_of_others_is_read_by_the_one_reader_that_drops_nothing() -> None:
    """Python's own reader takes the last of two values of a key."""
    files = [path for path in (ROOT / "stages/data").rglob("*.py") if "json.load" in path.read_text(encoding="utf-8")]
    assert files == []


@pytest.mark.parametrize("field", ["heldout", "max_rejected"])
def test_a_count_where_a_share_is_meant_is_refused_as_such(field: str) -> None:
    with pytest.raises(ValueError, match=r"a share of all images, from 0 to 1, no count: 0\.05 is one in twenty"):
        DataConfig.model_validate({field: 60})
    all_of_them = "reads like a count: write 1.0 for all" if field == "max_rejected" else "leaves none to train on"
    with pytest.raises(ValueError, match=f"1 is all images, .*{all_of_them}"):
        DataConfig.model_validate({field: 1})


def test_all_images_held_out_is_refused_as_that() -> None:
    with pytest.raises(ValueError, match="1 is all images, which leaves none to train on"):
        DataConfig(heldout=1.0)


def test_all_images_may_be_set_aside_where_the_share_says_so() -> None:
    assert DataConfig(max_rejected=1.0).max_rejected == 1


def test_values_beyond_float16_are_told_and_nothing_is_said_of_their_range(tmp_path: Path) -> None:
    report = Recorder()
    np.savez(tmp_path / "in.npz", data=np.full((6, 1, 4, 4), np.inf, np.float16))
    with pytest.raises(StageError, match=r"6 x 16 of 16 values are not finite; float16 ends at 65,504: save float32"):
        make(tmp_path / "out", tmp_path / "in.npz", report, source="npz")
    assert report.said == []


def test_the_range_that_is_told_is_that_of_the_images_which_are_kept(tmp_path: Path) -> None:
    report, data = Recorder(), np.full((6, 1, 4, 4), 2, np.float32)
    data[0, 0, 0, 0] = np.nan
    np.savez(tmp_path / "in.npz", data=data)
    make(tmp_path / "out", tmp_path / "in.npz", report, source="npz", max_rejected=0.5)
    assert any("float32 from 2 to 2, root mean square 2," in line for line in report.said)


def test_the_remedy_for_labels_that_are_fractions_fits_their_values(tmp_path: Path) -> None:
    for labels, says in (([0, 1.5, 2], "1.5 in row 1 is no class"), ([0, 1.0, 2], r"save labels\.astype\(np\.int64\)")):
        np.savez(tmp_path / "in.npz", data=np.zeros((3, 1, 4, 4), np.uint8), labels=np.array(labels))
        with pytest.raises(StageError, match=says):
            make(tmp_path / says[:3], tmp_path / "in.npz", source="npz")


def test_a_row_with_several_images_is_refused_as_such(tmp_path: Path) -> None:
    several = pa.array([[picture(0), picture(1)]] * 3, pa.list_(pa.binary()))
    file = write(tmp_path / "in.parquet", pa.table({"pixels": several}))
    with pytest.raises(StageError, match=r"no column of images; it holds pixels \(.*\): save the bytes of encoded"):
        make(tmp_path / "out", file, source="parquet")
    with pytest.raises(StageError, match=r"column 'pixels' is .*: several images in a row: save one a row"):
        make(tmp_path / "named", file, source="parquet", images="pixels")
