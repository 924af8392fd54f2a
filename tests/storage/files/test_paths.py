"""A store's root is a folder or a URL; what goes wrong with a URL is one message that names it and the remedy."""

from __future__ import annotations

import multiprocessing
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nfm.storage import PairStore
from nfm.storage.errors import Misused, NoPlace, StorageError, WrongVariable
from nfm.storage.files import atomic
from nfm.storage.files.copies.cache import ShardCache
from nfm.storage.files.paths import as_path, exists, is_remote, names_in, remove, size_of
from nfm.storage.files.remote import patience
from nfm.storage.files.small_files import read_bytes
from tests.support.buckets.s3server import S3, new_clients
from tests.support.patience import PATIENCE, allowed


def test_urls_of_this_machine_are_plain_paths(tmp_path: Path) -> None:
    assert as_path(str(tmp_path)) == as_path(tmp_path) == as_path(f"file://{tmp_path}") == tmp_path
    assert not is_remote(as_path(f"file://{tmp_path}"))
    assert is_remote(as_path("s3://bucket/store"))
    assert str(as_path("s3://bucket/store") / "commits" / "a.json") == "s3://bucket/store/commits/a.json"


@pytest.fixture(params=["here", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder here, in fsspec's memory, or on an S3 server; it does not exist yet."""
    if request.param == "here":
        return tmp_path / "store"
    if request.param == "memory":
        return as_path(f"memory://{tmp_path.name}")
    return as_path(request.getfixturevalue("bucket")) / "store"


def test_a_missing_file_is_not_an_error_and_is_not_cached(folder: Path) -> None:
    file = folder / "sub" / "a"
    assert (names_in(folder), size_of(file), exists(file), exists(folder)) == ([], None, False, False)
    remove(file)
    atomic.write_bytes(file, b"12345")
    assert (names_in(folder), names_in(folder / "sub"), names_in(file)) == (["sub"], ["a"], [])
    assert (size_of(file), size_of(folder / "sub")) == (5, None)
    assert exists(file)
    assert exists(folder / "sub")
    assert read_bytes(file) == b"12345"
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "b")
    remove(file)
    assert (size_of(file), names_in(folder / "sub")) == (None, [])


def test_an_empty_object_reads_as_no_bytes(folder: Path) -> None:
    atomic.write_bytes(folder / "empty", b"")
    assert (read_bytes(folder / "empty"), size_of(folder / "empty")) == (b"", 0)
    assert atomic.hash_file(folder / "empty") == (atomic.digest(b""), 0)


def said(root: str) -> str:
    """What the library says of a URL that cannot be used; every way of asking must fail with a StorageError."""
    path = as_path(f"{root}/store")
    messages = []
    for ask in (
        lambda: atomic.read_json(path / "spec.json"),
        lambda: names_in(path),
        lambda: size_of(path / "a"),
        lambda: atomic.create_bytes(path / "a", b"a"),
    ):
        with pytest.raises(StorageError) as caught:
            ask()
        messages.append(str(caught.value))
    assert all(message.startswith(f"{root}/store") for message in messages)
    return "\n".join(messages)


def test_a_bucket_that_is_not_there_is_named(s3: S3) -> None:
    assert said("s3://no-such-bucket").count("there is no such bucket: create it") == 4


@pytest.mark.parametrize(
    ("scheme", "variable", "text", "told"),
    [
        ("s3", "AWS_ENDPOINT_URL", "nonsense", "is nonsense"),
        ("s3", "AWS_ENDPOINT_URL", "http://user:secret@127.0.0.1:99999", r"is http://\*\*\*@127.0.0.1:99999"),
        ("s3", "AWS_ENDPOINT_URL_S3", "http://[::1", r"is http://\[::1"),
        ("gs", "STORAGE_EMULATOR_HOST", "http://127.0.0.1:99999", "is http://127.0.0.1:99999"),
        ("az", "AZURE_STORAGE_CONNECTION_STRING", "secret", "is set"),
    ],
)  # fmt: skip
def test_an_endpoint_that_is_none_is_wrong_use_and_named_with_its_variable(
    scheme: str, variable: str, text: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "k")
    monkeypatch.setenv(variable, text)
    new_clients()
    try:
        for ask in (atomic.read_json, names_in, lambda path: atomic.create_bytes(path, b"a")):
            with pytest.raises(
                Misused,
                match=rf"^{scheme}://bucket/x: cannot .*; check the URL and the endpoint \({variable} {told}",
            ) as caught:
                ask(as_path(f"{scheme}://bucket/x"))
            assert "secret" not in str(caught.value)
    finally:
        new_clients()


def test_a_name_that_no_bucket_has_is_wrong_use(s3: S3) -> None:
    with pytest.raises(Misused, match="No_Bucket"):
        names_in(as_path("s3://No_Bucket!/x"))


def test_missing_credentials_are_named_with_the_variables_to_set(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    new_clients()
    assert said("s3://bucket").count("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") == 4
    new_clients()


@pytest.mark.parametrize(
    "code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"]
)
def test_denied_access_is_named_at_once(code: str, s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.fail("error", status=403, code=code, times=100)
    monkeypatch.setenv("NFM_PATIENCE", str(PATIENCE))  # what trying again would take
    began = time.monotonic()
    assert said(bucket).count("access is denied: check the credentials") == 4
    assert time.monotonic() - began < PATIENCE


def test_an_endpoint_that_does_not_answer_is_named(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setenv("NFM_PATIENCE", "0.3")
    new_clients()
    assert said("s3://bucket").count("check the network and the endpoint (AWS_ENDPOINT_URL is http://127") == 4
    new_clients()


def test_a_server_that_never_answers_ends_in_an_error(s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.config

    monkeypatch.setenv("NFM_PATIENCE", "0.3")
    short = {"config_kwargs": {"read_timeout": 0.1, "retries": {"total_max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", short)
    s3.fail("delay", "store", times=1000, seconds=0.3)
    with pytest.raises(StorageError, match=f"{bucket}/store/spec.json: cannot read .*check the network"):
        atomic.read_json(as_path(f"{bucket}/store/spec.json"))


def test_a_server_that_recovers_is_not_noticed(s3: S3, bucket: str) -> None:
    file = as_path(bucket) / "store" / "a"
    for kind, how in (("error", {"status": 500, "code": "InternalError"}), ("reset", {}), ("error", {"status": 429})):
        s3.faults.clear()
        s3.fail(kind, "store", times=2, **how)  # type: ignore[arg-type]
        atomic.write_bytes(file, kind.encode())
        s3.fail(kind, "store", times=2, **how)  # type: ignore[arg-type]
        assert read_bytes(file) == kind.encode()
        s3.fail(kind, "store", times=2, **how)  # type: ignore[arg-type]
        assert names_in(file.parent) == ["a"]
        s3.fail(kind, "store", times=2, **how)  # type: ignore[arg-type]
        assert size_of(file) == len(kind)


def test_an_unknown_protocol_and_an_invalid_number_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"^s4://bucket/x: .*use a folder, s3://"):
        as_path("s4://bucket/x")
    monkeypatch.setenv("NFM_PATIENCE", "long")
    with pytest.raises(StorageError, match="NFM_PATIENCE=long: write a number of seconds"):
        names_in(as_path("memory://x"))


@pytest.mark.parametrize("variable", ["NFM_PATIENCE", "NFM_CACHE_BYTES"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e30", "long", "1,5"])
def test_a_number_of_the_environment_is_one_within_its_range(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(WrongVariable, match=f"{variable}={value}: write a number of (seconds|bytes) from 0 to"):
        patience() if variable == "NFM_PATIENCE" else ShardCache(Path("nowhere"))


def test_a_server_that_hangs_is_left_when_the_patience_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    for stated in ("10", "30", "60"):
        monkeypatch.setenv("NFM_PATIENCE", stated)
        limits = getattr(as_path("s3://bucket/x"), "storage_options")["config_kwargs"]  # noqa: B009  a URL's alone
        for limit in ("connect_timeout", "read_timeout"):
            assert 2 * limits[limit] <= float(stated), "a request that hangs is tried once more"


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from nfm.storage.files.paths import as_path, names_in\n"
        "from nfm.storage.errors import StorageError\n"
        "try: names_in(as_path('s3://bucket/x'))\n"
        "except StorageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "s3://bucket/x" in done.stdout
    assert "s3fs" in done.stdout


def read_in_child(path: Path, answers: object) -> None:
    answers.put(read_bytes(path))  # type: ignore[attr-defined]


def test_a_path_made_before_a_fork_is_read_on_both_sides_of_it(s3: S3, bucket: str) -> None:
    file = as_path(bucket) / "a"
    atomic.write_bytes(file, b"data")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=read_in_child, args=(file, answers))
    process.start()
    process.join(timeout=PATIENCE)
    assert process.exitcode == 0
    assert answers.get() == b"data"
    began = time.monotonic()
    assert read_bytes(file) == b"data"
    assert time.monotonic() - began < allowed(
        5
    )  # what the child closes at its end, the parent would wait for until a timeout


def test_a_host_that_does_not_answer_by_http_is_no_place_without_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/store"
    monkeypatch.setenv("NFM_PATIENCE", "0.3")
    for look in (exists, size_of, lambda path: PairStore.open(str(path))):
        with pytest.raises(StorageError, match=r"Cannot connect.*check the network and the endpoint") as told:
            look(as_path(url))
        assert not isinstance(told.value, NoPlace)
