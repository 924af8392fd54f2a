"""Every source of images: what it lists and loads, and how it refuses what it cannot read."""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfm.stages.base import StageError, Stopped
from nfm.stages.data.source import box_average
from nfm.stages.data.sources import Digits, Idx, ImageFolder, Npz
from tests.support.recorder import Recorder


def write_idx(path: Path, array: np.ndarray, magic: int | None = None) -> Path:
    magic = 0x800 + array.ndim if magic is None else magic
    raw = struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.fixture
def idx_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(suffix: str = "", name: str = "idx", train: int = 40, test: int = 10) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        for part, count in (("train", train), ("t10k", test)):
            images = rng.integers(0, 256, (count, 6, 4), dtype=np.uint8)
            write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
            write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 5)
        return folder

    return make


def write_npz(path: Path, count: int, side: int = 4, classes: int = 3, seed: int = 0) -> np.ndarray:
    data = np.random.default_rng(seed).integers(0, 256, (count, 3 * side * side), dtype=np.uint8)
    np.savez(path, data=data, labels=np.arange(count) % classes + 1)
    return data.reshape(count, 3, side, side)


def write_image(path: Path, size: tuple[int, int] = (8, 8), seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels.transpose(2, 0, 1)


def everything(source: Digits | Idx | Npz | ImageFolder, scratch: Path) -> np.ndarray:
    scratch.mkdir(exist_ok=True)
    return source.load(np.arange(len(source.labels)), scratch, Recorder()).images


def test_box_average_rounds_half_up() -> None:
    images = np.array([[0, 1, 255, 255], [0, 1, 255, 254]], np.uint8).reshape(1, 1, 2, 4)
    assert box_average(images, 2).tolist() == [[[[1, 255]]]]  # 0.5 -> 1 and 254.75 -> 255
    with pytest.raises(StageError, match=r"average = 3 .* 2x4"):
        box_average(images, 3)


def test_digits_are_scikit_learns_table_scaled_to_bytes(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    table, source = load_digits(), Digits()
    expected = np.floor(table.data * 255 / 16 + 0.5).reshape(-1, 1, 8, 8)
    np.testing.assert_array_equal(everything(source, tmp_path / "s"), expected)
    np.testing.assert_array_equal(source.labels, table.target)
    assert len(source.classes) == 10
    assert not source.test.any()
    assert len(set(source.keys)) == 1797


def test_idx_reads_train_and_test_plain_or_gzipped(idx_folder: Callable[..., Path], tmp_path: Path) -> None:
    plain, zipped = Idx(str(idx_folder())), Idx(str(idx_folder(".gz", "zipped")))
    np.testing.assert_array_equal(everything(plain, tmp_path / "s"), everything(zipped, tmp_path / "s"))
    assert plain.pixels.shape == (50, 1, 6, 4)
    assert plain.test.tolist() == [False] * 40 + [True] * 10
    assert plain.keys[0] == "train/0000000"
    assert plain.keys[40] == "t10k/0000000"
    assert len(plain.classes) == 5
    assert plain.digest() == zipped.digest()


def test_idx_truncated_gz_names_the_file(idx_folder: Callable[..., Path]) -> None:
    file = idx_folder(".gz") / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(StageError, match=r"train-images-idx3-ubyte\.gz: cannot be read .*fetch the file anew"):
        Idx(str(file.parent))


def test_idx_wrong_magic_is_refused(idx_folder: Callable[..., Path]) -> None:
    folder = idx_folder()
    write_idx(folder / "train-images-idx3-ubyte", np.zeros((40, 6, 4), np.uint8), magic=0x00000D03)
    with pytest.raises(StageError, match="magic 0x00000d03, expected 0x00000803"):
        Idx(str(folder))


def test_idx_shorter_or_longer_than_its_header_is_refused(idx_folder: Callable[..., Path]) -> None:
    file = idx_folder() / "train-labels-idx1-ubyte"
    whole = file.read_bytes()
    for wrong in (whole[:-3], whole + b"x", whole[:5]):
        file.write_bytes(wrong)
        with pytest.raises(StageError, match="train-labels-idx1-ubyte"):
            Idx(str(file.parent))


def test_idx_labels_that_do_not_match_the_images_are_refused(idx_folder: Callable[..., Path]) -> None:
    folder = idx_folder()
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(39, np.uint8))
    with pytest.raises(StageError, match="39 labels for 40 images"):
        Idx(str(folder))
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(StageError, match=r"train-labels-idx1-ubyte\[\.gz\] is missing"):
        Idx(str(folder))


def test_idx_missing_folder_and_missing_package_say_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"data\.path = .*nowhere.* is no folder"):
        Idx(str(tmp_path / "nowhere"))
    with pytest.raises(StageError, match="no train-images-idx3-ubyte"):
        Idx(str(tmp_path))
    with pytest.raises(StageError, match=r"needs data\.path"):
        Idx(None)
    with pytest.raises(StageError, match=r"apt-get install no-such-dataset`, or set data\.path"):
        Idx(None, "no-such-dataset")


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="needs Debian's dpkg")
def test_idx_finds_the_files_of_a_debian_package() -> None:
    try:
        source = Idx(None, "dataset-fashion-mnist", average=2)
    except StageError as error:
        pytest.skip(str(error))
    assert source.pixels.shape == (70000, 1, 28, 28)
    assert source.load(np.array([0, 69999]), Path(), Recorder()).images.shape == (2, 1, 14, 14)


def test_npz_reads_batches_in_numeric_order_with_labels_from_one(tmp_path: Path) -> None:
    folder, parts = tmp_path / "npz", []
    folder.mkdir()
    for number in range(1, 12):
        parts.append(write_npz(folder / f"train_data_batch_{number}.npz", 5, seed=number))
    parts.append(write_npz(folder / "val_data.npz", 4, seed=99))
    source = Npz(str(folder))
    np.testing.assert_array_equal(everything(source, tmp_path / "s"), np.concatenate(parts))
    assert source.labels[:5].tolist() == [0, 1, 2, 0, 1]
    assert source.test.tolist() == [False] * 55 + [True] * 4
    rows = np.array([57, 3, 40, 4])
    np.testing.assert_array_equal(source.load(rows, tmp_path / "s", Recorder()).images, np.concatenate(parts)[rows])


def test_npz_of_one_file_has_no_test_set(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "one.npz", 6, side=8)
    source = Npz(str(tmp_path / "one.npz"), average=2)
    np.testing.assert_array_equal(everything(source, tmp_path / "s"), box_average(data, 2))
    assert not source.test.any()


def test_npz_wrong_layouts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.npz"
    cases = {
        "expected uint8": {"data": np.zeros((3, 12), np.float32), "labels": np.ones(3, int)},
        "3 \\* side \\* side": {"data": np.zeros((3, 13), np.uint8), "labels": np.ones(3, int)},
        "2 labels for 3 images": {"data": np.zeros((3, 12), np.uint8), "labels": np.ones(2, int)},
        "no array 'data' for the images; it holds labels": {"labels": np.ones(3, int)},
        "expected integers": {"data": np.zeros((3, 12), np.uint8), "labels": np.ones(3)},
        "of uint8, float16, float32": {"data": np.zeros((3, 4, 2, 2), np.float64), "labels": np.ones(3, int)},
    }
    for message, arrays in cases.items():
        np.savez(file, **arrays)
        with pytest.raises(StageError, match=f"one.npz.*{message}"):
            Npz(str(file))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StageError, match=r"one\.npz.*fetch the file anew"):
        Npz(str(file))
    with pytest.raises(StageError, match=r"no folder that holds train_data_batch"):
        Npz(str(tmp_path))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_npz_takes_arrays_of_images_or_latents_as_they_are(tmp_path: Path, dtype: str) -> None:
    values = (np.random.default_rng(0).normal(size=(9, 4, 3, 2)) * 50).astype(dtype)
    np.savez(tmp_path / "one.npz", data=values, labels=np.arange(9) % 3)
    source = Npz(str(tmp_path / "one.npz"))
    found = everything(source, tmp_path / "s")
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    assert source.labels.tolist() == [0, 1, 2] * 3  # here labels start at 0
    assert source.classes == ["0", "1", "2"]


@pytest.mark.parametrize("values", [np.zeros((5, 12), np.uint8), np.zeros((5, 4, 2, 2), np.float16)])
def test_npz_without_labels_has_no_classes(tmp_path: Path, values: np.ndarray) -> None:
    np.savez(tmp_path / "one.npz", data=values)
    source = Npz(str(tmp_path / "one.npz"))
    assert source.classes == []
    assert source.labels.tolist() == [-1] * 5
    with pytest.raises(StageError, match=r"data\.classes is of labels, but .*one\.npz has no labels"):
        Npz(str(tmp_path / "one.npz"), classes=["cat"])


def test_npz_files_must_agree_and_latents_are_not_averaged(tmp_path: Path) -> None:
    for number, shape in enumerate([(3, 4, 2, 2), (3, 4, 2, 2)], 1):
        np.savez(tmp_path / f"train_data_batch_{number}.npz", data=np.zeros(shape, np.float16))
    assert Npz(str(tmp_path)).image_shape == (4, 2, 2)
    with pytest.raises(StageError, match="only pixels are averaged"):
        Npz(str(tmp_path), average=2)
    np.savez(tmp_path / "train_data_batch_2.npz", data=np.zeros((3, 4, 2, 2), np.float32))
    with pytest.raises(StageError, match=r"train_data_batch_2\.npz: holds float32 .* without labels, .* float16"):
        Npz(str(tmp_path))


def test_npz_latents_that_are_not_finite_are_set_aside(tmp_path: Path) -> None:
    values = np.ones((5, 4, 2, 2), np.float16)
    values[1, 0, 0, 0], values[3] = np.nan, np.inf
    np.savez(tmp_path / "one.npz", data=values)
    (tmp_path / "s").mkdir()
    loaded = Npz(str(tmp_path / "one.npz")).load(np.array([3, 0, 1]), tmp_path / "s", Recorder())
    ends = "float16 ends at 65,504: save float32 if they were larger"
    assert loaded.rejected == {0: f"16 of 16 values are not finite; {ends}", 2: "1 of 16 values are not finite"}
    assert (np.asarray(loaded.images) == np.array([0, 1, 0]).reshape(3, 1, 1, 1)).all()


def test_npz_never_unpickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", data=np.zeros((1, 12), np.uint8), labels=np.array([print], dtype=object))
    with pytest.raises(StageError, match="labels are object"):
        Npz(str(tmp_path / "one.npz"))
    np.savez(tmp_path / "one.npz", data=np.array([print], dtype=object))
    with pytest.raises(StageError, match="Python objects are never unpickled"):
        Npz(str(tmp_path / "one.npz"))


def test_image_folder_labels_by_class_and_keeps_pixels(tmp_path: Path) -> None:
    pixels = [write_image(tmp_path / "in" / name / f"{i}.png", seed=i) for i, name in enumerate("baba")]
    (tmp_path / "in" / "a" / ".hidden").write_text("")
    source = ImageFolder(str(tmp_path / "in"))
    assert source.keys == ["a/1.png", "a/3.png", "b/0.png", "b/2.png"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(everything(source, tmp_path / "s"), np.stack([pixels[i] for i in (1, 3, 0, 2)]))


def test_image_folder_knows_train_and_val(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_image(tmp_path / "in" / part / "cat" / "1.png")
    source = ImageFolder(str(tmp_path / "in"))
    assert source.keys == ["train/cat/1.png", "val/cat/1.png"]
    assert source.test.tolist() == [False, True]


def test_image_folder_crops_the_centre_and_resizes(tmp_path: Path) -> None:
    canvas = np.zeros((8, 16, 3), np.uint8)
    canvas[:, 4:12] = 200  # the central square alone is bright
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.fromarray(canvas).save(tmp_path / "in" / "a" / "wide.png")
    images = everything(ImageFolder(str(tmp_path / "in"), image_size=4, channels=1), tmp_path / "s")
    assert images.shape == (1, 1, 4, 4)
    assert (images == 200).all()


def test_image_folder_sets_unusable_images_aside_with_reasons(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for i in range(4):
        write_image(root / "a" / f"{i}.png", seed=i)
    write_image(root / "b" / "wide.png", size=(9, 8))
    (root / "b" / "text.png").write_text("no image")
    whole = (root / "a" / "0.png").read_bytes()
    (root / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    source = ImageFolder(str(root))
    (tmp_path / "s").mkdir()
    loaded = source.load(np.arange(len(source.keys)), tmp_path / "s", Recorder())
    reasons = {source.keys[position]: reason for position, reason in loaded.rejected.items()}
    assert set(reasons) == {"b/wide.png", "b/text.png", "b/cut.png"}
    assert "9x8 pixels, the others 8x8" in reasons["b/wide.png"]
    assert reasons["b/text.png"] == "not an image that Pillow reads"
    assert reasons["b/cut.png"].startswith("unreadable: ")
    assert not any(str(tmp_path) in reason for reason in reasons.values())

    larger = ImageFolder(str(root), image_size=9)
    assert "smaller than data.image_size = 9" in larger.load(np.arange(1), tmp_path / "s", Recorder()).rejected[0]


def test_image_folder_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="is no folder"):
        ImageFolder(str(tmp_path / "nowhere"))
    write_image(tmp_path / "loose.png")
    with pytest.raises(StageError, match="no image file in a class folder"):
        ImageFolder(str(tmp_path))
    write_image(tmp_path / "dog" / "1.png")
    with pytest.raises(StageError, match=r"\['dog'\] are not in data\.classes"):
        ImageFolder(str(tmp_path), classes=["cat"])


def test_a_stop_is_obeyed_while_images_are_read(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a" / "1.png")
    write_npz(tmp_path / "one.npz", 3)
    for source in (ImageFolder(str(tmp_path / "in")), Npz(str(tmp_path / "one.npz"))):
        with pytest.raises(Stopped):
            source.load(np.arange(1), tmp_path, Recorder(patience=0))


def test_the_digest_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    write_image(tmp_path / "one" / "a" / "1.png", seed=1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    digest = ImageFolder(str(tmp_path / "one")).digest()
    assert ImageFolder(str(tmp_path / "two")).digest() == digest
    (tmp_path / "two" / "a" / "1.png").rename(tmp_path / "two" / "a" / "2.png")
    assert ImageFolder(str(tmp_path / "two")).digest() != digest
    write_image(tmp_path / "one" / "a" / "1.png", seed=2)
    assert ImageFolder(str(tmp_path / "one")).digest() != digest
