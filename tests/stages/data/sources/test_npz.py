"""Arrays of all common kinds are read correctly, or refused with what to set or save."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.stages.base import StageError, Stopped
from nfm.stages.data import stage
from nfm.stages.data.config import DataConfig
from nfm.stages.data.source import Loaded
from nfm.stages.data.sources import Npz
from nfm.storage import ImageDataset
from nfm.storage.errors import by
from tests.support.patience import allowed
from tests.support.recorder import Recorder

Save = Callable[..., str]
ROWS = 60
LABELS = np.arange(ROWS) % 3


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(data=..., labels=...) -> the path of one.npz."""

    def save(compressed: bool = False, **arrays: Any) -> str:
        (np.savez_compressed if compressed else np.savez)(tmp_path / "one.npz", **arrays)
        return str(tmp_path / "one.npz")

    return save


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def loaded(tmp_path: Path, path: str, report: Recorder | None = None, **settings: Any) -> tuple[Npz, Loaded]:
    source = Npz(path, **settings)
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return source, source.load(np.arange(len(source.labels)), scratch, report or Recorder())


def refusal(tmp_path: Path, path: str, **settings: Any) -> str:
    with pytest.raises(StageError) as refused:
        loaded(tmp_path, path, **settings)
    assert path in str(refused.value)
    return str(refused.value)


# Axes


@pytest.mark.parametrize(
    ("shape", "first", "last"),
    [
        ((8, 8, 4), "8 channels and 8 x 4", "4 channels and 8 x 8"),
        ((8, 8, 3), "8 channels and 8 x 3", "3 channels and 8 x 8"),
        ((28, 28, 1), "28 channels and 28 x 1", "1 channel and 28 x 28"),
        ((8, 6, 3), "8 channels and 6 x 3", "3 channels and 8 x 6"),
        ((8, 8, 16), "8 channels and 8 x 16", "16 channels and 8 x 8"),
        ((3, 8, 3), "3 channels and 8 x 3", "3 channels and 3 x 8"),
        ((4, 4, 1), "4 channels and 4 x 1", "1 channel and 4 x 4"),
        ((16, 4, 4), "16 channels and 4 x 4", "4 channels and 16 x 4"),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_axes_that_look_like_channels_last_are_refused_and_taken_on_purpose(
    tmp_path: Path, save: Save, shape: tuple[int, ...], first: str, last: str, dtype: str
) -> None:
    values = pixels(ROWS, *shape).astype(dtype)
    path = save(data=values)
    said = refusal(tmp_path, path)
    for part in (first, last, 'data.axes = "nhwc"', 'data.axes = "nchw"', ".transpose(0, 3, 1, 2)", by(values.shape)):
        assert part in said
    np.testing.assert_array_equal(loaded(tmp_path, path, axes="nhwc")[1].images, values.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(loaded(tmp_path, path, axes="nchw")[1].images, values)


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 8, 8), (1, 28, 20), (3, 4, 4), (1, 1, 1), (1, 1, 2), (16, 8, 8)])
def test_channels_first_needs_no_setting(tmp_path: Path, save: Save, shape: tuple[int, ...]) -> None:
    values, report = pixels(ROWS, *shape), Recorder()
    np.testing.assert_array_equal(loaded(tmp_path, save(data=values), report)[1].images, values)
    assert report.said == []


def test_ambiguous_axes_are_read_as_documented_and_reported(tmp_path: Path, save: Save) -> None:
    values, report = pixels(ROWS, 4, 4, 4), Recorder()
    np.testing.assert_array_equal(loaded(tmp_path, save(data=values), report)[1].images, values)
    assert [text for text in report.said if "taken as [N, C, H, W]" in text and 'data.axes = "nhwc"' in text]


@pytest.mark.parametrize(
    ("shape", "axes", "taken", "other"),
    [
        ((3, 8, 8), "nhwc", "8 channels and 3 x 8", '"nchw" it holds images of 3 channels and 8 x 8'),
        ((1, 28, 28), "nhwc", "28 channels and 1 x 28", '"nchw" it holds images of 1 channel and 28 x 28'),
        ((8, 8, 3), "nchw", "8 channels and 8 x 3", '"nhwc" it holds images of 3 channels and 8 x 8'),
    ],
)
def test_axes_that_are_set_but_look_wrong_are_used_and_reported(
    tmp_path: Path, save: Save, shape: tuple[int, ...], axes: str, taken: str, other: str
) -> None:
    report = Recorder()
    loaded(tmp_path, save(data=pixels(24, *shape)), report, axes=axes)
    assert [text for text in report.said if f"taken as images of {taken}, as data.axes" in text and other in text]


@pytest.mark.parametrize(
    ("shape", "axes"), [((8, 8, 3), "nhwc"), ((3, 8, 8), "nchw"), ((4, 4, 4), "nhwc"), ((8, 8, 8), "nchw")]
)
def test_axes_that_are_set_and_look_right_need_no_word(
    tmp_path: Path, save: Save, shape: tuple[int, ...], axes: str
) -> None:
    report = Recorder()
    loaded(tmp_path, save(data=pixels(24, *shape)), report, axes=axes)
    assert report.said == []


def test_images_of_three_axes_are_grey_on_purpose_alone(tmp_path: Path, save: Save) -> None:
    values = pixels(ROWS, 6, 5)
    path = save(data=values)
    assert 'set data.axes = "nhw"' in refusal(tmp_path, path)
    assert 'data.axes = "nhwc" is of 4 axes' in refusal(tmp_path, path, axes="nhwc")
    np.testing.assert_array_equal(loaded(tmp_path, path, axes="nhw")[1].images, values[:, None])


def test_flat_images_are_channel_major_unless_their_channels_are_last(tmp_path: Path, save: Save) -> None:
    values = pixels(ROWS, 4, 4, 3)
    path = save(data=values.reshape(ROWS, -1))
    np.testing.assert_array_equal(loaded(tmp_path, path)[1].images, values.reshape(ROWS, 3, 4, 4))
    np.testing.assert_array_equal(loaded(tmp_path, path, axes="nhwc")[1].images, values.transpose(0, 3, 1, 2))
    assert "[N, 1, H, W]" in refusal(tmp_path, save(data=pixels(ROWS, 16)))


# Names of arrays and files


def test_an_array_of_another_name_is_asked_for_by_it(tmp_path: Path, save: Save) -> None:
    values = pixels(ROWS, 1, 6, 5)
    path = save(x_train=values, y_train=LABELS)
    said = refusal(tmp_path, path)
    assert "no array 'data'" in said
    assert "x_train (uint8 60x1x6x5), y_train (int64 60)" in said
    assert 'set data.images = "x_train"' in said
    assert 'set data.labels = "y_train"' in refusal(tmp_path, path, images="x_train")
    assert "no array 'y', which data.labels names" in refusal(tmp_path, path, images="x_train", labels="y")
    source, found = loaded(tmp_path, path, images="x_train", labels="y_train")
    np.testing.assert_array_equal(found.images, values)
    np.testing.assert_array_equal(source.labels, LABELS)


@pytest.mark.parametrize("name", ["label", "y", "an_unlisted_name"])
@pytest.mark.parametrize("values", [LABELS, LABELS.astype(str), np.eye(3)[LABELS], LABELS[:-1]])
def test_what_may_be_labels_under_another_name_is_not_passed_over(
    tmp_path: Path, save: Save, name: str, values: np.ndarray
) -> None:
    path = save(data=pixels(ROWS, 1, 6, 5), **{name: values})
    said = refusal(tmp_path, path)
    assert f'data.labels = "{name}"' in said
    assert 'data.labels = "" for images without labels' in said
    assert loaded(tmp_path, path, labels="")[0].classes == []


def test_labels_can_be_left_out_and_what_lies_beside_them_is_left_alone(tmp_path: Path, save: Save) -> None:
    path = save(data=pixels(ROWS, 1, 6, 5), labels=LABELS, mean=np.zeros(30), weight=np.zeros(ROWS))
    assert loaded(tmp_path, path)[0].labels.tolist() == LABELS.tolist()
    assert loaded(tmp_path, path, labels="")[0].labels.tolist() == [-1] * ROWS


def test_a_test_set_in_the_same_file_or_folder_is_told_of(tmp_path: Path, save: Save) -> None:
    report = Recorder()
    path = save(data=pixels(ROWS, 1, 6, 5), labels=LABELS, x_test=pixels(9, 1, 6, 5), y_test=LABELS[:9])
    loaded(tmp_path, path, report)
    assert [text for text in report.said if "not read: x_test (uint8 9x1x6x5)" in text and "val_data.npz" in text]
    for name in ("train_data_batch_1", "train_data_batch_2", "test_data"):
        np.savez(tmp_path / f"{name}.npz", data=pixels(4, 1, 6, 5))
    loaded(tmp_path, str(tmp_path), report)
    assert "not read: one.npz, test_data.npz" in report.said[-1]


@pytest.mark.parametrize(("numbers", "missing"), [((1, 2, 4), 3), ((2, 3), 1), ((2,), 1), ((0, 2), 1), ((1, 4), 2)])
def test_a_missing_batch_is_named(tmp_path: Path, numbers: tuple[int, ...], missing: int) -> None:
    for number in numbers:
        np.savez(tmp_path / f"train_data_batch_{number}.npz", data=pixels(4, 1, 6, 5))
    assert f"train_data_batch_{missing}.npz is missing" in refusal(tmp_path, str(tmp_path))
    np.savez(tmp_path / f"train_data_batch_{missing}.npz", data=pixels(4, 1, 6, 5))
    if max(numbers) - 1 <= len(numbers):
        assert len(loaded(tmp_path, str(tmp_path))[1].images) == 4 * (len(numbers) + 1)


def test_two_batches_of_one_number_are_refused(tmp_path: Path) -> None:
    for number in ("1", "01", "2"):
        np.savez(tmp_path / f"train_data_batch_{number}.npz", data=pixels(4, 1, 6, 5))
    assert "have the same number" in refusal(tmp_path, str(tmp_path))


def test_files_of_other_names_are_listed(tmp_path: Path, save: Save) -> None:
    save(data=pixels(4, 1, 6, 5))
    with pytest.raises(StageError, match=r"it holds one\.npz: name one of them"):
        Npz(str(tmp_path))


# Types of images


WRONG_TYPES = {
    "bool": (pixels(ROWS, 1, 6, 5) > 99, "save data.astype(np.uint8) * 255"),
    "int64": (pixels(ROWS, 1, 6, 5).astype(np.int64), "data.astype(np.uint8) if they are pixels"),
    "big-endian uint16": (pixels(ROWS, 1, 6, 5).astype(">u2"), "(data >> 8).astype(np.uint8) if they go up to 65535"),
    "float64": (np.zeros((ROWS, 1, 6, 5)), "data.astype(np.float32)"),
    "complex64": (np.zeros((ROWS, 1, 6, 5), np.complex64), "one of those"),
    "objects": (np.array([pixels(1, 6, 5), pixels(1, 6, 6)] + [None] * 8, object), "np.stack"),
    "text": (np.array([["a", "b"]]), "one of those"),
    "flat floats": (np.zeros((ROWS, 12), np.float32), "reshaped to [N, C, H, W]"),
    "one image": (pixels(5), "[N, C, H, W]"),
    "five axes": (pixels(2, 2, 2, 2, 2), "[N, C, H, W]"),
    "no pixels": (pixels(ROWS, 3, 0, 5), "hold nothing"),
    "no images": (pixels(0, 3, 6, 5), "holds no image"),
}


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_images_of_another_type_are_refused_with_what_to_save(tmp_path: Path, save: Save, what: str) -> None:
    values, remedy = WRONG_TYPES[what]
    assert remedy in refusal(tmp_path, save(data=values))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", ">f4", "<f2", ">f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_byte_order_memory_order_and_compression_change_no_value(
    tmp_path: Path, save: Save, dtype: str, order: str, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfm.stages.data.reading.arrays.PIECE_BYTES", 1000)  # so that there are many pieces
    values = pixels(ROWS, 3, 6, 5)
    path = save(compressed, data=np.asarray(values, dtype, order=order), labels=LABELS.astype(">i2"))
    source, _ = loaded(tmp_path, path)
    rows = np.array([59, 3, 3, 0, 31])
    found = source.load(rows, tmp_path / "scratch", Recorder()).images
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found, values[rows].astype(dtype))
    np.testing.assert_array_equal(source.labels, LABELS)


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [(0, 255, "np.rint(data).astype(np.uint8)"), (0, 1, "np.rint(data * 255)"), (-1, 1, "np.rint((data + 1) * 127.5)")],
)
def test_floats_are_reported_as_latents_with_the_way_to_save_them_as_pixels(
    tmp_path: Path, save: Save, low: float, high: float, told: str
) -> None:
    report, values = Recorder(), np.random.default_rng(0).uniform(low, high, (ROWS, 3, 8, 8)).astype(np.float32)
    values[0, 0, 0, :2] = low, high
    values[1, 0, 0, 0] = np.nan
    _, found = loaded(tmp_path, save(data=values), report)
    assert list(found.rejected) == [1]
    (said,) = report.said
    assert f"float32 from {low} to {high}, root mean square" in said
    assert "taken as latents" in said
    assert told in said


def test_bits_and_fractions_saved_as_bytes_are_reported(tmp_path: Path, save: Save) -> None:
    report = Recorder()
    loaded(tmp_path, save(data=pixels(ROWS, 3, 8, 8) // 128), report)
    (said,) = report.said
    assert "uint8 from 0 to 1, where 255 is white" in said


def test_a_single_array_says_how_it_becomes_an_npz_file(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", pixels(ROWS, 3, 8, 8))
    assert "a single array, not an .npz file: np.savez(..., data=np.load(...))" in refusal(
        tmp_path, str(tmp_path / "one.npy")
    )


def test_a_header_that_promises_more_than_there_is_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("data.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 3, 8, 8)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(1000))
    assert "fetch the file anew" in refusal(tmp_path, str(path))


def test_a_file_that_unpacks_to_far_more_than_images_do_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("nfm.stages.data.source.BOMB_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "one.npz", data=np.zeros((1 << 13, 3, 8, 8), np.uint8))
    assert "that unpack to 1,572,992" in refusal(tmp_path, str(tmp_path / "one.npz"))


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, save: Save) -> None:
    path = Path(save(data=pixels(ROWS, 3, 8, 8)))
    whole = bytearray(path.read_bytes())
    whole[-2000] ^= 1
    path.write_bytes(whole)
    assert "'data' cannot be read (Bad CRC-32" in refusal(tmp_path, str(path))


def test_reading_stops_between_pieces_of_one_file(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfm.stages.data.reading.arrays.PIECE_BYTES", 1000)
    path = save(data=pixels(ROWS, 3, 8, 8))
    report = Recorder(patience=3)
    with pytest.raises(Stopped):
        loaded(tmp_path, path, report)
    assert 0 < report.seen[-1][0] < ROWS


# Labels


def test_one_absurd_label_is_named_and_costs_no_memory(tmp_path: Path, save: Save) -> None:
    labels = LABELS.astype(np.int64)
    labels[37] = 2**40
    path = save(data=pixels(ROWS, 3, 8, 8), labels=labels)
    began = time.monotonic()
    said = refusal(tmp_path, path)
    assert time.monotonic() - began < allowed(60)
    for part in ("one/0000037 has label 1099511627776", "4 different labels", "below is 2", "data.classes", "renumber"):
        assert part in said
    source, found = loaded(tmp_path, path, classes=["a", "b", "c"])
    assert found.rejected == {37: "label 1099511627776 is outside the 3 classes, labels 0 to 2"}
    assert source.classes == ["a", "b", "c"]
    labels = labels.astype(np.uint64)
    labels[5] = 2**64 - 1
    assert f"label {2**64 - 1} in row 5" in refusal(tmp_path, save(data=pixels(ROWS, 3, 8, 8), labels=labels))


@pytest.mark.parametrize("ignored", [255, 1000, 100_000])
def test_a_label_far_above_the_others_is_refused(tmp_path: Path, save: Save, ignored: int) -> None:
    labels = np.where(np.arange(ROWS) == 7, ignored, np.arange(ROWS) % 10)
    said = refusal(tmp_path, save(data=pixels(ROWS, 3, 8, 8), labels=labels))
    assert f"one/0000007 has label {ignored}, with 11 different labels in all, the next one below is 9" in said
    assert "leave those images out" in said


def test_classes_without_images_are_told(tmp_path: Path, save: Save) -> None:
    report = Recorder()
    source, _ = loaded(tmp_path, save(data=pixels(ROWS, 3, 8, 8), labels=np.arange(ROWS) % 3 * 4), report)
    assert len(source.classes) == 9
    assert [text for text in report.said if "6 of 9 classes have no image: labels 1, 2, 3, 5, 6, 7" in text]


def test_labels_from_one_are_refused_with_the_numbers_of_the_file_and_taken_on_purpose(
    tmp_path: Path, save: Save
) -> None:
    path = save(data=pixels(ROWS, 3, 8, 8), labels=LABELS + 1)
    said = refusal(tmp_path, path)
    assert "labels run from 1 to 3, expected to begin with 0" in said
    assert "data.first_label = 1" in said
    source, found = loaded(tmp_path, path, first_label=1)
    assert (source.labels.tolist(), source.classes, found.rejected) == (LABELS.tolist(), ["0", "1", "2"], {})
    assert loaded(tmp_path, path, classes=["none", "a", "b", "c"])[0].labels.tolist() == (LABELS + 1).tolist()


def test_flat_images_with_labels_from_zero_speak_of_the_numbers_of_the_file(tmp_path: Path, save: Save) -> None:
    path = save(data=pixels(ROWS, 12), labels=LABELS)
    _, found = loaded(tmp_path, path)
    reason = "label 0 is outside the 2 classes, labels 1 to 2; data.first_label = 0 if that is where they begin"
    assert found.rejected == {int(row): reason for row in np.flatnonzero(LABELS == 0)}
    source, found = loaded(tmp_path, path, first_label=0)
    assert (source.labels.tolist(), found.rejected) == (LABELS.tolist(), {})
    assert "set data.first_label = 0" in refusal(tmp_path, save(data=pixels(ROWS, 12), labels=np.zeros(ROWS, int)))


def test_labels_that_are_all_minus_one_are_none(tmp_path: Path, save: Save) -> None:
    report = Recorder()
    for shape in ((3, 8, 8), (12,)):
        source, found = loaded(tmp_path, save(data=pixels(ROWS, *shape), labels=np.full(ROWS, -1)), report)
        assert (source.classes, set(source.labels.tolist()), found.rejected) == ([], {-1}, {})
        assert "taken as images without labels" in report.said[-1]


WRONG_LABELS = {
    "one-hot": (np.eye(3)[LABELS], "labels.argmax(1)"),
    "text": (np.array(["cat", "dog", "owl"])[LABELS], "np.unique(labels, return_inverse=True)"),
    "floats": (LABELS.astype(float), "labels.astype(np.int64)"),
    "bools": (LABELS > 0, "labels.astype(np.int64)"),
    "too few": (LABELS[:-1], "59 labels for 60 images"),
    "a picture": (pixels(ROWS, 8, 8), "expected integers, one an image"),
    "one number": (np.array(3), "expected integers, one an image"),
}


@pytest.mark.parametrize("what", WRONG_LABELS)
def test_labels_that_are_no_whole_numbers_are_refused_with_what_to_save(tmp_path: Path, save: Save, what: str) -> None:
    labels, remedy = WRONG_LABELS[what]
    assert remedy in refusal(tmp_path, save(data=pixels(ROWS, 3, 8, 8), labels=labels))


def test_labels_in_a_column_are_labels(tmp_path: Path, save: Save) -> None:
    source, _ = loaded(tmp_path, save(data=pixels(ROWS, 3, 8, 8), labels=LABELS.astype(np.uint8)[:, None]))
    assert source.labels.tolist() == LABELS.tolist()


# In the stage


def test_the_settings_reach_the_source_and_stay_out_of_old_fingerprints(tmp_path: Path, save: Save) -> None:
    values = pixels(ROWS, 8, 6, 3)
    settings = {"images": "x", "labels": "y", "axes": "nhwc", "first_label": 1}
    config = DataConfig.model_validate({"source": "npz", "path": save(x=values, y=LABELS + 1), **settings})
    stage.run(config, {}, tmp_path, Recorder())
    train = ImageDataset.open(tmp_path)
    at = [int(key.split("/")[1]) for key in train.keys(np.arange(len(train)))]
    np.testing.assert_array_equal(train.images(np.arange(len(train))), values.transpose(0, 3, 1, 2)[at])
    np.testing.assert_array_equal(train.labels(np.arange(len(train))), LABELS[at])
    assert settings.items() <= config.semantic().items()
    assert not settings.keys() & DataConfig(source="npz").semantic().keys()


@pytest.mark.parametrize("setting", [{"images": "x"}, {"labels": ""}, {"axes": "nchw"}, {"first_label": 0}])
def test_settings_of_another_source_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(StageError, match=rf'data\.{next(iter(setting))} = .* is of source .*npz.*not of "digits"'):
        stage.open_source(DataConfig.model_validate(setting))


def test_data_made_before_a_check_existed_keeps_its_identity(tmp_path: Path, save: Save) -> None:
    """What is refused is refused when data is made: an artifact that there is needs its name and nothing else."""
    path = save(data=pixels(ROWS, 8, 8, 4), label=LABELS)
    config = DataConfig(source="npz", path=path)
    assert stage.source_identity(config)["files"] == 1
    with pytest.raises(StageError, match=r"data\.axes"):
        stage.run(config, {}, tmp_path, Recorder())


@pytest.mark.parametrize(
    ("labels", "run_to", "odd"),
    [
        ([1, 2, 255], 2, "label 255 (1 of 13 images)"),
        ([-1, 1, 2], 2, "label -1 (1 of 13 images)"),
        ([-1, 1, 2, 255, 10**5, 255], 2, "label -1 (1 of 16 images), label 255 (2 of 16 images), label 100000 (1 of"),
    ],
)
def test_a_label_that_stands_apart_is_named_beside_the_first_one(
    tmp_path: Path, save: Save, labels: list[int], run_to: int, odd: str
) -> None:
    values = np.array([*labels, *([1, 2] * 5)])
    path = save(data=pixels(len(values), 1, 6, 5), labels=values)
    said = refusal(tmp_path, path)
    assert f"labels run from 1 to {run_to}, expected to begin with 0" in said
    assert f"set data.first_label = 1, or name every class, from 0 on, with data.classes. Then leave out {odd}" in said
