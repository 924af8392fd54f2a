"""The data stage end to end: shards, split, order, rejects, and what a killed run leaves."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nfm.pipeline.config import ConfigError, load
from nfm.stages.base import Result, StageError, Stopped
from nfm.stages.data import stage
from nfm.stages.data.config import DataConfig
from nfm.stages.data.sources import Idx, ImageFolder, Npz, Source
from nfm.stages.data.stage import source_identity
from nfm.storage import ImageDataset
from tests.stages.data.image_files import picture
from tests.stages.data.sources.test_idx import folder as idx_folder
from tests.stages.data.test_sources import write_idx
from tests.support.recorder import Recorder


def make(out: Path, report: Recorder | None = None, **config: object) -> Result:
    out.mkdir(exist_ok=True)
    return stage.run(DataConfig.model_validate(config), {}, out, report or Recorder())


def image_folder(root: Path, good: int = 20, bad: int = 0, parts: tuple[str, ...] = ("",)) -> str:
    for part in parts:
        for i in range(good + bad):
            file = root / part / f"class{i % 2}" / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
            if i >= good:
                file.write_bytes(file.read_bytes()[:60])
    return str(root)


def keys_of(out: Path, split: str) -> list[str]:
    return pq.read_table(out / f"{split}.parquet").column("key").to_pylist()


def test_digits_become_shards_that_hold_every_image_once(tmp_path: Path) -> None:
    report = Recorder()
    result = make(tmp_path / "out", report, rows_per_shard=1000)
    source = stage.open_source(DataConfig())
    images = source.load(np.arange(1797), tmp_path, report).images
    train, heldout = (ImageDataset.open(tmp_path / "out", split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (1707, 90)  # 5 % of 1797, rounded
    assert tuple(train.image_shape) == (1, 8, 8)
    row_of = {key: row for row, key in enumerate(source.keys)}
    seen = []
    for part in (train, heldout):
        rows = np.arange(len(part))
        at = [row_of[key] for key in part.keys(rows)]
        np.testing.assert_array_equal(part.images(rows), images[at])
        np.testing.assert_array_equal(part.labels(rows), source.labels[at])
        seen += at
    assert sorted(seen) == list(range(1797))
    assert seen[:20] != sorted(seen[:20])
    assert result.metrics == {
        "images": 1707,
        "heldout": 90,
        "rejected": 0,
        "classes": 10,
        "image_shape": [1, 8, 8],
    }
    assert result.extra["dataset"]["licence"] == "CC BY 4.0"
    assert report.seen[-1] == (1797, 1797, "images")


def test_listed_files_exist_with_the_digests_stated(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = make(out, limit=300, rows_per_shard=128)
    assert len([name for name in result.payload if name.endswith(".tar")]) == 4
    assert {"dataset.json", "rejected.parquet"} <= {*result.payload, *result.files}
    for name, (sha256, size) in result.digests.items():
        content = (out / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (sha256, size)
    listed = {*result.payload, *result.files}
    assert {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()} == listed


def test_order_and_digests_depend_on_content_and_seed_alone(tmp_path: Path) -> None:
    first, again = make(tmp_path / "a", limit=200), make(tmp_path / "b", limit=200)
    assert keys_of(tmp_path / "a", "train") == keys_of(tmp_path / "b", "train")
    assert [first.digests[name] for name in first.payload] == [again.digests[name] for name in again.payload]
    make(tmp_path / "c", limit=200, seed=1)
    assert keys_of(tmp_path / "a", "train") != keys_of(tmp_path / "c", "train")


def test_limit_takes_the_first_of_the_seeded_order(tmp_path: Path) -> None:
    make(tmp_path / "all", heldout=0.0)
    make(tmp_path / "few", heldout=0.0, limit=50)
    assert keys_of(tmp_path / "few", "train") == keys_of(tmp_path / "all", "train")[:50]


def test_the_sources_own_test_set_is_held_out(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "in", good=10, parts=("train", "test"))
    result = make(tmp_path / "out", source="images", path=path)
    assert (result.metrics["images"], result.metrics["heldout"]) == (10, 10)
    assert {key.split("/")[0] for key in keys_of(tmp_path / "out", "train")} == {"train"}
    assert {key.split("/")[0] for key in keys_of(tmp_path / "out", "heldout")} == {"test"}


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.01, 1), (0.25, 5)])
def test_the_heldout_fraction_is_disjoint_from_training(tmp_path: Path, fraction: float, count: int) -> None:
    path = image_folder(tmp_path / "in", good=20)
    result = make(tmp_path / "out", source="images", path=path, heldout=fraction)
    assert result.metrics["heldout"] == count
    assert result.metrics["images"] == 20 - count
    if count:
        train, heldout = (set(keys_of(tmp_path / "out", split)) for split in ("train", "heldout"))
        assert not train & heldout
        assert len(train | heldout) == 20


def test_too_many_unusable_images_fail_the_stage_and_name_the_table(tmp_path: Path) -> None:
    path, out = image_folder(tmp_path / "in", good=16, bad=4), tmp_path / "out"
    with pytest.raises(StageError, match=r"4 of 20 images .*max_rejected = 0\.1 allows 2: .*\.png.*rejected\.parquet"):
        make(out, source="images", path=path, max_rejected=0.1)
    assert pq.read_table(out / "rejected.parquet").num_rows == 4
    assert not (out / "dataset.json").exists()


def test_few_unusable_images_are_set_aside_with_reasons(tmp_path: Path) -> None:
    path, out = image_folder(tmp_path / "in", good=16, bad=4), tmp_path / "out"
    result = make(out, source="images", path=path, max_rejected=0.2)
    assert (result.metrics["rejected"], result.metrics["images"] + result.metrics["heldout"]) == (4, 16)
    table = pq.read_table(out / "rejected.parquet").to_pydict()
    assert all(reason.startswith("unreadable") for reason in table["reason"])
    kept = set(keys_of(out, "train")) | set(keys_of(out, "heldout"))
    assert kept.isdisjoint(table["key"])
    assert len(kept) == 16


def test_labels_outside_the_classes_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "one.npz"
    np.savez(file, data=np.zeros((10, 12), np.uint8), labels=np.array([0] + [1, 2, 3] * 3))
    result = make(tmp_path / "out", source="npz", path=str(file), max_rejected=0.5)
    assert result.metrics["rejected"] == 1
    (reason,) = pq.read_table(tmp_path / "out" / "rejected.parquet")["reason"].to_pylist()
    assert "label 0 is outside the 3 classes, labels 1 to 3" in reason


def test_a_stopped_run_starts_over_and_ends_as_if_never_stopped(tmp_path: Path) -> None:
    config = {"rows_per_shard": 300}
    whole = make(tmp_path / "whole", **config)
    with pytest.raises(Stopped):
        make(tmp_path / "out", Recorder(patience=1), **config)
    (tmp_path / "out" / "scratch").mkdir()
    (tmp_path / "out" / "scratch" / "images.u8").write_bytes(b"left by a killed run")
    (tmp_path / "out" / "spec.json").write_text("{}")
    again = make(tmp_path / "out", **config)
    assert dict(again.digests) == dict(whole.digests)
    assert not (tmp_path / "out" / "scratch").exists()
    assert (tmp_path / "out" / "spec.json").exists()


def test_two_inputs_never_share_an_identity_and_a_copy_does(tmp_path: Path) -> None:
    one = image_folder(tmp_path / "one", good=3)
    shutil.copytree(one, tmp_path / "copy")
    other = image_folder(tmp_path / "other", good=4)
    identities = [
        source_identity(DataConfig(source="images", path=path)) for path in (one, str(tmp_path / "copy"), other)
    ]
    assert identities[0] == identities[1] != identities[2]
    assert identities[0]["files"] == 3


def test_paths_and_thresholds_stay_out_of_the_fingerprint() -> None:
    moved = DataConfig(path="/elsewhere", max_rejected=0.5, licence="CC0", threads=3)
    assert moved.semantic() == DataConfig().semantic()
    assert DataConfig(average=2).semantic() != DataConfig().semantic()


def test_the_config_can_state_licence_origin_and_classes(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "in", good=4)
    names = ("class0", "class1", "class2")
    result = make(tmp_path / "out", source="images", path=path, licence="CC0", origin="made here", classes=names)
    assert result.extra["dataset"]["licence"] == "CC0"
    assert result.extra["dataset"]["origin"] == "made here"
    assert result.metrics["classes"] == 3
    assert tuple(ImageDataset.open(tmp_path / "out").classes) == names


def test_latents_are_stored_as_they_are_with_scale_and_decoder(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(30, 4, 2, 2)).astype(np.float16)
    values[4, 0, 0, 0] = np.nan
    np.savez(tmp_path / "one.npz", data=values)
    config = {"source": "npz", "path": str(tmp_path / "one.npz"), "heldout": 0.1, "max_rejected": 0.1}
    result = make(tmp_path / "out", **config, image_scale=0.18215, image_decoder="some/vae")
    train = ImageDataset.open(tmp_path / "out")
    assert (train.dtype, train.image_scale, train.image_decoder) == ("float16", 0.18215, "some/vae")
    assert (train.classes, set(train.labels(np.arange(len(train))).tolist())) == ([], {-1})
    at = [int(key.split("/")[1]) for key in train.keys(np.arange(len(train)))]
    np.testing.assert_array_equal(train.images(np.arange(len(train))), values[at])
    np.testing.assert_array_equal(train.to_float(values[:3]), values[:3].astype(np.float32))
    assert (result.metrics["rejected"], result.metrics["image_dtype"]) == (1, "float16")
    table = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert table == [{"key": "one/0000004", "reason": "1 of 16 values are not finite"}]


def test_what_is_said_of_latents_is_refused_for_pixels_and_stays_out_of_old_fingerprints(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="uint8 pixels"):
        make(tmp_path / "out", limit=20, image_scale=2.0)
    assert not {"image_scale", "image_decoder"} & set(DataConfig().semantic())
    assert DataConfig(image_scale=2.0).semantic()["image_scale"] == 2.0


def test_data_without_a_usable_image_fails_at_any_threshold(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "in", good=0, bad=3)
    with pytest.raises(StageError):
        make(tmp_path / "out", source="images", path=path, max_rejected=1.0)
    with pytest.raises(StageError, match="none of the 2 training images can be used"):
        make(tmp_path / "out", source="images", path=path, max_rejected=1.0, image_size=4)


@pytest.mark.parametrize("odd", ["a\tb", "a\nb", "\x01", "\x1f", "a" * 1001])
@pytest.mark.parametrize("field", ["name", "image_decoder", "classes"])
def test_names_that_no_reader_takes_are_refused_before_the_data_is_named(field: str, odd: str) -> None:
    config = DataConfig.model_validate({field: [odd, *map(str, range(9))] if field == "classes" else odd})
    with pytest.raises(StageError, match=rf"data\.{field}.* = '(a|\\).*at most 1000 characters: rename it"):
        source_identity(config)


def test_a_class_folder_that_no_reader_takes_is_refused_by_its_name(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "in", good=2)
    (tmp_path / "in" / "class0").rename(tmp_path / "in" / "tab\tbed")
    with pytest.raises(StageError, match=r"in: the name of a class folder = 'tab\\tbed', it must be .*: rename it"):
        source_identity(DataConfig(source="images", path=path))


def npz(root: Path, shape: tuple[int, ...] = (30, 1, 6, 5), **arrays: np.ndarray) -> str:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(root / "one.npz", data=values, **arrays)
    return str(root / "one.npz")


@pytest.mark.parametrize("source", ["digits", "npz", "idx", "checkerboard"])
@pytest.mark.parametrize(("field", "value"), [("image_size", 4), ("channels", 1)])
def test_a_setting_of_another_source_is_refused_by_name(tmp_path: Path, source: str, field: str, value: int) -> None:
    where: dict[str, object] = {"source": source}
    if source == "npz":
        where["path"] = npz(tmp_path)
    elif source == "idx":
        where["path"] = str(idx_folder(tmp_path, np.arange(30) % 3))
    elif source == "checkerboard":
        where["points"] = 30
    said = rf'data\.{field} = {value} is of source images.*, not of "{source}": leave it out'
    with pytest.raises(StageError, match=said):
        make(tmp_path / "out", **where, **{field: value})
    assert not list((tmp_path / "out").iterdir())
    make(tmp_path / "out", **where, channels=3)  # the default, also where a config writes it down


@pytest.mark.parametrize(
    ("field", "value", "source"),
    [("path", "/elsewhere", "digits"), ("debian_package", "fashion", "digits"), ("axes", "nhwc", "checkerboard")],
)
def test_a_place_or_an_array_that_would_not_be_read_is_refused(
    tmp_path: Path, field: str, value: str, source: str
) -> None:
    with pytest.raises(StageError, match=rf"data\.{field} = '{value}' is of source .*leave it out"):
        make(tmp_path / "out", **{"source": source, field: value, "points": 30 if source == "checkerboard" else None})


def test_finished_data_with_a_setting_that_did_nothing_keeps_its_name() -> None:
    assert source_identity(DataConfig(image_size=4)) == source_identity(DataConfig())


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ([], r"data\.classes = \[\] names no class, but the images have labels"),
        (["a", "a", "b"], r"'a' stands at places 0 and 1, counted from 0"),
        (["a", "b", "c", "b"], r"'b' stands at places 1 and 3"),
        (["a", "", "b"], r"the name at place 1, counted from 0, is empty"),
        (["a", "b", " "], r"the name at place 2, counted from 0, is empty"),
    ],
)
def test_empty_and_repeated_class_names_are_refused(tmp_path: Path, classes: list[str], says: str) -> None:
    path = npz(tmp_path, labels=np.arange(30) % 3)
    with pytest.raises(StageError, match=says):
        make(tmp_path / "out", source="npz", path=path, classes=classes)


def test_an_array_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r'data\.images = "" names nothing'):
        make(tmp_path / "out", source="npz", path=npz(tmp_path), images="")


def test_a_held_out_fraction_that_a_test_set_overrides_is_reported(tmp_path: Path) -> None:
    path, said = image_folder(tmp_path / "in", good=4, parts=("train", "test")), Recorder()
    make(tmp_path / "out", said, source="images", path=path, heldout=0.05)
    assert said.said == ["data.heldout = 0.05 is not used: the source's own test set of 4 images is held out"]
    quiet = Recorder()
    make(tmp_path / "again", quiet, source="images", path=path)
    assert quiet.said == []


def test_a_path_wins_over_a_debian_package_and_is_reported(tmp_path: Path) -> None:
    path, report = str(idx_folder(tmp_path, np.arange(30) % 3)), Recorder()
    make(tmp_path / "out", report, source="idx", path=path, debian_package="fashion")
    assert report.said == [f"data.path = {path!r} is read, data.debian_package = 'fashion' is not"]


def latin_1(name: bytes) -> str:
    """A name whose bytes are no UTF-8, as Python gives it to a program."""
    return os.fsdecode(name)


@pytest.mark.parametrize("source", ["images", "npz", "idx"])
def test_a_parent_folder_may_have_a_name_that_is_not_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    above = tmp_path / latin_1(b"caf\xe9") / "in"
    above.mkdir(parents=True)
    files = {"images": image_folder, "npz": npz, "idx": lambda at: str(idx_folder(at, np.arange(30) % 3))}
    path = Path(files[source](above))
    link = tmp_path / path.name
    link.symlink_to(path)
    found = source_identity(DataConfig.model_validate({"source": source, "path": str(link)}), tmp_path / "known")
    odd: Source = {"images": ImageFolder, "npz": Npz, "idx": Idx}[source](str(path))
    assert odd.digest(tmp_path / "known") == odd.digest(tmp_path / "known") == found
    monkeypatch.chdir(above)
    make(tmp_path / "out", source=source, path=os.path.relpath(path, above))


def test_an_npz_file_whose_name_is_no_utf_8_has_keys_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.rename(npz(tmp_path), tmp_path / latin_1(b"\xe9ins.npz"))
    (tmp_path / "one.npz").symlink_to(latin_1(b"\xe9ins.npz"))
    make(tmp_path / "out", source="npz", path=str(tmp_path / "one.npz"))
    odd = Npz(str(tmp_path / latin_1(b"\xe9ins.npz")))
    assert odd.keys[0] == r"\xe9ins/0000000"
    assert odd.digest()["digest"]


@pytest.mark.parametrize("field", ["path", "name", "origin", "image_decoder"])
def test_a_setting_that_no_manifest_can_hold_is_refused_in_print(tmp_path: Path, field: str) -> None:
    (tmp_path / "c.toml").write_text('[data]\nsource = "digits"\n')
    with pytest.raises(ConfigError, match=rf"data\.{field} = 'caf\\xe9': its bytes are no UTF-8.*rename it") as caught:
        load(tmp_path / "c.toml", [f"data.{field}={latin_1(b'caf' + bytes([0xE9]))}"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("train/a", "val/a", "val/b"), "1 of 2 classes have no training image: 'b'; held out are images of 'b'"),
        (
            ("train/Cat", "train/dog", "test/cat", "test/dog"),
            "1 of 3 classes have no training image: 'cat'; held out are images of 'cat'",
        ),
    ],
)
def test_a_class_that_is_only_in_the_held_out_folder_is_reported(
    tmp_path: Path, files: tuple[str, ...], says: str
) -> None:
    report = Recorder()
    for file in files:
        picture(tmp_path / "in" / file / "1.png")
    make(tmp_path / "out", report, source="images", path=str(tmp_path / "in"))
    assert report.said == [says]


def test_labels_of_a_test_set_that_no_training_image_has_are_told(tmp_path: Path) -> None:
    report = Recorder()
    folder = idx_folder(tmp_path, np.arange(30) % 3)
    write_idx(folder / "t10k-images-idx3-ubyte", np.full((4, 6, 4), 200, np.uint8))
    write_idx(folder / "t10k-labels-idx1-ubyte", np.array([0, 1, 3, 4], np.uint8))
    make(tmp_path / "out", report, source="idx", path=str(folder))
    assert report.said == ["2 of 5 classes have no training image: '3', '4'; held out are images of '3', '4'"]


def test_a_limit_above_what_there_is_is_told(tmp_path: Path) -> None:
    report = Recorder()
    make(tmp_path / "out", report, source="npz", path=npz(tmp_path), limit=1000)
    assert report.said == ["data.limit = 1,000 is more than there are: all 30 images are taken"]


def test_a_class_that_the_config_names_and_no_image_has_is_told(tmp_path: Path) -> None:
    report = Recorder()
    path = npz(tmp_path, labels=np.arange(30) % 2)
    make(tmp_path / "out", report, source="npz", path=path, classes=["a", "b", "c"])
    assert report.said == ["1 of 3 classes have no training image: 'c'"]


def test_images_that_may_be_set_aside_are_told_by_reason(tmp_path: Path) -> None:
    report = Recorder()
    labels = np.array([0, 1] * 8 + [7] * 5 + [9])
    path = npz(tmp_path, (22, 1, 6, 5), labels=labels)
    make(tmp_path / "out", report, source="npz", path=path, classes=["a", "b"], max_rejected=0.5)
    five, one = [text for text in report.said if text.startswith("set aside: ")]
    assert five.startswith("set aside: 5 x label 7 is outside the 2 classes")
    assert five.count("one/00000") == 3  # examples
    assert five.endswith(", ...)")
    assert one.startswith("set aside: 1 x label 9 is outside")


def test_only_the_most_frequent_of_many_reasons_are_shown(tmp_path: Path) -> None:
    report = Recorder()
    labels = np.array([0, 1] * 20 + list(range(2, 20)) + [19])
    path = npz(tmp_path, (len(labels), 1, 6, 5), labels=labels)
    make(tmp_path / "out", report, source="npz", path=path, classes=["a", "b"], max_rejected=0.5)
    told = [text for text in report.said if text.startswith("set aside: ")]
    assert told[0].startswith("set aside: 2 x label 19")
    assert told[8:] == ["set aside: 10 x 10 other reasons"]
