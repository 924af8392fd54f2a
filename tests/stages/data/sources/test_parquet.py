"""Parquet files as Hugging Face's image data sets have them: what is read, set aside by name, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfm.stages.base import StageError, Unfit
from nfm.stages.data.config import DataConfig
from nfm.stages.data.sources import Parquet
from nfm.stages.data.sources import parquet as module
from nfm.stages.data.stage import source_identity
from nfm.storage import ImageDataset
from nfm.storage.errors import WrongUse
from tests.stages.data.sources.test_many_in_one import put
from tests.stages.data.sources.test_webdataset import SIDE, make, picture, read
from tests.support.buckets.s3server import S3, bucket, s3, s3_server  # noqa: F401  fixtures
from tests.support.recorder import Recorder

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = ["cat", "dog", "ice cream"]


def described(names: list[str] | None = CLASSES, label: str = "label") -> dict[str, str]:
    """The schema's metadata as `datasets` writes it."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names is not None:
        features[label] = {"names": names, "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def table(count: int = 6, start: int = 0, names: list[str] | None = CLASSES, **more: Any) -> pa.Table:
    """`count` rows as Hugging Face's data sets have them: image row is of the grey 10 row, of class row % 3."""
    rows = range(start, start + count)
    images = pa.array([{"bytes": picture(10 * row), "path": f"{row}.png"} for row in rows], IMAGE)
    columns = {"image": images, "label": pa.array([row % 3 for row in rows], pa.int64())} | more
    return pa.table(columns).replace_schema_metadata(described(names))


def write(path: Path, what: pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(what, path, **options)
    return path


def one(tmp_path: Path, what: pa.Table, **options: Any) -> Parquet:
    return Parquet(str(write(tmp_path / "in" / "a.parquet", what)), **options)


def replaced(what: pa.Table, name: str, column: Any) -> pa.Table:
    return what.set_column(what.schema.get_field_index(name), name, column)


def refused(tmp_path: Path, what: pa.Table, says: str, **options: Any) -> None:
    with pytest.raises(StageError, match=rf"a\.parquet: {says}"):
        read(one(tmp_path, what, **options), tmp_path / "s")


def values(loaded: Any) -> list[int]:
    return loaded.images[:, 0, 0, 0].tolist()


# What stock writers write


def test_a_folder_of_hugging_face_becomes_a_data_set(tmp_path: Path) -> None:
    """Several files by split, small row groups, class names in the schema."""
    root = tmp_path / "in"
    for number in range(2):
        write(root / f"train-{number:05d}-of-00002.parquet", table(5, 5 * number), row_group_size=2)
    write(root / "test-00000-of-00001.parquet", table(3, 10))
    (root / "README.md").write_text("card")
    result = make(tmp_path / "out", root, source="parquet")
    assert (result.metrics["images"], result.metrics["heldout"], result.metrics["skipped"]) == (10, 3, 1)
    found = {}
    for split in ("train", "heldout"):
        data = ImageDataset.open(tmp_path / "out", split)
        assert data.classes == CLASSES
        rows = np.arange(len(data))
        for key, label, image in zip(data.keys(rows), data.labels(rows), data.images(rows)):
            found[key] = (int(label), int(image[0, 0, 0]))
    names = [f"train-{row // 5:05d}-of-00002/{row % 5:07d}" for row in range(10)]
    names += [f"test-00000-of-00001/{row:07d}" for row in range(3)]
    assert found == {name: (row % 3, 10 * row) for row, name in enumerate(names)}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_are_images_too(tmp_path: Path, kind: pa.DataType) -> None:
    images = pa.array([picture(10 * row) for row in range(4)], kind)
    source = one(tmp_path, pa.table({"img": images, "labels": pa.array([0, 1, 0, 1], pa.int8())}))
    assert values(read(source, tmp_path / "s")) == [0, 10, 20, 30]
    assert (source.labels.tolist(), source.classes) == ([0, 1, 0, 1], ["0", "1"])


def test_any_rows_in_any_order_are_read_by_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 3)
    source = Parquet(str(write(tmp_path / "a.parquet", table(20), row_group_size=7)))
    rows = np.array([19, 3, 7, 6, 13, 14, 0])
    (tmp_path / "s").mkdir()
    assert values(source.load(rows, tmp_path / "s", Recorder())) == (10 * rows).tolist()


def test_columns_are_named_by_settings(tmp_path: Path) -> None:
    what = table(4).rename_columns(["photo", "fine"]).replace_schema_metadata(None)
    what = what.append_column("coarse", pa.array([0, 0, 1, 1])).append_column("title", pa.array(["a", None, "c", "d"]))
    source = one(tmp_path, what, images="photo", labels="coarse", captions="title")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.captions == ["a", None, "c", "d"]
    assert one(tmp_path, what, labels="").labels.tolist() == [-1] * 4  # images in the only struct of bytes


@pytest.mark.parametrize("column", [pa.array([0, 1, 1]), pa.array(["a", "b", "b"]).dictionary_encode()])
@pytest.mark.parametrize("said", [{}, described(None)])
def test_labels_under_another_name_are_never_dropped(tmp_path: Path, column: Any, said: dict[str, str]) -> None:
    what = table(3).drop(["label"]).append_column("y", column).replace_schema_metadata(said)
    refused(tmp_path, what, r"y may be the labels: set data\.labels to one, or data\.labels = \"\"")
    refused(tmp_path, what.append_column("coarse_label", column), "y, coarse_label may be the labels")
    assert one(tmp_path, what, labels="").classes == []


def test_the_index_of_pandas_and_texts_are_no_labels(tmp_path: Path) -> None:
    what = table(3).drop(["label"]).append_column("__index_level_0__", pa.array([5, 6, 7]))
    what = what.append_column("title", pa.array(["a", "b", "c"])).append_column("score", pa.array([0.5, 1.0, 2.0]))
    assert one(tmp_path, what).labels.tolist() == [-1] * 3


@pytest.mark.parametrize("kind", [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)])
def test_labels_of_any_whole_type_are_read_with_and_without_nulls(tmp_path: Path, kind: str) -> None:
    for labels in ([0, 1, 2, 1], [2, None, 0, 1]):
        column = pa.array(labels, getattr(pa, kind)())
        source = one(tmp_path, replaced(table(4, names=None), "label", column))
        assert source.labels.tolist() == [-1 if label is None else label for label in labels]


def test_captions_stay_beside_their_rows(tmp_path: Path) -> None:
    what, report = table(5, caption=pa.array([f"number {row}" for row in range(5)])), Recorder()
    write(tmp_path / "in" / "a.parquet", what)
    make(tmp_path / "without", tmp_path / "in", report, source="parquet")
    assert any("data.captions names their column, such as caption" in line for line in report.said)
    make(tmp_path / "with", tmp_path / "in", source="parquet", captions="caption")
    data = ImageDataset.open(tmp_path / "with")
    rows = np.arange(len(data))
    assert data.captions(rows) == [f"number {int(key[-7:])}" for key in data.keys(rows)]


def test_names_of_classes_come_from_the_schema_unless_the_config_names_them(tmp_path: Path) -> None:
    assert one(tmp_path, table()).classes == CLASSES
    assert one(tmp_path, table(2)).classes == CLASSES  # also those without an image
    assert one(tmp_path, table(), classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    refused(tmp_path, table(), "its schema names 3 classes, data.classes 2", classes=["a", "b"])
    other = r"its schema has these classes in another order, cat, dog, ice cream"
    refused(tmp_path, table(), other, classes=["dog", "cat", "ice cream"])
    with pytest.raises(Unfit, match=r"data\.first_label = 1: the schema of .*a\.parquet names the classes"):
        read(one(tmp_path, table(), first_label=1), tmp_path / "s")
    assert one(tmp_path, table(), first_label=0, classes=CLASSES).classes == CLASSES
    assert one(tmp_path, table(names=None)).classes == ["0", "1", "2"]
    assert one(tmp_path, table(), labels="").classes == []


# What is set aside


def test_rows_that_cannot_be_used_are_set_aside_by_name(tmp_path: Path) -> None:
    images = [{"bytes": picture(0), "path": None} for _ in range(8)]
    images[1], images[2]["bytes"], images[3]["bytes"] = None, None, b"no image"  # type: ignore[call-overload]
    images[2]["path"] = "far/2.png"  # type: ignore[call-overload]
    images[5]["bytes"] = picture(0, size=9)
    what = replaced(table(8), "image", pa.array(images, IMAGE))
    what = replaced(what, "label", pa.array([0, 1, 2, 0, None, 2, 0, 1], pa.int64()))
    source = one(tmp_path, what)
    found = {source.keys[place]: why for place, why in read(source, tmp_path / "s").rejected.items()}
    assert found == {
        "a/0000001": "its image is null",
        "a/0000002": "no bytes of the image, only the path 'far/2.png': put the bytes in with embed_external_files",
        "a/0000003": "not an image that Pillow reads",
        "a/0000004": "its label is null",
        "a/0000005": "9x9 pixels, the others 6x6: set data.image_size",
    }


def test_a_label_that_is_no_class_is_set_aside(tmp_path: Path) -> None:
    """Hugging Face's test splits without labels have -1."""
    source = one(tmp_path, replaced(table(3), "label", pa.array([0, -1, 7])))
    rejected = read(source, tmp_path / "s").rejected
    assert sorted(rejected) == [1, 2]
    assert 'data.labels = ""' in rejected[1]
    assert "first_label" not in rejected[1]  # a class of all images without a label


@pytest.mark.parametrize("labels", [[-1] * 3, [None] * 3, [-1, None, -1]])
def test_a_file_without_any_label_is_of_images_without_labels(tmp_path: Path, labels: list[int | None]) -> None:
    """A hidden test set of Hugging Face, whose schema names classes all the same."""
    report, what = Recorder(), replaced(table(3), "label", pa.array(labels, pa.int64()))
    (tmp_path / "s").mkdir()
    source = one(tmp_path, what)
    assert source.load(np.arange(3), tmp_path / "s", report).rejected == {}
    assert (source.classes, source.labels.tolist()) == ([], [-1] * 3)
    assert any("every label is -1 or null: taken as images without labels" in line for line in report.said)
    refused(tmp_path, what, r"every label is -1.*data\.classes names 3 classes: leave it out", classes=CLASSES)


# What is refused

PIXELS = pa.array([[[1, 2], [3, 4]]] * 6, pa.list_(pa.list_(pa.uint8())))


def test_columns_that_are_no_encoded_images_are_refused_with_the_remedy(tmp_path: Path) -> None:
    what = table()
    flat = pa.FixedSizeListArray.from_arrays(pa.array([0] * 24, pa.uint8()), 4)
    for column in (PIXELS, flat):
        refused(tmp_path, replaced(what, "image", column), r".*pixels as lists.*save the images as PNG bytes")
    refused(tmp_path, replaced(what, "image", pa.array(["a.png"] * 6)), ".*paths or links, not images")
    refused(tmp_path, replaced(what, "image", pa.array([1] * 6)), ".*expected the bytes of encoded images")
    lists = pa.StructArray.from_arrays([PIXELS], ["bytes"])
    refused(
        tmp_path, replaced(what, "image", lists), r".*expected the bytes of encoded images \(PNG, JPEG\), one a row"
    )
    refused(tmp_path, what.drop(["image"]), r"no column of images; it holds label \(int64\): save the bytes of")
    refused(tmp_path, what.append_column("img", what["image"]), "2 columns may be the images")
    refused(tmp_path, what, "no column 'x', which data.images names", images="x")


def test_columns_that_are_no_labels_are_refused_with_the_remedy(tmp_path: Path) -> None:
    what = table(names=None)
    for column in (pa.array(["a"] * 6), pa.array([0.0] * 6), pa.array([True] * 6), pa.array([[1]] * 6)):
        refused(tmp_path, replaced(what, "label", column), r"column 'label' is .*expected whole numbers")
    refused(tmp_path, what.append_column("labels", what["label"]), "label, labels may be the labels: set data.labels")
    refused(tmp_path, what, "no column 'x', which data.labels names", labels="x")
    refused(tmp_path, what, "column 'label', which data.captions names, is int64, no text", captions="label")


@pytest.mark.parametrize("setting", ["images", "labels", "captions"])
def test_a_setting_that_names_a_wrong_column_is_wrong_use(tmp_path: Path, setting: str) -> None:
    texts, numbers = ["a.png"] * 6, pa.array([1] * 6)
    what = table(names=None, lists=[[1]] * 6, path=texts, bools=[True] * 6, link=texts, number=numbers)
    wrong = {
        "images": ("lists", "path", "number"),
        "labels": ("path", "lists", "bools"),
        "captions": ("number", "lists"),
    }
    for place, name in enumerate((*wrong[setting], "none")):
        with pytest.raises(WrongUse, match=name):
            _ = one(tmp_path / str(place), what, **{setting: name}).keys


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{", "its schema's entry huggingface cannot be read"),
        ("[]", "its schema's entry huggingface cannot be read"),
        (described(["a", "a"])["huggingface"], "two classes of 'label' have the name 'a'"),
        (described(["a", ""])["huggingface"], "the names of the classes of 'label' in its schema are no texts"),
        (described([1, 2])["huggingface"], "the names of the classes of 'label'"),  # type: ignore[list-item]
        (described(["a\0b", "c"])["huggingface"], "a class of column 'label'"),
    ],
)
def test_a_schema_that_names_no_classes_properly_is_refused(tmp_path: Path, entry: str, says: str) -> None:
    refused(tmp_path, table().replace_schema_metadata({"huggingface": entry}), says)


def test_files_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", table())
    write(tmp_path / "in" / "b.parquet", table(names=["cat", "dog", "cow"]))
    says = r"b\.parquet: .* class 2 is 'cow', .*a\.parquet .* class 2 is 'ice cream': all files must agree"
    with pytest.raises(StageError, match=says):
        _ = Parquet(str(tmp_path / "in")).keys


def test_a_file_that_is_cut_off_or_damaged_is_refused_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "in" / "a.parquet", table(30), write_page_checksum=True, row_group_size=10)
    whole = file.read_bytes()
    for at in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at])
        with pytest.raises(StageError, match=r"a\.parquet: cannot be read as Parquet"):
            read(Parquet(str(file)), tmp_path / "s")
    assert list(tmp_path.glob("out*")) == []
    damaged = bytearray(whole)
    damaged[2000] ^= 1
    file.write_bytes(bytes(damaged))
    with pytest.raises(StageError, match=r"a\.parquet: cannot be read as Parquet"):
        read(Parquet(str(file)), tmp_path / "s")


def test_an_empty_file_among_others_is_no_fault_and_no_image_at_all_is(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", table(0))
    write(tmp_path / "in" / "b.parquet", table(2))
    assert values(read(Parquet(str(tmp_path / "in")), tmp_path / "s")) == [0, 10]
    with pytest.raises(StageError, match="there is no image in it; name other files"):
        make(tmp_path / "out", tmp_path / "in" / "a.parquet", source="parquet")


# Identity and URLs


def test_the_identity_is_of_the_content_and_needs_no_footer(tmp_path: Path) -> None:
    file = write(tmp_path / "in" / "a.parquet", table())
    first = source_identity(DataConfig(source="parquet", path=str(file)))
    assert source_identity(DataConfig(source="parquet", path=str(tmp_path / "in"))) == first
    write(file, table(5))
    assert source_identity(DataConfig(source="parquet", path=str(file))) != first
    file.write_bytes(b"no parquet")
    assert source_identity(DataConfig(source="parquet", path=str(file)))["bytes"] == 10


def test_files_on_s3_are_the_same_data(s3: S3, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    for number in range(2):
        write(tmp_path / "in" / f"train-{number}.parquet", table(4, 4 * number))
    url = put(bucket, tmp_path / "in")
    s3.fail("reset", ".parquet", method="GET", times=1)
    source = Parquet(f"{url}/train-{{0..1}}.parquet")
    assert values(read(source, tmp_path / "s")) == [10 * row for row in range(8)]
    assert source.digest() == Parquet(str(tmp_path / "in")).digest()
    assert (source.classes, source.test.any()) == (CLASSES, np.False_)
    assert read(source, tmp_path / "t").images.shape[2:] == (SIDE, SIDE)
