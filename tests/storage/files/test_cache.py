"""Copies of remote files are right, fetched once, bounded, and gone with their process."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files.copies.cache import ShardCache
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import as_path, size_of
from tests.support.buckets.s3server import S3, new_clients
from tests.support.patience import PATIENCE

SIZE = 10_000


class Wanted(NamedTuple):
    path: Path
    sha256: str
    bytes: int


def below(files: list[Wanted]) -> tuple[Path, list[StoredFile]]:
    """The files, as a store names its own."""
    return files[0].path.parent, [StoredFile(file.path.name, file.sha256, file.bytes) for file in files]


def wanted(root: str | Path, number: int, size: int = SIZE) -> Wanted:
    """A file at `root`, written there if it is not."""
    path, data = as_path(root) / f"f{number}", np.random.default_rng(number).bytes(size)
    if not path.exists():
        path.write_bytes(data)
    return Wanted(path, hashlib.sha256(data).hexdigest(), size)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> str:
    """A folder of fsspec's memory file system."""
    pytest.importorskip("upath")
    return f"memory://{request.node.name}"


def held(folder: Path) -> int:
    return sum(size_of(path) or 0 for path in folder.iterdir())


def test_a_local_file_is_itself(tmp_path: Path) -> None:
    file = wanted(tmp_path, 0)
    cache = ShardCache(tmp_path / "cache")
    assert cache.local(*file) == file.path
    assert not (tmp_path / "cache").exists()


def test_a_remote_file_is_fetched_once_and_named_by_its_content(s3: S3, bucket: str, tmp_path: Path) -> None:
    file, cache = wanted(bucket, 0), ShardCache(tmp_path / "c")
    s3.requests.clear()
    copies = [cache.local(*file) for _ in range(3)]
    assert copies == [tmp_path / "c" / file.sha256] * 3
    assert hashlib.sha256(copies[0].read_bytes()).hexdigest() == file.sha256
    assert s3.count("GET", "f0") == 1
    assert ShardCache(tmp_path / "c").local(*file) == copies[0]
    assert s3.count("GET", "f0") == 1


def test_a_large_file_arrives_in_pieces(s3: S3, bucket: str, tmp_path: Path) -> None:
    file, cache = wanted(bucket, 0, 20_000_001), ShardCache(tmp_path / "c")
    s3.requests.clear()
    s3.fail("cut", "f0", method="GET", times=2)
    assert hashlib.sha256(cache.local(*file).read_bytes()).hexdigest() == file.sha256
    assert s3.count("GET", "f0") == 3 + 2


def test_threads_fetch_a_file_once(s3: S3, bucket: str, tmp_path: Path) -> None:
    file, cache = wanted(bucket, 0), ShardCache(tmp_path / "c")
    s3.requests.clear()
    s3.fail("delay", "f0", seconds=0.2)
    at_once([partial(cache.local, *file)] * 8)
    assert os.listdir(tmp_path / "c") == [file.sha256]
    assert s3.count("GET", "f0") == 1


@pytest.mark.parametrize("kind", ["cut", "shrink", "flip", "error", "reset"])
def test_what_arrives_damaged_is_fetched_again(kind: str, s3: S3, bucket: str, tmp_path: Path) -> None:
    file, cache = wanted(bucket, 0), ShardCache(tmp_path / "c")
    s3.fail(kind, "f0", method="GET", times=2)  # type: ignore[arg-type]
    assert hashlib.sha256(cache.local(*file).read_bytes()).hexdigest() == file.sha256
    assert s3.faults[0].times == 0


@pytest.mark.parametrize("checked", ["when_supported", "when_required"])  # by botocore; not every store has checksums
@pytest.mark.parametrize("kind", ["shrink", "flip"])
def test_what_stays_damaged_is_named_and_never_handed_out(
    kind: str, checked: str, s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = wanted(bucket, 0), ShardCache(tmp_path / "c")
    s3.fail(kind, "f0", method="GET", times=100)  # type: ignore[arg-type]
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", checked)
    new_clients()
    said = (
        {"shrink": "5000 bytes arrived, 10000", "flip": "SHA-256"}[kind] if checked == "when_required" else "checksum"
    )
    with pytest.raises(CorruptShard, match=f"{bucket}/f0.*{said}.*3 times"):
        cache.local(*file)
    assert os.listdir(tmp_path / "c") == []
    new_clients()


def test_a_file_that_was_cut_or_is_gone_is_named(s3: S3, bucket: str, tmp_path: Path) -> None:
    file, cache = wanted(bucket, 0), ShardCache(tmp_path / "c")
    file.path.write_bytes(b"")
    with pytest.raises(CorruptShard, match=f"{bucket}/f0: 0 bytes arrived, 10000 were committed"):
        cache.local(*file)
    file.path.unlink()
    with pytest.raises(MissingShard, match=f"{bucket}/f0"):
        cache.local(*file)


def test_a_server_that_stays_down_ends_in_an_error_not_in_a_hang(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = wanted(bucket, 0), ShardCache(tmp_path / "c")
    monkeypatch.setenv("NFM_PATIENCE", "0.5")
    s3.fail("error", "f0", times=1000)
    with pytest.raises(StorageError, match=f"{bucket}/f0.*kept failing"):
        cache.local(*file)
    assert os.listdir(tmp_path / "c") == []


def test_the_digest_of_a_hostile_manifest_is_no_path(memory: str, tmp_path: Path) -> None:
    file, cache = wanted(memory, 0), ShardCache(tmp_path / "c")
    with pytest.raises(CorruptShard, match="no SHA-256"):
        cache.local(file.path, "../../outside", file.bytes)


def test_the_bound_holds_and_what_was_used_last_stays(memory: str, tmp_path: Path) -> None:
    files = [wanted(memory, number) for number in range(6)]
    cache = ShardCache(tmp_path / "c", 3 * SIZE)
    for file in files[:3]:
        cache.local(*file)
    cache.local(*files[0])
    cache.local(*files[3])
    assert {path.name for path in (tmp_path / "c").iterdir()} == {files[n].sha256 for n in (0, 2, 3)}
    for file in files * 2:
        assert cache.local(*file).stat().st_size == SIZE
        assert held(tmp_path / "c") <= 3 * SIZE
    before = cache.evictions
    paths = cache.together(*below([files[0], files[4], files[1]]))
    assert all(path.exists() for path in paths)
    assert cache.evictions > before
    assert [cache.holds(file.sha256) for file in files] == [True, True, False, False, True, False]


def test_a_cache_travels_to_other_processes_as_its_settings(tmp_path: Path) -> None:
    given = pickle.loads(pickle.dumps(ShardCache(tmp_path / "c", 99)))
    assert (given.folder, given.max_bytes) == (tmp_path / "c", 99)


def at_once(works: list[Callable[[], Any]]) -> None:
    """Each in a thread of its own; what one of them raises is raised here."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


@pytest.mark.parametrize("together", [1, 2, 3])
def test_the_bound_holds_for_threads_that_fetch_at_once(together: int, memory: str, tmp_path: Path) -> None:
    files = [wanted(memory, number) for number in range(12)]
    cache, most = ShardCache(tmp_path / "c", 3 * SIZE), [0]

    def opener(paths: list[Path]) -> list[bytes]:
        time.sleep(0.001)  # for the others
        return [path.read_bytes() for path in paths]

    def read(mine: list[Wanted]) -> None:
        for start in range(len(mine)):
            some = (mine + mine)[start : start + together]
            assert [hashlib.sha256(data).hexdigest() for data in cache.opened(*below(some), opener)] == [
                f.sha256 for f in some
            ]
            most[0] = max(most[0], held(tmp_path / "c"))

    at_once([partial(read, files[number::4]) for number in range(4)])
    assert most[0] <= 3 * SIZE
    assert not cache._kept


def test_files_that_are_here_wait_for_the_room_that_others_were_promised(memory: str, tmp_path: Path) -> None:
    files = [wanted(memory, number) for number in range(6)]
    cache, opened = ShardCache(tmp_path / "c", 3 * SIZE), threading.Event()
    cache.together(*below(files[:3]))
    with cache._keeping(*below(files[3:])):  # a thread that is about to fetch these
        other = threading.Thread(target=lambda: cache.opened(*below(files[:3]), lambda _: opened.set()))
        other.start()
        assert not opened.wait(0.2)
    other.join(PATIENCE)
    assert opened.is_set()


def test_a_file_that_a_thread_is_opening_stays_while_others_fetch(memory: str, tmp_path: Path) -> None:
    files = [wanted(memory, number) for number in range(6)]
    cache = ShardCache(tmp_path / "c", 2 * SIZE)

    def opener(paths: list[Path]) -> bytes:
        at_once([partial(cache.local, *file) for file in files[1:]])
        assert held(tmp_path / "c") <= 2 * SIZE
        return paths[0].read_bytes()

    calls: list[int] = []
    assert len(cache.opened(*below(files[:1]), lambda paths: calls.append(1) or opener(paths))) == SIZE
    assert calls == [1]


def test_an_evicted_file_is_fetched_again_before_it_is_opened(memory: str, tmp_path: Path) -> None:
    file, cache, calls = wanted(memory, 0), ShardCache(tmp_path / "c"), []

    def opener(paths: list[Path]) -> bytes:
        calls.append(paths[0])
        if len(calls) == 1:
            paths[0].unlink()  # as another process's eviction would
        return paths[0].read_bytes()

    assert len(cache.opened(*below([file]), opener)) == SIZE
    assert len(calls) == 2


def test_a_file_that_others_evict_whenever_it_arrives_says_what_to_raise(memory: str, tmp_path: Path) -> None:
    file, cache = wanted(memory, 0), ShardCache(tmp_path / "c")

    def evicted(paths: list[Path]) -> bytes:
        paths[0].unlink()
        return paths[0].read_bytes()

    with pytest.raises(StorageError, match=r"f0 before it can be opened, 20 times; raise NFM_CACHE_BYTES"):
        cache.opened(*below([file]), evicted)
    assert not cache._kept


def test_a_shard_larger_than_the_bound_says_what_to_raise(memory: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "c", SIZE - 1)
    with pytest.raises(StorageError, match=r"needs 10000 bytes.*9999.*NFM_CACHE_BYTES"):
        cache.local(*wanted(memory, 0))


def test_the_default_bound_leaves_half_of_the_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    assert ShardCache(tmp_path).max_bytes == pytest.approx(shutil.disk_usage(tmp_path).free / 2, rel=0.2)
    monkeypatch.setenv("NFM_CACHE_BYTES", "2e6")
    assert ShardCache(tmp_path).max_bytes == 2_000_000
    monkeypatch.setenv("NFM_CACHE_BYTES", "much")
    with pytest.raises(StorageError, match="NFM_CACHE_BYTES=much"):
        ShardCache(tmp_path)


def child(cache: ShardCache, file: Wanted, answers: Any) -> None:
    """Fetches a file in a forked process, says where it is, and stays until it is killed."""
    path = cache.local(*file)
    assert len(path.read_bytes()) == file.bytes
    answers.put(path)
    signal.pause()


@pytest.fixture
def fork() -> Iterator[Callable[[ShardCache, Wanted], tuple[Any, Any]]]:
    """fork(cache, file) -> (a child that fetches it, the queue in which it says where it is)."""
    context = multiprocessing.get_context("fork")
    children = []

    def start(cache: ShardCache, file: Wanted) -> tuple[Any, Any]:
        answers = context.SimpleQueue()
        children.append(context.Process(target=child, args=(cache, file, answers)))
        children[-1].start()
        return children[-1], answers

    yield start
    for process in children:
        process.kill()
        process.join()


def test_processes_share_a_folder_that_is_given(s3: S3, bucket: str, tmp_path: Path, fork: Any) -> None:
    file, shared = wanted(bucket, 0), tmp_path / "shared"
    s3.requests.clear()
    s3.fail("delay", "f0", seconds=0.3, times=2)
    cache = ShardCache(shared)
    started = [fork(cache, file) for _ in range(2)]
    assert [answers.get() for _, answers in started] == [shared / file.sha256] * 2
    assert os.listdir(shared) == [file.sha256]
    assert cache.local(*file) == shared / file.sha256
    assert s3.count("GET", "f0") <= 2


def test_the_folder_of_a_process_goes_with_it_and_after_a_kill_with_the_next(
    s3: S3, bucket: str, tmp_path: Path, fork: Any
) -> None:
    file, cache = wanted(bucket, 0), ShardCache()
    mine = cache.local(*file)
    killed, answers = fork(cache, file)
    theirs = answers.get()
    assert theirs.name == mine.name
    assert theirs.parent != mine.parent
    killed.kill()
    killed.join()
    assert theirs.exists()
    _, answers = fork(cache, file)
    other = answers.get()
    assert {*(tmp_path / "cache").glob("p*[!k]")} == {other.parent, mine.parent}


def test_an_orderly_end_leaves_no_folder(tmp_path: Path, memory: str) -> None:
    code = "from nfm.storage.files.copies.cache import default_cache as c; assert c() is c(); print(c().folder)"
    environment = {**os.environ, "NFM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert Path(done.stdout.strip()).parent == tmp_path / "cache"
    assert os.listdir(tmp_path / "cache") == []


def forked(cache: ShardCache, file: Wanted, answers: Any) -> None:
    answers.put(cache.local(*file))


def test_a_fork_while_a_thread_holds_the_cache_neither_hangs_nor_shares(s3: S3, bucket: str) -> None:
    file, cache = wanted(bucket, 0), ShardCache()
    mine, context = cache.local(*file), multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=forked, args=(cache, file, answers))
    with cache._lock, cache._arrived:
        process.start()
    process.join(timeout=PATIENCE)
    assert process.exitcode == 0
    theirs = answers.get()
    assert theirs.parent != mine.parent
    assert not theirs.parent.exists()
    assert mine.exists()
