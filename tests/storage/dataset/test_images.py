"""A dataset reads back what was written, and refuses what it cannot hold."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nfm.storage import DatasetWriter, ImageDataset, MissingShard, NewerSchema, StorageError
from nfm.storage.files.atomic import hash_file, read_json, write_json

ROWS = 53
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 1, 4, 5), dtype=np.uint8)
LABELS = np.arange(ROWS) % 3
KEYS = [f"image-{row}" for row in range(ROWS)]


def chunks(start: int, stop: int, size: int = 7):
    for at in range(start, stop, size):
        part = slice(at, min(at + size, stop))
        yield IMAGES[part], LABELS[part], KEYS[part]


def write(root: Path, **changes) -> DatasetWriter:
    options = {"name": "toy", "image_shape": (1, 4, 5), "classes": ["a", "b", "c"], "rows_per_shard": 16}
    return DatasetWriter(root, **(options | changes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    writer = write(tmp_path)
    writer.write_split("train", 43, chunks(0, 43))
    writer.write_split("heldout", 10, chunks(43, ROWS))
    writer.close([("broken.png", "not an image")])
    return tmp_path


def test_every_row_reads_back_in_any_order(root):
    train = ImageDataset.open(root)
    rows = np.random.default_rng(1).permutation(43)
    assert (len(train), train.image_shape, train.classes) == (43, (1, 4, 5), ["a", "b", "c"])
    assert np.array_equal(train.images(rows), IMAGES[rows])
    assert np.array_equal(train.labels(rows), LABELS[rows])
    assert train.labels(rows).dtype == np.int64
    assert train.keys(rows) == [KEYS[row] for row in rows]
    assert np.array_equal(ImageDataset.open(root, "heldout").images(np.arange(10)), IMAGES[43:])


def test_images_become_floats_from_minus_one_to_one(root):
    train = ImageDataset.open(root)
    levels = train.to_float(np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)).ravel()
    assert (levels[0], levels[255]) == (-1, 1)
    assert np.abs(levels - (np.arange(256) / 127.5 - 1)).max() < 1e-6
    assert levels.dtype == np.float32


def test_rejected_images_are_listed_with_their_reasons(root):
    assert pq.read_table(root / "rejected.parquet").to_pylist() == [{"key": "broken.png", "reason": "not an image"}]


def test_the_payload_lists_every_shard_and_the_description_with_true_digests(tmp_path):
    writer = write(tmp_path)
    writer.write_split("train", 43, chunks(0, 43))
    payload = writer.close()
    assert list(payload) == ["train/s00000.tar", "train/s00001.tar", "train/s00002.tar", "dataset.json"]
    assert all(hash_file(tmp_path / file) == digest for file, digest in (payload | writer.files).items())
    assert set(writer.files) == {"train.parquet", "rejected.parquet"}


def test_the_same_records_in_other_chunks_make_the_same_dataset(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    writer = write(other)
    writer.write_split("train", 43, chunks(0, 43, size=40))
    writer.write_split("heldout", 10, chunks(43, ROWS, size=1))
    writer.close()
    assert ImageDataset.open(other).content_digest == ImageDataset.open(root).content_digest


def test_splits_and_contents_have_orders_of_their_own(root):
    assert ImageDataset.open(root).order_key != ImageDataset.open(root, "heldout").order_key


def test_batches_hold_every_row_once_with_its_label(root):
    train = ImageDataset.open(root)
    seen = []
    for batch in train.batches(8, seed=3, epochs=1, last="keep"):
        assert batch.noise is None
        assert np.array_equal(batch.image, train.to_float(IMAGES[batch.slot]))
        assert np.array_equal(batch.label, LABELS[batch.slot])
        seen += batch.slot.tolist()
    assert sorted(seen) == list(range(43))


def test_data_without_classes_has_the_label_minus_one(tmp_path):
    writer = write(tmp_path, classes=[])
    writer.write_split("train", 3, [(IMAGES[:3], np.full(3, -1), KEYS[:3])])
    writer.close()
    assert ImageDataset.open(tmp_path).labels(np.arange(3)).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_read_back_exactly_and_stream_as_floats(tmp_path, dtype):
    latents = np.random.default_rng(0).normal(size=(20, 4, 3, 3)).astype(dtype)
    writer = write(tmp_path, image_shape=(4, 3, 3), classes=[], dtype=dtype, image_scale=0.5, image_decoder="vae")
    writer.write_split("train", 20, [(latents, np.full(20, -1), KEYS[:20])])
    writer.close()
    train = ImageDataset.open(tmp_path)
    assert (train.dtype, train.image_scale, train.image_decoder) == (dtype, 0.5, "vae")
    rows = np.random.default_rng(1).permutation(20)
    assert train.images(rows).dtype == dtype
    assert np.array_equal(train.images(rows), latents[rows])
    for batch in train.batches(5, epochs=1):
        assert batch.image.dtype == np.float32
        assert np.array_equal(batch.image, latents[batch.slot].astype(np.float32))


def test_latents_that_are_not_finite_name_their_record(tmp_path):
    latents = np.zeros((3, 4, 2, 2), np.float32)
    latents[2, 1] = np.inf
    with pytest.raises(StorageError, match="'image-2' has values that are not finite"):
        write(tmp_path, image_shape=(4, 2, 2), classes=[], dtype="float32").write_split(
            "train", 3, [(latents, np.full(3, -1), KEYS[:3])]
        )
    with pytest.raises(StorageError, match="float64"):
        write(tmp_path, dtype="float64")


def test_the_description_of_pixels_is_what_it_always_was(root):
    body = read_json(root / "dataset.json")
    assert set(body) == {
        "format", "name", "image_shape", "dtype", "value_range", "classes", "rows_per_block", "splits", "digest",
    }  # fmt: skip
    assert body["dtype"] == "uint8"


def test_an_empty_split_is_a_split(tmp_path):
    writer = write(tmp_path)
    writer.write_split("heldout", 0, [])
    writer.close()
    assert len(ImageDataset.open(tmp_path, "heldout")) == 0


def test_shards_are_tars_with_the_split_in_their_names(root):
    with tarfile.open(root / "heldout/s00000.tar") as tar:
        assert tar.getnames() == ["heldout-s00000-b00000.image.npy", "heldout-s00000-b00000.label.npy"]


@pytest.mark.parametrize(("announced", "message"), [(44, "ended after 43"), (42, "more records than the 42")])
def test_a_wrong_count_is_refused(tmp_path, announced, message):
    with pytest.raises(StorageError, match=message):
        write(tmp_path).write_split("train", announced, chunks(0, 43))
    assert not (tmp_path / "dataset.json").exists()


def test_a_label_without_a_class_names_its_record(tmp_path):
    with pytest.raises(StorageError, match="'image-1' has label 3"):
        write(tmp_path).write_split("train", 2, [(IMAGES[:2], np.array([0, 3]), KEYS[:2])])


def test_a_key_of_two_records_is_refused_also_far_apart(tmp_path):
    twice = [(IMAGES[:2], LABELS[:2], KEYS[:2]), (IMAGES[2:4], LABELS[2:4], [KEYS[2], KEYS[0]])]
    with pytest.raises(StorageError, match="train: 2 records have the key 'image-0'; give each record a key"):
        write(tmp_path).write_split("train", 4, twice)
    assert not (tmp_path / "dataset.json").exists()


def test_images_of_another_shape_are_refused(tmp_path):
    with pytest.raises(StorageError, match="image"):
        write(tmp_path).write_split("train", 2, [(IMAGES[:2, :, 1:], LABELS[:2], KEYS[:2])])


def test_a_dataset_that_was_not_finished_does_not_exist(tmp_path):
    write(tmp_path).write_split("train", 43, chunks(0, 43))
    with pytest.raises(StorageError, match=r"dataset\.json"):
        ImageDataset.open(tmp_path)


def test_an_unknown_split_lists_those_there_are(root):
    with pytest.raises(StorageError, match="train, heldout"):
        ImageDataset.open(root, "test")


def test_a_newer_format_is_refused_by_name(root):
    body = read_json(root / "dataset.json") | {"format": 2}
    write_json(root / "dataset.json", body)
    with pytest.raises(NewerSchema, match="format 2"):
        ImageDataset.open(root)


def test_a_missing_shard_is_named(root):
    (root / "train/s00001.tar").unlink()
    train = ImageDataset.open(root)
    assert len(train.images(np.arange(16))) == 16
    with pytest.raises(MissingShard, match=r"s00001\.tar.*audit"):
        train.images(np.array([20]))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a\tb"},
        {"name": "a" * 1001},
        {"classes": ["a", "b\n", "c"]},
        {"classes": ["a", "b", "c" * 1001]},
        {"dtype": "float32", "image_decoder": "\x01"},
        {"image_scale": float("inf")},
        {"image_shape": (0, 4, 5)},
        {"rows_per_shard": 2 * 10**9},
    ],
)
def test_what_no_reader_opens_is_refused_before_anything_is_written(tmp_path, changes):
    with pytest.raises(StorageError):
        write(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a" * 1000, "\x7f", "Größe, 大", "a b/c"])
def test_names_that_are_written_are_read(tmp_path, name):
    writer = write(tmp_path, name=name, classes=[name, "b", "c"])
    writer.write_split("train", ROWS, chunks(0, ROWS))
    writer.close()
    train = ImageDataset.open(tmp_path)
    assert (train.name, train.classes[0]) == (name, name)


def test_a_chunk_that_is_none_is_refused_by_name_and_labels_are_never_rounded(tmp_path):
    image, label, key = IMAGES[:3], LABELS[:3], KEYS[:3]
    for number, (split, chunk, more, said) in enumerate((
        ("train", (image.tolist(), label, key), {}, "the images as a numpy array"),
        ("train", (image, label), {}, r"give \(images, labels, keys\)"),
        ("train", (image, label + 0.5, key), {}, r"labels is array\(\[0.5, 1.5.*whole numbers"),
        ("train", (image, None, key), {}, "labels is None"),
        ("train", (image, label, [1, 2, 3]), {}, "a key is 1: give a text"),
        ("train", (image, label, ["\udc80", "b", "c"]), {}, "in UTF-8"),
        ("train", (image, label, key), {"captions": [1, 2, 3]}, "a caption is 1: give a text .* or None"),
        ("../up", (image, label, key), {}, "split = '../up'"),
    )):  # fmt: skip
        writer = write(tmp_path / str(number))
        with pytest.raises(StorageError, match=said):
            writer.write_split(split, 3, [chunk], **more)
    assert not (tmp_path / "up").exists()
    with pytest.raises(StorageError, match=r"rejected is .*pairs of texts"):
        write(tmp_path).close(["key"])


def test_images_of_another_kind_are_not_scaled_in_silence(root):
    train = ImageDataset.open(root)
    for images, said in (([1, 2], "ndarray"), (IMAGES.astype(np.int16), "are int16, those of .* are uint8")):
        with pytest.raises(StorageError, match=said):
            train.to_float(images)


def test_a_finished_dataset_is_not_written_over(root):
    before = {path: hash_file(path) for path in root.rglob("*") if path.is_file()}
    with pytest.raises(StorageError, match=r"dataset\.json: a finished dataset is here, .* take another folder"):
        write(root)
    assert {path: hash_file(path) for path in root.rglob("*") if path.is_file()} == before


def test_of_two_writers_of_one_folder_the_second_does_not_write_over_what_the_first_finished(tmp_path):
    first, second = write(tmp_path), write(tmp_path)
    chunk = (IMAGES[:3], np.zeros(3, np.int64), ["a", "b", "c"])
    for writer in (first, second):
        writer.write_split("train", 3, [chunk])
    first.close()
    before = {path: hash_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    for late in (second.close, lambda: second.write_split("heldout", 3, [chunk])):
        with pytest.raises(StorageError, match="a finished dataset is here"):
            late()
    assert {path: hash_file(path) for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(ImageDataset.open(tmp_path)) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_shape": (4, 5)}, r"image_shape .*: give \(channels, height, width\)"),
        ({"classes": ["a", ""]}, "class 1 has no name"),
    ],
)
def test_a_writer_refuses_what_no_dataset_has(tmp_path, changes, said):
    with pytest.raises(StorageError, match=said):
        write(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_a_writer_refuses_a_file_as_its_folder_and_an_end_without_a_split(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(StorageError, match="file: is a file, and the dataset is to be a folder"):
        write(tmp_path / "file")
    with pytest.raises(StorageError, match="no split is written yet"):
        write(tmp_path / "new").close()
    assert not (tmp_path / "new" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ((4, [(IMAGES[:4], LABELS[:4], "abcd")]), "a key would be each letter of 'abcd': give a list of texts"),
        ((4, [(IMAGES[:4], LABELS[:4], KEYS[:4])], "abcd"), "a caption would be each letter of 'abcd'"),
        ((4, None), "chunks .*a list or a generator"),
    ],
)
def test_a_text_is_no_list_of_texts(tmp_path, split, said):
    with pytest.raises((StorageError, TypeError), match=said):
        write(tmp_path).write_split("train", *split)
