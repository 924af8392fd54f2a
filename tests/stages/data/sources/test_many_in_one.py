"""Which files data.path names: of a folder, of a pattern, behind a URL; which are held out; what a bad network does."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import ValidationError

from nfm.stages.base import StageError, Unfit
from nfm.stages.data.config import DataConfig
from nfm.stages.data.reading.many_in_one import ManyInOne
from nfm.stages.data.sources import WebDataset
from nfm.stages.data.stage import source_identity
from nfm.storage.errors import StorageError
from nfm.storage.files.paths import as_path
from tests.stages.data.sources.test_webdataset import good, make, pack, read
from tests.support.buckets.s3server import bucket, s3, s3_server  # noqa: F401  fixtures
from tests.support.recorder import Recorder

if TYPE_CHECKING:
    from tests.support.buckets.s3server import S3


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def named(path: Path | str) -> list[str]:
    return ManyInOne(str(path), "webdataset", ".tar").names


def refused(path: Path | str, *says: str) -> None:
    with pytest.raises(StageError) as caught:
        named(path)
    for text in says:
        assert text in str(caught.value)


# Patterns


def test_a_pattern_names_files_as_webdataset_expands_it(tmp_path: Path) -> None:
    from braceexpand import braceexpand

    root = files(tmp_path, *(f"{row:05d}.tar" for row in range(8, 12)), "a.tar", "b.tar", "c-9.tar", "c-10.tar")
    for pattern in ("{00008..00011}.tar", "{a,b}.tar", "c-{9..10}.tar", "000{08,10}.tar", "00{0..0}{08..09}.tar"):
        assert named(root / pattern) == sorted(braceexpand(pattern))
    assert named(root / "{00009..00010}.tar") == ["00009.tar", "00010.tar"]
    assert named(root / "0000*.tar") == ["00008.tar", "00009.tar"]
    assert named(root / "[ab].tar") == ["a.tar", "b.tar"]
    assert named(root / "a.tar") == ["a.tar"]


def test_files_of_several_folders_are_named_apart(tmp_path: Path) -> None:
    root = files(tmp_path, "one/0.tar", "two/0.tar")
    assert named(root / "{one,two}" / "0.tar") == ["one/0.tar", "two/0.tar"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    assert named(files(tmp_path, "{0..1}.tar") / "{0..1}.tar") == ["{0..1}.tar"]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{0..2}.tar", "there is no file"),
        ("nothing", "there is no file"),
        ("x*.tar", "no .tar file of the name x*.tar in "),
        ("*/0.tar", "stand in the name of the file alone"),
        ("{0..99999999999}.tar", "more than 100,000 files"),
        ("{0..999}{0..999}.tar", "more than 100,000 files"),
        ("{5..2}.tar", "names none"),
        ("{0,0}.tar", "names a file twice"),
        ("readme.txt", "readme.txt is no .tar file"),
        ("0.tar/1.tar", "there is no file"),
    ],
)
def test_a_pattern_that_names_nothing_usable_is_refused(tmp_path: Path, pattern: str, says: str) -> None:
    refused(files(tmp_path, "0.tar", "1.tar", "readme.txt") / pattern, "data.path", says)


def test_a_folder_without_such_files_says_what_is_there(tmp_path: Path) -> None:
    refused(files(tmp_path, "data/0.tar", "readme.md"), "no .tar file in ", "there are data, readme.md")
    with pytest.raises(Unfit, match=r"needs data\.path: a folder of \.tar files"):
        WebDataset(None)


def test_a_pipe_is_no_file_and_a_command_is_never_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    refused(tmp_path, "0.tar: is no plain file")
    marker = tmp_path / "ran"
    refused(f"pipe:touch {marker}; cat x.tar", "there is no file")
    assert not marker.exists()


# Splits


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (("train-0.tar", "train-1.tar", "test-0.tar"), {"test-0.tar"}),
        (("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"), {"imagenet1k-validation-00.tar"}),
        (("Train_0.tar", "VAL_0.tar"), {"VAL_0.tar"}),
        (("train-0.tar", "train-1.tar"), set()),
        (("0.tar", "contest-1.tar"), set()),
    ],
)
def test_names_say_which_files_are_held_out(tmp_path: Path, names: tuple[str, ...], held: set[str]) -> None:
    found = ManyInOne(str(files(tmp_path, *names)), "webdataset", ".tar")
    assert found.names == sorted(names)
    assert {name for name, heldout in zip(found.names, found.heldout) if heldout} == held


def test_validation_beside_test_is_not_read_and_counted(tmp_path: Path) -> None:
    found = ManyInOne(str(files(tmp_path, "train-0.tar", "test-0.tar", "val-0.tar")), "webdataset", ".tar")
    assert found.names == ["test-0.tar", "train-0.tar"]
    assert [entry["first"] for entry in found.skipped.reasons.values()] == [["val-0.tar"]]


def test_names_that_leave_a_doubt_are_refused(tmp_path: Path) -> None:
    refused(
        files(tmp_path / "a", "train-0.tar", "0.tar"), "cannot tell which files are to train on", "0.tar (no split)"
    )
    refused(files(tmp_path / "b", "val-0.tar", "test-0.tar"), "cannot tell which files are to train on")
    refused(files(tmp_path / "c", "train-test-0.tar"), "is of test and training by its name")


def test_files_of_a_held_out_split_alone_are_taken_and_told(tmp_path: Path) -> None:
    pack(tmp_path / "in" / "val-0.tar", good())
    report, source = Recorder(), WebDataset(str(tmp_path / "in"))
    read(source, tmp_path / "s", report)
    assert not source.test.any()
    assert any("only validation files are there" in line for line in report.said)


def test_held_out_tars_are_the_held_out_split(tmp_path: Path) -> None:
    pack(tmp_path / "in" / "train-0.tar", good(4))
    pack(tmp_path / "in" / "test-0.tar", good(2))
    result = make(tmp_path / "out", tmp_path / "in")
    assert (result.metrics["images"], result.metrics["heldout"]) == (4, 2)


# URLs


def test_only_sources_that_read_urls_take_one(tmp_path: Path) -> None:
    assert DataConfig(source="webdataset", path="s3://bucket/{0..2}.tar").path == "s3://bucket/{0..2}.tar"
    with pytest.raises(ValidationError, match=r'a URL, and source "npz" reads files of this machine'):
        DataConfig(source="npz", path="s3://bucket/a.npz")
    with pytest.raises(ValidationError, match="password or a token"):
        DataConfig(source="webdataset", path="s3://key:secret@bucket/a.tar")


def put(bucket: str, root: Path) -> str:  # noqa: F811
    where: Any = as_path(f"{bucket}/tars")
    for path in sorted(root.iterdir()):
        where.fs.put(str(path), f"{where.path}/{path.name}")
    return f"{bucket}/tars"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(2):
        pack(tmp_path / "in" / f"{number:05d}.tar", good(4, start=4 * number))
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    return tmp_path / "in"


def test_tars_on_s3_are_the_same_data_as_their_files(
    s3: S3,  # noqa: F811
    bucket: str,  # noqa: F811
    root: Path,
    tmp_path: Path,
) -> None:
    url = put(bucket, root)
    here = read(WebDataset(str(root)), tmp_path / "s")
    for path in (url, f"{url}/{{00000..00001}}.tar", f"{url}/0*.tar"):
        source = WebDataset(path)
        assert source.digest() == WebDataset(str(root)).digest()
        np.testing.assert_array_equal(read(source, tmp_path / "t").images, here.images)
        assert source.keys == WebDataset(str(root)).keys
    assert make(tmp_path / "out", url).metrics["images"] == 7


def test_an_unchanged_object_is_not_read_again_to_be_named(
    s3: S3,  # noqa: F811
    bucket: str,  # noqa: F811
    root: Path,
    tmp_path: Path,
) -> None:
    config = DataConfig(source="webdataset", path=put(bucket, root))
    first = source_identity(config, tmp_path / "known")
    asked = s3.count("GET", ".tar")
    assert source_identity(config, tmp_path / "known") == first
    assert s3.count("GET", ".tar") == asked
    pack(root / "00001.tar", good(1))
    put(bucket, root)
    assert source_identity(config, tmp_path / "known") != first


@pytest.mark.parametrize("kind", ["error", "reset", "cut"])
def test_a_network_that_fails_for_a_while_changes_nothing(
    s3: S3,  # noqa: F811
    bucket: str,  # noqa: F811
    root: Path,
    tmp_path: Path,
    kind: Any,
) -> None:
    url, here = put(bucket, root), read(WebDataset(str(root)), tmp_path / "s")
    s3.fail(kind, ".tar", method="GET", times=2)
    source = WebDataset(url)
    np.testing.assert_array_equal(read(source, tmp_path / "t").images, here.images)
    assert source.digest() == WebDataset(str(root)).digest()


@pytest.mark.parametrize("kind", ["shrink", "flip"])
def test_a_copy_that_is_not_what_was_hashed_is_never_decoded(
    s3: S3,  # noqa: F811
    bucket: str,  # noqa: F811
    root: Path,
    tmp_path: Path,
    kind: Any,
) -> None:
    """A wrong answer while tars are fetched is fetched again; three wrong ones are an error that names the tar."""
    url, here = put(bucket, root), read(WebDataset(str(root)), tmp_path / "s")
    source = WebDataset(url)
    source.files.hash()
    fault = s3.fail(kind, "00001.tar", method="GET", times=1)
    np.testing.assert_array_equal(read(source, tmp_path / "t").images, here.images)
    assert fault.times == 0
    pack(root / "00000.tar", good(2))
    again = WebDataset(f"{put(bucket, root)}/00000.tar")
    again.files.hash()
    s3.fail(kind, "00000.tar", method="GET", times=50)
    with pytest.raises((StageError, StorageError), match=r"00000\.tar: is not what it was when it was hashed"):
        read(again, tmp_path / "t")


def test_an_object_that_is_not_there_is_named(s3: S3, bucket: str) -> None:  # noqa: F811
    with pytest.raises(StageError, match=r"00000\.tar: cannot be read \(there is no such object\)"):
        WebDataset(f"{bucket}/{{00000..00001}}.tar").digest()
    with pytest.raises(StageError, match=re.escape(f"no .tar file in {bucket}/nothing")):
        WebDataset(f"{bucket}/nothing")
