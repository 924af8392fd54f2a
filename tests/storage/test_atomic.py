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

from nfm.storage import atomic
from nfm.storage.errors import StorageError


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
from nfm.storage import atomic, errors
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
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script, WRITE], capture_output=True, text=True, timeout=60)
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
        timeout=60,
    )
    _assert_reported(done, str(tmp_path), "ulimit", " ".join(os.listdir(tmp_path)))


REWRITE = """
import itertools, sys
from nfm.storage import atomic
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
