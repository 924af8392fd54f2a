"""A place that a user wrote is a path, a URL, or one message with the remedy; never a folder named like a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfm.storage import ImageDataset, PairStore
from nfm.storage.errors import NoPlace, StorageError, WrongVariable
from nfm.storage.export import export
from nfm.storage.files.copies.cache import ShardCache
from nfm.storage.files.paths import artifacts_root, as_path, is_remote, is_url, local_path, stated_path
from nfm.storage.files.places import cache_base, scratch_root
from nfm.storage.files.remote import patience


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    "text",
    [
        "a", "a/b", "/a/b", ".", "..", "./a", "a b", "a%20b", "a#b", "a?b=c", "a:b", "./a:b", "a:b/c", "C:\\x", "C:/x",
        "C://x", "/data/s3:/x", "data/s3://x", "./s3:/x", "./s3://x", "./file:x", "./~x", "a/~", "x~",
        "2024-01-01T10:00/x", " a", "./ s3:/x", "ä/é", "-", "https", "s3", "model:v2",
    ],
)  # fmt: skip
def test_a_local_name_is_kept_as_it_is(text: str, tmp_path: Path) -> None:
    path = as_path(text)
    assert not is_remote(path)
    assert os.path.abspath(path) == os.path.abspath(Path(text))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "home"), ("~/art", "home/art"), ("file://~/art", "home/art"), ("file:///~/art", "home/art"),
        ("file://{}/a", "a"), ("file://localhost{}/a", "a"), ("file:{}/a", "a"), ("FILE://{}/a", "a"),
        ("local://{}/a", "a"), ("file://{}/a%20b", "a b"), ("file://{}/a%23%3F%25#?", "a#?%#?"),
        ("file://{}/a%zz", "a%zz"),
    ],
)  # fmt: skip
def test_the_home_folder_and_file_urls_are_local_paths(text: str, path: str, tmp_path: Path) -> None:
    assert as_path(text.format(tmp_path)) == tmp_path / path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/x", "s3://bucket/x"), ("S3://bucket/x", "s3://bucket/x"), ("memory://x/y", "memory://x/y"),
        ("s3://bucket/a@b?versionId=1", "s3://bucket/a@b?versionId=1"), ("s3://bucket", "s3://bucket/"),
    ],
)  # fmt: skip
def test_a_url_is_a_url(text: str, shown: str) -> None:
    assert is_remote(as_path(text))
    assert str(as_path(text)) == shown
    assert is_url(text)


REFUSED = [
    ("", "names no place"), ("  ", "names no place"), ("a\0b", "names no place"),
    ("s3:/bucket/x", r"two slashes: write s3://bucket/x, or \./s3:/bucket/x for a local path"),
    ("s3:bucket/x", r"write s3://bucket/x, or \./s3:bucket/x"), ("gs:/b/x", "write gs://b/x"),
    ("memory:/x", "two slashes"),
    ("hdfs:/x", "two slashes"), ("file:x", r"write file:///path, or \./file:x"), ("http:x/y", "two slashes"),
    ("s4://bucket/x", "no known scheme; use a folder, s3://bucket/.*gs://.*file:///path"),
    ("s33://bucket/x", r"no known scheme \(did you mean s3://\?\)"),
    ("nosuch::s3://b/x", "no known scheme"), ("s3://", "names no bucket"), ("s3:///x", "names no bucket"),
    ("gs:// /x", "names no bucket"), ("file://host/x", "names no path of this machine"), ("file://", "names no path"),
    ("file:///a%00b", "names no path"), (" s3://bucket/x", "space before the URL"), (" s3:b", "space before the URL"),
    ("~no-such-user/x", r"no such user; write \./~no-such-user/x"),
    ("s3://key:secret@host/x", "AWS_ACCESS_KEY_ID"), ("s3:/key:secret@host/x", "AWS_ACCESS_KEY_ID"),
    ("https://h/x?X-Amz-Signature=secret", "leave it out of the URL"),
    (" s3://k:secret@h/x", "leave it out of the URL"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_is_neither_a_path_nor_a_url_is_refused_with_the_remedy(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(NoPlace, match=message) as caught:
        as_path(text)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


@given(st.text(alphabet="as3:/.~ %#?@\\f", max_size=12))
def test_the_text_of_a_place_names_the_same_place_again(text: str) -> None:
    try:
        path = as_path(text)
    except StorageError:
        return
    assert as_path(str(path)) == path
    assert is_remote(path) == is_url(str(path))


def test_a_path_object_is_taken_as_it_is_unless_it_was_a_url() -> None:
    for path in (Path("a:b"), Path("~/x"), Path("/s3:/x"), Path("x") / "s3:"):
        assert as_path(path) is path
    for path in (Path("s3://bucket/x"), Path("memory://x"), Path("file:///x")):
        with pytest.raises(NoPlace, match=r"a pathlib\.Path holds no URL"):
            as_path(path)


def test_a_url_object_with_a_secret_is_refused_too() -> None:
    from upath import UPath

    with pytest.raises(NoPlace, match=r"^s3://\*\*\*@host/x: a URL with a key"):
        PairStore.open(UPath("s3://key:secret@host/x"))


def test_a_message_is_one_printable_line() -> None:
    for text in ("s4://a\nb", "s3:/a\x1b[31m", "~no-such-user\n"):
        with pytest.raises(NoPlace) as caught:
            as_path(text)
        assert str(caught.value).isprintable()


def test_where_only_local_paths_work_a_url_is_refused_with_the_remedy() -> None:
    assert local_path("a b") == Path("a b")
    with pytest.raises(NoPlace, match=r"^s3://bucket/x: a URL, and only a path of this machine works here; mount it"):
        local_path("s3://bucket/x", "mount it")
    with pytest.raises(NoPlace, match="only a path of this machine"):
        ShardCache("s3://bucket/cache")
    with pytest.raises(NoPlace, match="only a path of this machine"):
        ImageDataset.open("s3://bucket/data")


def test_an_environment_variable_that_is_empty_is_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", " "):
        for name in ("NFM_CACHE", "XDG_CACHE_HOME", "NFM_PATIENCE"):
            monkeypatch.setenv(name, text)
        assert stated_path("NFM_CACHE") is None
        assert cache_base() == tmp_path / "home" / ".cache" / "nfm"
        assert patience() == 60
    monkeypatch.setenv("XDG_CACHE_HOME", "~/own")
    assert cache_base() == tmp_path / "home" / "own" / "nfm"
    monkeypatch.setenv("NFM_CACHE", "~/cache")
    assert cache_base() == tmp_path / "home" / "cache"


@pytest.mark.parametrize("text", ["s3://bucket/cache", "s3:/bucket/cache", "s3://k:secret@h/x"])
def test_an_environment_variable_that_cannot_be_used_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NFM_CACHE", text)
    with pytest.raises(WrongVariable, match=r"^NFM_CACHE=s3:/") as caught:
        cache_base()
    assert "secret" not in str(caught.value)


READERS: dict[str, Callable[[], object]] = {
    "NFM_ARTIFACTS": artifacts_root, "NFM_CACHE": cache_base, "NFM_SCRATCH": scratch_root, "NFM_PATIENCE": patience,
    "NFM_CACHE_BYTES": lambda: ShardCache("cache"), "XDG_CACHE_HOME": cache_base,
}  # fmt: skip


def test_every_variable_of_ours_has_its_reader_here() -> None:
    library = Path(__file__).resolve().parents[3]
    text = "".join(
        file.read_text() for room in ("storage", "stages", "pipeline") for file in (library / room).rglob("*.py")
    )
    assert set(re.findall(r"NFM_[A-Z_]+", text)) <= READERS.keys()


@pytest.mark.parametrize("variable", READERS)
def test_a_wrong_variable_is_told_as_itself_and_never_as_the_place_that_was_read(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.raises(WrongVariable, match=f"^{variable}={tmp_path}/file: (a file, and a folder|write a number)"):
        READERS[variable]()


def test_a_file_where_artifacts_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "artifacts").touch()
    with pytest.raises(NoPlace, match=r"artifacts: a file, and a folder is needed; .*; or let NFM_ARTIFACTS name one"):
        artifacts_root()


@pytest.mark.parametrize("text", ["s3:/bucket/x", "~no-such-user/x", "s4://x", ""])
def test_the_library_makes_no_folder_of_what_is_no_place(text: str, tmp_path: Path) -> None:
    with pytest.raises(NoPlace):
        PairStore.open(text)
    with pytest.raises(NoPlace):
        ShardCache(text)
    with pytest.raises(NoPlace):
        ImageDataset.open(text)
    assert not list(tmp_path.iterdir())


def test_an_export_goes_to_the_place_that_was_written(
    make_store: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PairStore.open(make_store(draws=1))  # type: ignore[operator]
    with pytest.raises(NoPlace, match="two slashes"):
        export(source, "s3:/bucket/x")
    for text, where in (("~/a", "home/a"), (f"file://{tmp_path}/b%20c", "b c"), ("./s3:/d", "s3:/d"), ("e:f", "e:f")):
        export(source, text)
        assert len(PairStore.open(tmp_path / where)) == len(source)
        assert len(PairStore.open(text)) == len(source)


def test_a_store_is_opened_by_the_beginning_of_its_fingerprint(make_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("3fa9c1d0b2e4", "3fa9ffd0b2e4"):
        make_store(1, name=f"art/pairs/{name}")
    monkeypatch.setenv("NFM_ARTIFACTS", "art")
    for text in ("3fa9c1", "pairs/3fa9c1d", "3fa9c1d0b2e4", "art/pairs/3fa9c1d0b2e4"):
        assert PairStore.open(text).root.name == "3fa9c1d0b2e4"
    with pytest.raises(StorageError, match=r"3fa9 names several stores.*3fa9c1d0b2e4, 3fa9ffd0b2e4; write more"):
        PairStore.open("3fa9")
    with pytest.raises(NoPlace, match=r"abcd: no such folder in .*, and no store in art/pairs .*`nfm ls`"):
        PairStore.open("abcd")
    with pytest.raises(NoPlace, match=f"shop: no such folder in {tmp_path}, nor the beginning of a fingerprint"):
        PairStore.open("shop")
    make_store(2, name="3fa9")  # what is there is itself
    assert PairStore.open("3fa9").draws == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PairStore.open("~/art/pairs/3fa9ffd0b2e4").draws == 1
