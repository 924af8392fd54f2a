"""Tars of samples: what stock writers write is read, what cannot be used is set aside by name, damage is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset import TarWriter

from nfm.stages.base import Result, StageError
from nfm.stages.data import stage
from nfm.stages.data.config import DataConfig
from nfm.stages.data.sources import ImageFolder, WebDataset
from nfm.stages.data.stage import source_identity
from nfm.storage import ImageDataset
from nfm.storage.errors import StorageError
from tests.support.recorder import Recorder

SIDE = 6
Members = Mapping[str, bytes]


def picture(value: int, kind: str = "png", size: int = SIDE) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value,) * 3).save(out, {"jpg": "jpeg"}.get(kind, kind))
    return out.getvalue()


def pack(path: Path, members: Members, change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> Path:
    """A tar of these members, in order, by Python's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def good(count: int = 3, start: int = 0) -> dict[str, bytes]:
    """Samples of class row % 3 whose images are of one grey."""
    found: dict[str, bytes] = {}
    for row in range(start, start + count):
        found |= {f"{row:04d}.png": picture(10 * row), f"{row:04d}.cls": str(row % 3).encode()}
    return found


def read(source: WebDataset | ImageFolder, scratch: Path, report: Recorder | None = None) -> Any:
    scratch.mkdir(exist_ok=True)
    return source.load(np.arange(len(source.keys)), scratch, report or Recorder())


def reasons(path: Path, **options: Any) -> dict[str, str]:
    source = WebDataset(str(path), **options)
    return {source.keys[place]: why for place, why in read(source, path.parent / "scratch").rejected.items()}


def make(out: Path, path: Path | str, report: Recorder | None = None, **config: Any) -> Result:
    out.mkdir()
    settings = DataConfig.model_validate({"source": "webdataset", "path": str(path), **config})
    return stage.run(settings, {}, out, report or Recorder())


# What stock writers write


def stock(root: Path, tars: int = 2, samples: int = 5) -> Path:
    """As WebDataset's own writer writes them."""
    root.mkdir()
    for tar in range(tars):
        with TarWriter(str(root / f"{tar:05d}.tar")) as writer:
            for row in range(samples):
                image = np.full((SIDE, SIDE, 3), 20 * row + tar, np.uint8)
                writer.write(
                    {"__key__": f"{tar:05d}{row:04d}", "png": image, "cls": (row + tar) % 3, "json": {"kind": row % 2}}
                )
    return root


def test_tars_of_webdatasets_own_writer_become_a_data_set(tmp_path: Path) -> None:
    root = stock(tmp_path / "in")
    result = make(tmp_path / "out", root, heldout=0.2, rows_per_shard=3)
    assert (result.metrics["images"], result.metrics["heldout"], result.metrics["classes"]) == (8, 2, 3)
    found = {}
    for split in ("train", "heldout"):
        data = ImageDataset.open(tmp_path / "out", split)
        rows = np.arange(len(data))
        for key, label, image in zip(data.keys(rows), data.labels(rows), data.images(rows)):
            found[key] = (int(label), int(image[0, 0, 0]))
            assert image.shape == (3, SIDE, SIDE)
    expected = {
        f"{tar:05d}/{tar:05d}{row:04d}": ((row + tar) % 3, 20 * row + tar) for tar in range(2) for row in range(5)
    }
    assert found == expected


def test_the_order_is_that_of_the_other_sources(tmp_path: Path) -> None:
    make(tmp_path / "out", stock(tmp_path / "in"), heldout=0)
    settings = DataConfig(source="webdataset", path=str(tmp_path / "in"), heldout=0)
    source = stage.open_source(settings)
    keys = [source.keys[row] for row in stage.split_rows(source, settings)[0]]
    assert pq.read_table(tmp_path / "out" / "train.parquet")["key"].to_pylist() == keys


def test_a_folder_of_img2dataset_is_read_with_its_captions(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for shard in range(2):
        members: dict[str, bytes] = {}
        for row in range(3):
            key = f"{shard:05d}{row:04d}"
            caption = f"a photo {key}"
            told = {"caption": caption, "url": "u", "key": key, "status": "success", "width": SIDE}
            members |= {f"{key}.jpg": picture(50 * row, "jpg"), f"{key}.txt": caption.encode()}
            members[f"{key}.json"] = json.dumps(told).encode()
        pack(root / f"{shard:05d}.tar", members)
        (root / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (root / f"{shard:05d}_stats.json").write_text("{}")
    report = Recorder()
    result = make(tmp_path / "out", root, report, heldout=0)
    assert result.extra["skipped"]["no .tar file"]["paths"] == 4
    assert result.metrics["classes"] == 0
    data = ImageDataset.open(tmp_path / "out")
    rows = np.array([5, 0, 3])
    assert data.captions(rows) == [f"a photo {key.partition('/')[2]}" for key in data.keys(rows)]
    assert any("data.labels names a field of the .json members" in line for line in report.said)


def test_the_same_bytes_give_the_pixels_of_a_folder_of_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for name, kind, mode, options in (
        ("turned", "jpeg", "RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
        ("seen", "png", "RGBA", {}),
        ("grey", "webp", "RGB", {"lossless": True}),
        ("deep", "png", "I;16", {}),
    ):
        depth = {"RGB": 3, "RGBA": 4, "I;16": 1}[mode]
        pixels = rng.integers(0, 256, (9, 14, depth), dtype=np.uint8)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257 if mode == "I;16" else pixels)
        out = io.BytesIO()
        image.save(out, kind, **options)
        files[f"{name}.{kind}"] = out.getvalue()
    (tmp_path / "files" / "a").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "files" / "a" / name).write_bytes(content)
    pack(tmp_path / "in" / "0.tar", dict(sorted(files.items())))
    for options in (
        {"image_size": 4},
        {"image_size": 4, "crop": "adm"},
        {"image_size": 8, "average": 2, "channels": 1},
    ):
        ours = read(WebDataset(str(tmp_path / "in"), background="#80ff00", **options), tmp_path / "s")
        theirs = read(ImageFolder(str(tmp_path / "files"), background="#80ff00", **options), tmp_path / "t")
        assert ours.rejected == theirs.rejected == {}
        np.testing.assert_array_equal(ours.images, theirs.images)
        assert ours.notes == theirs.notes


# Labels and captions


def test_labels_come_from_cls_from_a_json_field_or_from_nowhere(tmp_path: Path) -> None:
    root = str(stock(tmp_path / "in", tars=1))
    assert WebDataset(root).labels.tolist() == [0, 1, 2, 0, 1]
    assert WebDataset(root, labels="kind").labels.tolist() == [0, 1, 0, 1, 0]
    assert WebDataset(root, classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    none = WebDataset(root, labels="")
    assert (none.labels.tolist(), none.classes) == ([-1] * 5, [])
    with pytest.raises(StageError, match=r"data\.classes is of labels, but the images of .* have none"):
        read(WebDataset(root, labels="", classes=["a"]), tmp_path / "s")


def test_a_json_field_may_hold_the_names_of_classes(tmp_path: Path) -> None:
    members = {}
    for row, name in enumerate(["dog", "cat", "cow"]):
        members |= {f"{row}.png": picture(0), f"{row}.json": json.dumps({"animal": name, "text": name}).encode()}
    file = pack(tmp_path / "in.tar", members)
    source = WebDataset(str(file), labels="animal", classes=["cat", "dog"], captions="text")
    assert source.labels.tolist()[:2] == [1, 0]
    assert source.captions == ["dog", "cat", None]
    assert read(source, tmp_path / "s").rejected == {
        2: "field 'animal' of its .json is 'cow', no whole number and none of data.classes"
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no .json, of which data.labels or data.captions names a field"),
        (b"{", ".json cannot be read ("),
        (b"[" * 100_000, ".json cannot be read ("),
        (b"[1]", ".json has no fields"),
        (b'{"n": 1, "text": "t", "n": 2}', ".json cannot be read (the key 'n' is there twice)"),
        (b'{"n": 1}', "no field 'text' in its .json"),
        (b'{"n": 1, "text": 5}', "field 'text' of its .json is 5, no text"),
        (b'{"n": 1, "text": "\\ud800"}', "field 'text' of its .json has half of a character"),
        (b'{"n": true, "text": "t"}', "field 'n' of its .json is True, no whole number"),
        (b'{"n": 1e3, "text": "t"}', "field 'n' of its .json is 1000.0, no whole number"),
        (b'{"n": ' + b"9" * 30 + b', "text": "t"}', "field 'n' of its .json is "),
        (b'{"n": 1, "text": "t"}' + b" " * (1 << 20), ".json has 1,048,597 bytes, more than the 1,048,576"),
    ],
)
def test_a_json_that_says_nothing_usable_sets_its_sample_aside(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    packed: dict[str, bytes] = {}
    for row in range(3):
        packed |= {f"{row}.png": picture(0), f"{row}.json": json.dumps({"n": row % 2, "text": "t"}).encode()}
    packed["x.png"] = picture(0)
    if content is not None:
        packed["x.json"] = content
    found = reasons(pack(tmp_path / "in.tar", packed), labels="n", captions="text")
    assert list(found) == ["in/x"]
    assert found["in/x"].startswith(reason)


def test_data_without_captions_says_so(tmp_path: Path) -> None:
    make(tmp_path / "out", stock(tmp_path / "in"), heldout=0)
    with pytest.raises(StorageError, match=r"train\.parquet: the data has no captions"):
        ImageDataset.open(tmp_path / "out").captions([0])


def said_of(file: Path, scratch: Path, **options: Any) -> list[str]:
    """What reading a tar says of captions."""
    report = Recorder()
    read(WebDataset(str(file), **options), scratch, report)
    return [line.partition(": ")[2] for line in report.said if "caption" in line]


def test_what_is_said_of_captions_does_not_hang_on_the_labels(tmp_path: Path) -> None:
    samples = {}
    for row, (said, label) in enumerate([("a", b"1"), ("b", b"x"), (None, b"0"), (None, b"x")]):
        samples |= {f"{row}.png": picture(0), f"{row}.cls": label, f"{row}.json": b'{"number": 0.5}'}
        samples |= {f"{row}.txt": said.encode()} if said else {}
    file = pack(tmp_path / "in.tar", samples)
    for labels in (None, ""):
        assert said_of(file, tmp_path / "s", labels=labels) == ["2 of 4 samples have no caption"]
    assert said_of(file, tmp_path / "s", labels="number") == []  # sets all of them aside


def test_labels_from_one_are_refused_with_the_setting(tmp_path: Path) -> None:
    members = {"a.png": picture(0), "a.cls": b"1", "b.png": picture(0), "b.cls": b"2"}
    file = pack(tmp_path / "in.tar", members)
    with pytest.raises(StageError, match=r"set data\.first_label = 1"):
        read(WebDataset(str(file)), tmp_path / "s")
    assert WebDataset(str(file), first_label=1).labels.tolist() == [0, 1]


# What is set aside

ODD: dict[str, tuple[dict[str, bytes], str]] = {
    "no image": ({"x.cls": b"0", "x.txt": b"t"}, "no image: it has .cls, .txt; data.images names"),
    "two images": (
        {"x.png": picture(1), "x.jpg": picture(1, "jpg"), "x.cls": b"0"},
        "two images, .png and .jpg: data.",
    ),
    "no integer": ({"x.png": picture(1), "x.cls": b"cat"}, ".cls holds 'cat', no whole number"),
    "a fraction": ({"x.png": picture(1), "x.cls": b"1.0"}, ".cls holds '1.0', no whole number"),
    "a long cls": ({"x.png": picture(1), "x.cls": b"1" * 65}, ".cls has 65 bytes, more than the 64"),
    "no cls": ({"x.png": picture(1)}, "no .cls, which others have"),
    "no class": ({"x.png": picture(1), "x.cls": b"-1"}, "label -1, which means no label, among images with labels"),
    "text": ({"x.png": b"no image", "x.cls": b"0"}, "not an image that Pillow reads"),
    "cut off": ({"x.png": picture(1)[:50], "x.cls": b"0"}, "unreadable: "),
    "another size": ({"x.png": picture(1, size=9), "x.cls": b"0"}, "9x9 pixels, the others 6x6"),
    "a bad caption": ({"x.png": picture(1), "x.cls": b"0", "x.txt": b"\xff"}, ".txt is no UTF-8, at byte 0"),
    "a key twice": (
        {"x.png": picture(1), "x.cls": b"0", "y.png": picture(1), "y.cls": b"0", "x.jpg": picture(1), "x.txt": b""},
        "another sample of the same tar has its key",
    ),
    "a place outside": ({"/x.png": picture(1), "/x.cls": b"0"}, "its member /x.png names a place outside of the tar"),
    "a way up": ({"a/../../x.png": picture(1), "a/../../x.cls": b"0"}, "its member a/../../x.png names a place"),
}


@pytest.mark.parametrize(("members", "reason"), ODD.values(), ids=ODD)
def test_a_sample_that_cannot_be_used_is_set_aside_by_name(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    file = pack(tmp_path / "in.tar", good() | members | good(1, 8))
    found = reasons(file)
    assert len(found) == 1
    ((key, why),) = found.items()
    assert key.startswith("in/")
    assert key.endswith("x")
    assert why.startswith(reason)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_set_aside_and_never_followed(tmp_path: Path, kind: bytes) -> None:
    def change(info: tarfile.TarInfo) -> None:
        if info.name == "x.png":
            info.type, info.size, info.linkname = kind, 0, "/etc/passwd"

    file = pack(tmp_path / "in.tar", good() | {"x.png": picture(1), "x.cls": b"0"}, change)
    assert reasons(file) == {"in/x": "its member x.png is a link, a device or the like: pack the file itself"}


def test_one_of_two_images_is_named_by_a_setting(tmp_path: Path) -> None:
    members = {"x.png": picture(1), "x.seg.png": picture(2), "x.jpg": picture(3, "jpg")}
    file = pack(tmp_path / "in.tar", members)
    for images, value in (("png", 1), ("seg.png", 2), (".PNG", 1)):
        assert read(WebDataset(str(file), images=images), tmp_path / "s").images[0, 0, 0, 0] == value


def test_members_that_are_no_samples_are_counted(tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type = tarfile.DIRTYPE if info.name == "./" else info.type

    members = {"./": b"", "README": b"r", ".DS_Store": b"", "__index__.json": b"{}"}
    members |= {f"./sub/{name}": content for name, content in good().items()}
    source = WebDataset(str(pack(tmp_path / "in.tar", members, change)))
    assert source.keys == ["in/sub/0000", "in/sub/0001", "in/sub/0002"]
    counted = {reason.split(" that")[0]: entry["paths"] for reason, entry in source.files.skipped.reasons.items()}
    assert sorted(counted.values()) == [1, 2]


def test_too_many_set_aside_is_an_error_with_the_table(tmp_path: Path) -> None:
    pack(tmp_path / "in.tar", good() | {"x.png": b"", "x.cls": b"0"})
    with pytest.raises(StageError, match=r"1 of 4 images cannot be used.*1 x not an image that Pillow reads \(in/x\)"):
        make(tmp_path / "out", tmp_path / "in.tar")
    assert pq.read_table(tmp_path / "out" / "rejected.parquet")["key"].to_pylist() == ["in/x"]


# Damage


def test_a_tar_cut_off_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    file = pack(tmp_path / "in" / "00001.tar", good())
    whole = file.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for at in [0, 100, 512, 700, 1024, 2000, *range(512, end, 512)]:
        file.write_bytes(whole[:at])
        with pytest.raises(StageError, match=r"00001\.tar: .*fetch it anew"):
            _ = WebDataset(str(file)).keys


def test_a_damaged_header_and_a_second_tar_behind_the_first_are_refused(tmp_path: Path) -> None:
    file = pack(tmp_path / "in.tar", good())
    whole = file.read_bytes()
    for at in range(0, len(whole.rstrip(b"\0")) - 512, 1024):  # each is a header
        file.write_bytes(whole[: at + 3] + b"?" + whole[at + 4 :])
        with pytest.raises(StageError, match=r"in\.tar: .*fetch it anew"):
            _ = WebDataset(str(file)).keys
    file.write_bytes(whole + whole)
    with pytest.raises(StageError, match=r"in\.tar: goes on after the end of the tar.*several tars"):
        _ = WebDataset(str(file)).keys


def test_a_header_that_asks_for_any_size_does_not_fill_the_memory(tmp_path: Path) -> None:
    file = pack(tmp_path / "in.tar", {"x.png": picture(1)})
    with file.open("r+b") as raw:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
        raw.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(StageError, match=r"in\.tar: is no whole tar \(a header of"):
        _ = WebDataset(str(file)).keys


def test_a_refused_tar_leaves_nothing_half_made(tmp_path: Path) -> None:
    file = pack(tmp_path / "in.tar", good())
    file.write_bytes(file.read_bytes()[:2048])
    with pytest.raises(StageError, match=r"in\.tar: "):
        make(tmp_path / "out", file)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("packed", [b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_tar_is_refused_whatever_its_name(tmp_path: Path, packed: bytes) -> None:
    (tmp_path / "in.tar").write_bytes(packed + b"\0" * 2000)
    with pytest.raises(StageError, match=r"in\.tar: is compressed.*unpack it"):
        _ = WebDataset(str(tmp_path / "in.tar")).keys
    (tmp_path / "in").mkdir()
    shutil.move(tmp_path / "in.tar", tmp_path / "in" / "a.tar.gz")
    with pytest.raises(StageError, match=r"a\.tar\.gz: is compressed"):
        WebDataset(str(tmp_path / "in"))


# Identity


def test_the_identity_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    root = stock(tmp_path / "one")
    shutil.copytree(root, tmp_path / "two")
    (tmp_path / "two" / "00000_stats.json").write_text("{}")
    config = {"source": "webdataset", "path": str(root)}
    one = source_identity(DataConfig.model_validate(config))
    known = tmp_path / "known"
    for path in (tmp_path / "two", f"{root}/{{00000..00001}}.tar"):
        assert source_identity(DataConfig.model_validate(config | {"path": str(path)}), known) == one
    pack(tmp_path / "two" / "00001.tar", good())
    assert source_identity(DataConfig.model_validate(config | {"path": str(tmp_path / "two")}), known) != one


def test_naming_the_data_reads_no_header(tmp_path: Path) -> None:
    """`nfm status` names artifacts often: with digests that are known it opens no tar."""
    (tmp_path / "in.tar").write_bytes(b"no tar")
    source = WebDataset(str(tmp_path / "in.tar"))
    assert source.digest()["bytes"] == 6
    with pytest.raises(StageError, match=r"in\.tar"):
        _ = source.keys


def test_rows_in_any_order_have_their_own_images(tmp_path: Path) -> None:
    source, rows = WebDataset(str(stock(tmp_path / "in"))), np.array([7, 2, 9, 0, 4, 5])
    (tmp_path / "s").mkdir()
    loaded = source.load(rows, tmp_path / "s", Recorder())
    assert loaded.images[:, 0, 0, 0].tolist() == [20 * (row % 5) + row // 5 for row in rows.tolist()]
