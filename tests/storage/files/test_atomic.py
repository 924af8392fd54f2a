"""Files appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path, names_in, remove
from nfm.storage.files.small_files import read_bytes
from tests.support.buckets.s3server import S3
from tests.support.patience import PATIENCE


def test_canonical_json_ignores_the_order_of_keys_and_has_no_spaces() -> None:
    assert atomic.canonical_json({"b": [1, (2.5, None)], "a": "é"}) == '{"a":"é","b":[1,[2.5,null]]}'.encode()
    assert atomic.canonical_json({"a": np.float32(0.5)}) == b'{"a":0.5}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_json_never_holds_nan_and_the_error_says_where(tmp_path: Path, value: float) -> None:
    with pytest.raises(StorageError, match=r"moments\.var"):
        atomic.write_json(tmp_path / "a.json", {"moments": {"var": value}})
    assert list(tmp_path.iterdir()) == []


def test_keys_that_would_read_back_differently_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="10"):
        atomic.write_json(tmp_path / "a.json", {"draws": {10: 1}})


def test_json_reads_back_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_json(path, {"name": "x", "rates": (1e-4, 2), "digest": "of an earlier version"})
    body = atomic.read_json(path)
    assert body["rates"] == [1e-4, 2]
    assert body["digest"] == atomic.digest(atomic.canonical_json({"name": "x", "rates": [1e-4, 2]}))
    path.write_text(path.read_text().replace('"x"', '"y"'))
    with pytest.raises(StorageError, match=r"a\.json.*digest.*restore"):
        atomic.read_json(path)


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[1]", "JSON list"), ("\xff\xfe", "JSON")])
def test_damaged_json_gives_one_clear_message(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError, match=said):
        atomic.read_json(path)
    with pytest.raises(StorageError, match="no such file"):
        atomic.read_json(tmp_path / "absent.json")


def test_create_leaves_what_is_there_and_replace_does_not(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a"
    assert atomic.create_bytes(path, b"first")
    assert not atomic.create_bytes(path, b"second")
    assert path.read_bytes() == b"first"
    atomic.write_bytes(path, b"third")
    assert path.read_bytes() == b"third"
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_of_many_creators_exactly_one_wins(tmp_path: Path) -> None:
    for round_ in range(20):
        path, won, barrier = tmp_path / f"{round_}.json", [], threading.Barrier(8)

        def create(number: int, path: Path = path, won: list = won, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if atomic.create_json(path, {"number": number}):
                won.append(number)

        threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [atomic.read_json(path)["number"]]


def test_hashing_file_states_the_digest_and_size_of_what_it_published(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(100_000)
    with atomic.HashingFile(tmp_path / "x") as file:
        file.write(data[:10])
        file.write(memoryview(data)[10:])
        assert not (tmp_path / "x").exists()
    assert (file.sha256, file.bytes) == (hashlib.sha256(data).hexdigest(), 100_000)
    assert atomic.hash_file(tmp_path / "x") == (file.sha256, file.bytes)


def test_an_error_while_writing_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "x", b"old")
    file = atomic.HashingFile(tmp_path / "x")
    with pytest.raises(TypeError), file:
        file.write("text is no bytes")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


WRITE = """
import sys
from nfm.storage import errors
from nfm.storage.files import atomic
try:
    with atomic.HashingFile(sys.argv[1] + "/big") as file:
        for _ in range(64):
            file.write(bytes(1 << 16))
except errors.StorageError as error:
    print(error)
    sys.exit(7)
"""


def _assert_reported(done: subprocess.CompletedProcess, folder: str, said: str, left: str) -> None:
    assert done.returncode == 7, done.stderr
    assert f"{folder}/big: cannot write" in done.stdout
    assert said in done.stdout
    assert left == "kept"


def test_a_full_disk_names_path_and_remedy_and_leaves_no_temporary(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    script = (
        f'mount -t tmpfs -o size=1m none "{folder}" || exit 77\n'
        f'echo kept > "{folder}/kept"; "{sys.executable}" -c "$0" "{folder}"; code=$?\n'
        f'ls -A "{folder}" >&2; exit $code'
    )
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, WRITE], capture_output=True, text=True, timeout=PATIENCE
        )
    except FileNotFoundError:
        pytest.skip("needs unshare to mount a small file system")
    if done.returncode in (1, 77):
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    _assert_reported(done, str(folder), "free space", done.stderr.strip())


def test_a_limit_on_file_sizes_names_path_and_remedy_and_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    done = subprocess.run(
        ["sh", "-c", f'ulimit -f 1024; "{sys.executable}" -c "$0" "{tmp_path}"', WRITE],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    _assert_reported(done, str(tmp_path), "ulimit", " ".join(os.listdir(tmp_path)))


REWRITE = """
import itertools, sys
from nfm.storage.files import atomic
for n in itertools.count():
    atomic.write_json(sys.argv[1], {"n": n, "pad": "x" * 200_000})
    print(n, flush=True)
"""


def test_a_killed_writer_leaves_the_old_or_the_new_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for wait in (0.0, 0.003, 0.007):
        child = subprocess.Popen([sys.executable, "-c", REWRITE, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert atomic.read_json(path)["pad"] == "x" * 200_000
    assert all(p == path or atomic.is_temporary(p) for p in tmp_path.iterdir())


def test_only_idle_temporary_files_are_cleared(tmp_path: Path) -> None:
    file = atomic.HashingFile(tmp_path / "sub" / "x")
    file.write(b"x")
    (tmp_path / "sub" / "kept.json").write_text(json.dumps({}))
    assert atomic.clear_temporaries(tmp_path) == []
    assert len(atomic.clear_temporaries(tmp_path, idle_seconds=0)) == 1
    file.discard()
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["kept.json"]


def test_every_changed_byte_of_a_json_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_json(path, {"name": "x é", "rates": [1e-4, 2, True, None], "deep": {"n": -0.0}})
    data = path.read_bytes()
    assert atomic.read_json(path)["deep"] == {"n": 0.0}
    for at in range(len(data)):
        for flip in (1, 0x20):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            with pytest.raises(StorageError, match=r"a\.json"):
                atomic.read_json(path)
    for other in (data + b"\n", data[:-1], data.replace(b"  ", b" "), b" " + data, data.replace(b"1e-4", b"0.0001")):
        if other != data:
            path.write_bytes(other)
            with pytest.raises(StorageError, match=r"a\.json"):
                atomic.read_json(path)


def test_json_without_a_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    with pytest.raises(StorageError, match="no digest of itself"):
        atomic.read_json(path)


@pytest.fixture(params=["here", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder here, in fsspec's memory, or on an S3 server."""
    if request.param == "here":
        return tmp_path / "store"
    if request.param == "memory":
        pytest.importorskip("upath")
        return as_path(f"memory://{tmp_path.name}")
    return as_path(request.getfixturevalue("bucket")) / "store"


def test_files_are_created_replaced_and_hashed_alike_here_and_on_object_stores(folder: Path) -> None:
    data = np.random.default_rng(0).bytes(100_000)
    assert atomic.create_bytes(folder / "c" / "a", b"first")
    assert not atomic.create_bytes(folder / "c" / "a", b"second")
    atomic.write_bytes(folder / "c" / "b", b"old")
    atomic.write_bytes(folder / "c" / "b", b"new")
    assert [read_bytes(folder / "c" / name) for name in "ab"] == [b"first", b"new"]
    assert atomic.create_json(folder / "c" / "j", {"a": 1})
    assert not atomic.create_json(folder / "c" / "j", {"a": 2})
    assert atomic.read_json(folder / "c" / "j")["a"] == 1
    for content, replace in ((data, True), (data[::-1], False), (data, False)):
        with atomic.HashingFile(folder / "c" / "a", replace) as file:
            file.write(content[:10])
            file.write(content[10:])
        assert (file.sha256, file.bytes) == (atomic.digest(content), len(content))
        assert atomic.hash_file(folder / "c" / "a") == (atomic.digest(data), len(data))
    with atomic.HashingFile(folder / "c" / "new", replace=False) as file:
        file.write(data)
    assert file.published
    remove(folder / "c" / "new")
    assert names_in(folder / "c") == ["a", "b", "j"]
    with pytest.raises(StorageError, match="absent"):
        atomic.hash_file(folder / "absent")


def test_an_error_while_uploading_leaves_nothing_there_or_here(s3: S3, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError), atomic.HashingFile(as_path(bucket) / "x") as file:
        file.write("text is no bytes")  # type: ignore[arg-type]
    assert names_in(as_path(bucket)) == []
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


def test_placing_gives_a_file_its_name_and_may_be_repeated(folder: Path) -> None:
    source, target = folder / "staged" / "a", folder / "d000" / "c" / "0"
    atomic.write_bytes(source, b"data")
    atomic.place(source, target)
    assert (read_bytes(target), names_in(folder / "staged")) == (b"data", [])
    atomic.place(source, target, 4)  # killed after its end
    atomic.write_bytes(source, b"data")
    atomic.place(source, target, 4)  # killed in its middle
    assert (read_bytes(target), names_in(folder / "staged")) == (b"data", [])
    with pytest.raises(CorruptShard, match="4 bytes, 5 were committed"):
        atomic.place(source, target, 5)
    atomic.write_bytes(source, b"else")
    with pytest.raises(StorageError, match="damaged, or of another run"):
        atomic.place(source, target, 4)
    assert (read_bytes(source), read_bytes(target)) == (b"else", b"data")
    with pytest.raises(MissingShard, match="none"):
        atomic.place(folder / "none", folder / "neither")


@pytest.mark.parametrize("kind", ["error", "reset", "lose"])
def test_a_conditional_put_whose_answer_fails_tells_the_truth(kind: str, s3: S3, bucket: str) -> None:
    mine, theirs = as_path(bucket) / "mine", as_path(bucket) / "theirs"
    s3.fail(kind, "/mine", method="PUT", times=2)  # type: ignore[arg-type]
    assert atomic.create_bytes(mine, b"mine")
    assert read_bytes(mine) == b"mine"
    atomic.write_bytes(theirs, b"theirs")
    s3.fail(kind, "/theirs", method="PUT", times=2)  # type: ignore[arg-type]
    assert not atomic.create_bytes(theirs, b"mine")
    assert read_bytes(theirs) == b"theirs"


def test_a_put_whose_answers_are_all_lost_is_known_by_what_is_stored(
    s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFM_PATIENCE", "0.5")
    s3.fail("lose", "/mine", method="PUT", times=1000)
    assert atomic.create_bytes(as_path(bucket) / "mine", b"mine")
    file = atomic.HashingFile(as_path(bucket) / "mine2", replace=False)
    with file:
        file.write(b"mine too")
    assert file.published


def test_pieces_that_a_second_thread_hashes_have_the_same_digest_and_free_buffers(tmp_path: Path) -> None:
    buffer, sha = bytearray(3 << 20), hashlib.sha256()
    with atomic.HashingFile(tmp_path / "x") as file:
        for number in range(20):
            buffer[:] = bytes([number]) * len(buffer)
            sha.update(buffer)
            file.write(memoryview(buffer))
            buffer[:] = bytes(len(buffer))
            file.write(b"small")
            sha.update(b"small")
    assert file.sha256 == sha.hexdigest()
    assert atomic.hash_file(tmp_path / "x") == (file.sha256, file.bytes)


def test_two_processes_may_place_the_same_files_at_once(tmp_path):
    names = [f"{number:03d}" for number in range(300)]
    for name in names:
        atomic.write_bytes(tmp_path / "from" / name, name.encode())
    errors = []

    def work() -> None:
        try:
            for name in names:
                atomic.place(tmp_path / "from" / name, tmp_path / "to" / name / name, 3)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [(tmp_path / "to" / name / name).read_bytes() for name in names] == [name.encode() for name in names]
    assert not list((tmp_path / "from").iterdir())
