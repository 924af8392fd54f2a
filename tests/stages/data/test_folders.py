"""Which files of a folder are images, of which class and split, and how every other path is reported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nfm.stages.base import Result, StageError
from nfm.stages.data import stage
from nfm.stages.data.config import DataConfig
from nfm.stages.data.reading.tree import Skipped
from nfm.stages.data.sources import ImageFolder
from tests.stages.data.image_files import picture, save
from tests.support.recorder import Recorder


def folder(root: Path, *files: str) -> Path:
    for number, file in enumerate(files):
        picture(root / file, value=number)
    return root


def listed(root: Path, **options: Any) -> list[tuple[str, str, bool]]:
    """(key, class, held out) of every image."""
    source = ImageFolder(str(root), **options)
    return [
        (key, source.classes[label], bool(test)) for key, label, test in zip(source.keys, source.labels, source.test)
    ]


def skipped(root: Path, **options: Any) -> dict[str, list[str]]:
    """Reason: the paths not taken."""
    reasons = ImageFolder(str(root), **options).skipped.reasons
    assert all(entry["paths"] == len(entry["first"]) for entry in reasons.values())
    return {reason: entry["first"] for reason, entry in reasons.items()}


def refused(root: Path, *says: str, **options: Any) -> None:
    with pytest.raises(StageError) as caught:
        ImageFolder(str(root), **options)
    for text in (str(root), *says):
        assert text in str(caught.value)


def make(out: Path, path: Path, report: Recorder | None = None, **config: Any) -> Result:
    out.mkdir()
    settings = DataConfig.model_validate({"source": "images", "path": str(path), **config})
    return stage.run(settings, {}, out, report or Recorder())


# Splits


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "training"])
@pytest.mark.parametrize("heldout", ["test", "Testing", "val", "VALID", "validation"])
def test_training_and_heldout_folders_are_known_in_any_spelling(tmp_path: Path, train: str, heldout: str) -> None:
    root = folder(tmp_path, f"{train}/cat/1.png", f"{heldout}/cat/1.png", f"{train}/dog/1.png")
    assert listed(root) == [
        (f"{train}/cat/1.png", "cat", False),
        (f"{train}/dog/1.png", "dog", False),
        (f"{heldout}/cat/1.png", "cat", True),
    ]
    assert skipped(root) == {}


def test_a_training_folder_alone_holds_the_classes(tmp_path: Path) -> None:
    root = folder(tmp_path, "Train/cat/1.png", "Train/dog/1.png")
    assert [(name, heldout) for _, name, heldout in listed(root)] == [("cat", False), ("dog", False)]


def test_of_test_and_validation_the_test_folder_is_held_out_and_the_other_counted(tmp_path: Path) -> None:
    root = folder(tmp_path, "train/a/1.png", "test/a/1.png", "valid/a/1.png")
    assert listed(root) == [("train/a/1.png", "a", False), ("test/a/1.png", "a", True)]
    assert skipped(root) == {"a validation folder beside a test folder, which is the one held out": ["valid/"]}


@pytest.mark.parametrize(
    ("one", "other", "role"),
    [("train", "Train", "training"), ("val", "valid", "validation"), ("test", "testing", "test")],
)
def test_two_spellings_of_one_split_are_refused(tmp_path: Path, one: str, other: str, role: str) -> None:
    root = folder(
        tmp_path, "training/a/1.png" if role != "training" else "test/a/1.png", f"{one}/a/1.png", f"{other}/a/1.png"
    )
    refused(root, f"{one}/", f"{other}/", f"both a {role} folder", "keep one")


@pytest.mark.parametrize("files", [("train/a/1.png", "val/1.png"), ("train/a/1.png", "Test/notes/readme.txt")])
def test_a_heldout_folder_without_classes_is_an_error_that_says_so(tmp_path: Path, files: tuple[str, str]) -> None:
    root = folder(tmp_path, files[0])
    heldout = root / files[1]
    heldout.parent.mkdir(parents=True)
    heldout.write_bytes((root / files[0]).read_bytes() if heldout.suffix == ".png" else b"none")
    part = files[1].split("/")[0]
    refused(root, "a held-out folder without classes", f"expected {part}/CLASS/IMAGE.png", files[1], "not taken: ")


def test_a_training_folder_without_classes_is_an_error_that_names_it(tmp_path: Path) -> None:
    refused(folder(tmp_path, "train/1.png", "test/a/1.png"), "train: no image file in a class folder", "train/1.png")


@pytest.mark.parametrize("files", [("test/a/1.png",), ("cat/1.png", "test/1.png"), ("val/a/1.png", "test/a/1.png")])
def test_a_heldout_folder_without_a_training_folder_is_refused_by_name(tmp_path: Path, files: tuple[str, ...]) -> None:
    refused(folder(tmp_path, *files), files[-1].split("/")[0] + "/", "cannot be told from a class", "data.classes")


def test_a_split_folder_beside_class_folders_is_refused_by_name(tmp_path: Path) -> None:
    refused(folder(tmp_path, "train/a/1.png", "bus/1.png"), "train/ cannot be told from a class beside bus/")


def test_a_folder_without_an_image_beside_the_training_folder_is_counted(tmp_path: Path) -> None:
    root = folder(tmp_path, "train/a/1.png")
    (root / "annotations").mkdir()
    (root / "annotations" / "all.json").write_text("{}")
    assert listed(root) == [("train/a/1.png", "a", False)]
    assert skipped(root) == {"a folder without an image beside the training folder": ["annotations/"]}


def test_classes_named_in_the_config_may_be_called_like_splits(tmp_path: Path) -> None:
    root = folder(tmp_path / "top", "bus/1.png", "train/1.png", "test1/1.png")
    assert [name for _, name, _ in listed(root, classes=["train", "bus", "test1"])] == ["bus", "test1", "train"]
    # A split is one still where a class within it has the same name.
    root = folder(tmp_path / "within", "train/train/1.png", "train/bus/1.png", "test/train/1.png")
    assert [heldout for _, _, heldout in listed(root, classes=["train", "bus", "test"])] == [False, False, True]


@pytest.mark.parametrize("name", ["train2017", "Test_1", "val-01"])
def test_names_close_to_those_of_splits_are_refused_by_name(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path, f"{name}/1.png", "train_station/1.png")
    refused(root, f"{name}/ may be", "rename", "data.classes")
    assert len(listed(root, classes=[name, "train_station"])) == 2


def test_splits_below_a_class_are_refused(tmp_path: Path) -> None:
    refused(folder(tmp_path / "one", "birds/train/a/1.png", "birds/test/a/1.png"), "birds: holds test/, train/")
    refused(folder(tmp_path / "two", "train/Train/1.png", "train/val/1.png"), "train: holds Train/, val/")


# Files


def test_hidden_things_are_left_out_and_counted(tmp_path: Path) -> None:
    hidden = (".cache/1.png", "a/.ipynb_checkpoints/1-checkpoint.png", "a/b/.c/1.png", "a/._1.png")
    root = folder(tmp_path, "a/1.png", *hidden)
    assert listed(root) == [("a/1.png", "a", False)]
    assert ImageFolder(str(root)).skipped.reasons == {
        "hidden: the name begins with a dot": {"paths": 4, "first": [".cache", "a/._1.png", "a/.ipynb_checkpoints"]}
    }


def test_every_other_path_is_counted_by_its_reason(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", "a/1.png", "loose.png")
    (root / "empty" / "deeper").mkdir(parents=True)
    (root / "README.md").write_text("about")
    for name in ("notes.txt", "Thumbs.db", "LICENSE"):
        (root / "a" / name).write_text("no image")
    (root / "a" / "gone.png").symlink_to("nowhere.png")
    (root / "a" / "round.png").symlink_to("round.png")
    os.mkfifo(root / "a" / "pipe.png")
    assert listed(root) == [("a/1.png", "a", False)]
    assert skipped(root) == {
        "a file outside the class folders": ["README.md", "loose.png"],
        "a folder without an image": ["empty/"],
        "a link to nothing": ["a/gone.png", "a/round.png"],
        "no file and no folder (a socket, a pipe, a device)": ["a/pipe.png"],
        "no image that Pillow reads: .txt": ["a/notes.txt"],
        "no image that Pillow reads: .db": ["a/Thumbs.db"],
        "no image that Pillow reads: no ending": ["a/LICENSE"],
    }


def test_an_image_is_recognised_without_an_image_ending(tmp_path: Path) -> None:
    root = folder(tmp_path, "a/1.png")
    for name in ("n01440764_18", "scan.0001", "UPPER.PNG"):
        shutil.copy(root / "a" / "1.png", root / "a" / name)
    assert [key for key, _, _ in listed(root)] == ["a/1.png", "a/UPPER.PNG", "a/n01440764_18", "a/scan.0001"]
    assert skipped(root) == {}


@pytest.mark.parametrize("name", ["photo.heic", "broken.jpg", "drawing.svg"])
def test_what_calls_itself_an_image_and_cannot_be_read_fails_as_one(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path / "in", "a/1.png", "a/2.png")
    (root / "a" / name).write_bytes(b"something else")
    with pytest.raises(
        StageError, match=rf"1 of 3 images cannot be used.*1 x not an image that Pillow reads \(a/{name}\)"
    ):
        make(tmp_path / "out", root)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    pool = folder(tmp_path / "pool", "cats/1.png", "cats/deep/2.png", "dog.png")
    root = tmp_path / "in"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(pool / "cats")
    (root / "dog" / "1.png").symlink_to(pool / "dog.png")
    (root / "dog" / "more").symlink_to(folder(tmp_path / "more", "3.png"))
    assert listed(root) == [
        ("cat/1.png", "cat", False),
        ("cat/deep/2.png", "cat", False),
        ("dog/1.png", "dog", False),
        ("dog/more/3.png", "dog", False),
    ]
    assert skipped(root) == {}


def test_a_folder_is_read_once_for_its_class(tmp_path: Path) -> None:
    root = folder(tmp_path, "a/real/1.png")
    (root / "a" / "again").symlink_to("real")
    assert listed(root) == [("a/real/1.png", "a", False)]
    assert skipped(root) == {"a folder that is read at another path of the same class": ["a/again/"]}


@pytest.mark.parametrize(("link", "target"), [("b", "a"), ("a0", "b/in"), ("a/link", "../b"), ("a/link", "../b/in")])
def test_a_folder_of_two_classes_is_refused(tmp_path: Path, link: str, target: str) -> None:
    root = folder(tmp_path, "a/1.png") if link == "b" else folder(tmp_path, "a/1.png", "b/in/1.png")
    (root / link).symlink_to(target)
    refused(root, f"{link}: is the folder", "one class, in one split")


def test_a_heldout_folder_that_is_the_training_folder_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, "train/a/1.png")
    (root / "val").symlink_to("train")
    refused(root, "val/a: is the folder", "train/a/ already")


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_a_link_that_leads_back_is_refused(tmp_path: Path, target: str) -> None:
    root = folder(tmp_path / "in", "a/b/1.png")
    (root / "a" / "b" / "loop").symlink_to(target)
    refused(root, "a/b/loop: the link leads back")


def test_two_links_that_lead_to_each_other_are_refused(tmp_path: Path) -> None:
    root, outside = folder(tmp_path / "in", "a/1.png"), folder(tmp_path / "outside", "2.png")
    (root / "a" / "out").symlink_to(outside)
    (outside / "back").symlink_to(root / "a")
    refused(root, "a/out/back: the link leads back")


def test_names_of_any_bytes_are_data_whose_keys_can_be_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    os.rename(root / "a" / "1.png", os.fsencode(root / "a") + b"/caf\xe9.png")
    os.rename(root / "b", os.fsencode(root) + b"/\xed\xa0\x80\xff")
    (root / "a" / os.fsdecode(b"h\xfc.txt")).write_text("no image", encoding="utf-8")
    odd = r"\xed\xa0\x80\xff"
    assert listed(root) == [
        ("a/2.png", "a", False),
        (r"a/caf\xe9.png", "a", False),
        (f"{odd}/1.png", odd, False),
        (f"{odd}/2.png", odd, False),
    ]
    assert [key for key, _, _ in listed(root, classes=["a", odd])] == [key for key, _, _ in listed(root)]
    result = make(tmp_path / "out", root, heldout=0, max_rejected=0)
    assert result.metrics["images"] == 4
    assert [entry["first"] for entry in result.extra["skipped"].values()] == [[r"a/h\xfc.txt"]]


def test_two_names_that_would_be_one_key_or_one_class_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, r"a/caf\xe9.png", "a/1.png")
    os.rename(root / "a" / "1.png", os.fsencode(root / "a") + b"/caf\xe9.png")
    refused(root, r"a/caf\xe9.png is the key of two names", "rename")
    root = folder(tmp_path / "classes", r"caf\xe9/1.png", "b/2.png")
    os.rename(root / "b", os.fsencode(root) + b"/caf\xe9")
    refused(root, r"caf\xe9 is the key of two names", "rename")


def test_a_damaged_image_whose_name_is_no_utf_8_is_set_aside_by_name(tmp_path: Path) -> None:
    root, report = folder(tmp_path / "in", "a/1.png", "a/2.png"), Recorder()
    (root / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no picture")
    make(tmp_path / "out", root, report, heldout=0, max_rejected=0.5)
    assert any(r"a/caf\xe9.png" in line for line in report.said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    root = folder(tmp_path, "a/1.png", "b/1.png")
    (root / "b").chmod(0)
    try:
        refused(root, "b: cannot be read (Permission denied)")
    finally:
        (root / "b").chmod(0o755)


# What the stage tells


class Listener(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_paths_not_taken_and_conversions_stand_in_output_and_manifest_and_not_in_the_digest(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", *(f"a/{number}.png" for number in range(6)))
    plain = make(tmp_path / "plain", root)
    assert "skipped" not in plain.metrics
    assert set(plain.extra) == {"dataset"}

    for name in ("x.txt", "y.txt", "z.txt", "zz.txt"):
        (root / "a" / name).write_text("no image")
    listener = Listener()
    result = make(tmp_path / "out", root, listener)
    reason = "no image that Pillow reads: .txt"
    assert result.metrics["skipped"] == 4
    assert result.extra["skipped"] == {reason: {"paths": 4, "first": ["a/x.txt", "a/y.txt", "a/z.txt"]}}
    assert listener.said == [f"not taken: 4 x {reason} (a/x.txt, a/y.txt, a/z.txt, ...)"]
    assert [result.digests[name] for name in result.payload] == [plain.digests[name] for name in plain.payload]
    assert result.extra["dataset"]["source"] == plain.extra["dataset"]["source"]

    save(root / "a" / "clear.png", Image.new("RGBA", (4, 4)))
    result = make(tmp_path / "noted", root, listener)
    assert result.extra["notes"] == {"transparent pixels lie over data.background = 'white'": 1}
    assert listener.said[-1] == "images: 1 x transparent pixels lie over data.background = 'white'"


def test_the_background_is_one_colour_however_it_is_written(tmp_path: Path) -> None:
    assert DataConfig(background="#FFFFFF").semantic() == DataConfig().semantic()
    assert DataConfig(background="#000000") == DataConfig(background="Black")
    assert DataConfig(background="#0a0B0c").semantic()["background"] == "#0a0b0c"
    for wrong in ("pink", "#fff", "", 3):
        with pytest.raises(ValueError, match="six hexadecimal digits"):
            DataConfig.model_validate({"background": wrong})
    with pytest.raises(StageError, match=r"data\.background = 'black': source \"digits\" has no transparent pixels"):
        stage.open_source(DataConfig(background="black"))


def test_folders_of_plain_images_keep_the_digests_they_had(tmp_path: Path) -> None:
    for number, name in enumerate(("a/1", "a/n/2", "a-b/3", "a/n", "b/4")):
        for part in ("train", "test"):
            file = tmp_path / "in" / part / f"{name}.ppm"  # whose bytes are no compressor's choice
            save(file, Image.frombytes("RGB", (4, 4), bytes(range(number, number + 48))))
        save(tmp_path / "in" / "train" / f"{name}.pgm", Image.frombytes("L", (4, 4), bytes(range(number, number + 16))))
    result = make(tmp_path / "out", tmp_path / "in", rows_per_shard=100)
    assert result.extra["dataset"]["source"]["digest"].startswith("0ae3bab6282b6169")
    assert {name: result.digests[name][0][:16] for name in result.payload} == {
        "train/s00000.tar": "825d8b761719acd7",
        "heldout/s00000.tar": "9d3544e294ffa219",
        "dataset.json": "453872abd45071a9",
    }


def test_a_summary_of_other_reasons_is_never_of_one() -> None:
    found = Skipped()
    for reason in "abc":
        found.add(reason, f"{reason}.png")
    assert found.lines(2) == ["1 x a (a.png)", "1 x b (b.png)", "1 x c (c.png)"]
    assert found.lines(1) == ["1 x a (a.png)", "2 x 2 other reasons"]
