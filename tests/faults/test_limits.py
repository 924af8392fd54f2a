"""A full disk and a machine without memory: clear messages, no half-written file, and the work continues."""

from __future__ import annotations

import resource
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.storage.files import atomic
from nfm.storage.ledger import commits
from tests.conftest import Lab
from tests.e2e.bad_input.test_bad_input import small_disk as small_disk
from tests.faults.harness import Making, check_whole

if TYPE_CHECKING:
    from tests.faults.conftest import Uninterrupted


@pytest.fixture
def lab(bare: Lab) -> Lab:
    """What `small_disk` is made for."""
    return bare


class OnDisk(Lab):
    """A lab whose artifacts are on the small disk."""

    @property
    def artifacts(self) -> Path:
        return self.folder / "disk"


@pytest.mark.faults
def test_a_disk_that_fills_up_is_named_and_with_room_again_the_same_command_completes(
    bare: Lab, executor: str, small_disk: Path, uninterrupted: Uninterrupted
) -> None:
    full = OnDisk(bare.folder)
    making = Making(full, executor)
    data = {path: atomic.hash_file(path) for path in sorted(small_disk.rglob("*")) if path.is_file()}
    processes = making.start()
    for process in processes:
        said = full.wait(process, exits=1).stderr
        assert "No space left on device" in said
        assert "free space" in said
        assert str(small_disk) in said.splitlines()[-1]
    assert all(atomic.hash_file(path) == digest for path, digest in data.items())
    store = next(small_disk.glob("pairs/*"))
    assert not list(store.glob("manifest*"))
    if executor != "ray":  # whose other actors are ended with shards in hand
        assert not list(store.rglob(".tmp-*"))
    assert not list(store.glob("lock*"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert "committed already" in making.resume()
    check_whole(making, uninterrupted(4), orphans=making.dropped)


BIG = ("pairs.rows_per_shard=64", "pairs.rows_per_block=64")
BATCH = 32_768  # what every batch of 64 pairs is padded to, which takes over 700 MiB
ROOM = 300 * 2**20


def peak(process: subprocess.Popen[str]) -> int:
    """The largest address space that a process had, in bytes."""
    most = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmPeak"):
                most = max(most, int(line.split()[1]) * 1024)
        time.sleep(0.002)
    return most


@pytest.mark.faults
@pytest.mark.parametrize("executor", ["serial", "slurm"], indirect=True)
def test_a_batch_that_does_not_fit_into_memory_is_halved_and_its_commit_says_so(
    made: Lab, bare: Lab, tmp_path: Path, executor: str
) -> None:
    """The address space may grow to what a run with small batches needs, and ROOM."""
    small = Making(bare, "serial", 1, small=(*BIG, "pairs.batch_size=64"))
    process = small.start()[0]
    limit = peak(process) + ROOM
    bare.wait(process)
    (bare.artifacts / "pairs").rename(tmp_path / "small")

    making = Making(bare, executor, 1, small=(*BIG, f"pairs.batch_size={BATCH}"))
    processes = making.start()
    for process in processes:
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    said = [bare.wait(process).stderr for process in processes]
    if executor == "slurm":
        making.seal()
    used = {commit.batch_size for commit in commits.committed(making.store, 1).values()}
    assert all(size is not None and BATCH % size == 0 for size in used)
    assert min(size or 0 for size in used) < BATCH  # the first shard may fit: pyarrow has reserved nothing yet
    assert all(f"out of memory in batches of {BATCH}" in text for text in said)
    check_whole(making, None)
