"""A small file is read only where it is a plain file, inside its folder, of at most a stated size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.folder import Folder
from nfm.storage.files.paths import as_path
from nfm.storage.files.small_files import MOST_BYTES, plain, read_bytes, read_tail


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    (root / "commits").mkdir(parents=True)
    (root / "whole").write_bytes(b"12345")
    (tmp_path / "secret").write_bytes(b"not ours")
    return root


def test_a_file_of_the_largest_size_is_read_and_a_larger_one_is_refused_with_both_sizes(root: Path) -> None:
    assert read_bytes(root / "whole", 5) == b"12345"
    with pytest.raises(StorageError, match=r"whole: 5 bytes, where a file of its kind has at most 4; restore it"):
        read_bytes(root / "whole", 4)


def test_the_bound_holds_on_an_object_store(tmp_path: Path) -> None:
    file = as_path(f"memory://{tmp_path.name}") / "whole"
    atomic.write_bytes(file, b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(StorageError, match="whole: more bytes, where a file of its kind has at most 4"):
        read_bytes(file, 4)


def test_json_has_a_bound_and_a_file_beyond_it_takes_no_memory(root: Path) -> None:
    with open(root / "spec.json", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(StorageError, match="at most 67,108,864"):
        atomic.read_json(root / "spec.json")
    os.truncate(root / "spec.json", 1 << 40)  # what a read of would fail for memory
    with pytest.raises(StorageError, match="at most 67,108,864"):
        atomic.read_json(root / "spec.json")
    (root / "spec.json").rename(root / "commits" / "c.json")
    with Folder(root, "commits") as folder:
        assert folder.read("c.json") is None


@pytest.mark.parametrize("read", [read_bytes, atomic.read_json, atomic.hash_file, lambda path: read_tail(path, 9)])
def test_pipes_devices_and_folders_are_told_by_name(root: Path, read: object) -> None:
    assert callable(read)
    os.mkfifo(root / "pipe")
    (root / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "commits"):
        with pytest.raises(StorageError, match=rf"store/{name}: .*(neither|a folder|a pipe|a link out)"):
            read(root / name)


def test_a_link_out_of_its_folder_is_refused_and_one_that_stays_is_followed(root: Path) -> None:
    (root / "out").symlink_to("../secret")
    (root / "in").symlink_to("whole")
    (root / "commits" / "up").symlink_to("../whole")
    with pytest.raises(StorageError, match=r"out: a link out of the store, to .*secret"):
        read_bytes(root / "out")
    assert read_bytes(root / "in") == b"12345"
    with pytest.raises(StorageError, match="a link out of the store"):
        read_bytes(root / "commits" / "up")  # nobody said that the root is further up
    assert read_bytes(root / "commits" / "up", root=root) == b"12345"
    with plain(root / "out") as file:  # what a user names may be anywhere
        assert file.read() == b"not ours"


def test_a_folder_that_is_a_link_takes_nothing_out_of_the_root(root: Path, tmp_path: Path) -> None:
    (root / "events").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="a link out of the store"):
        read_bytes(root / "events" / "secret", root=root)
    with pytest.raises(ValueError, match="is not in the subpath"):
        read_bytes(tmp_path / "secret", root=root)


def test_the_end_of_a_log_is_read_alone(root: Path) -> None:
    assert read_tail(root / "whole", 3) == b"345"
    assert read_tail(root / "whole", 30) == b"12345"


def test_what_is_missing_is_a_missing_file(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(root / "none")
