"""The shared parts of the cases: a store that is being made, three ways to make it, and the checks at the end."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nfm.storage import PairStore
from nfm.storage.files.paths import TEMPORARY
from nfm.storage.format.index import record_keys
from nfm.storage.format.spec import read_spec
from nfm.storage.ledger import commits
from tests.conftest import Lab
from tests.faults.counts import COUNTS
from tests.support.patience import PATIENCE, allowed

DRAWS = 4
SMALL = ("pairs.rows_per_shard=8", "pairs.rows_per_block=8", "pairs.batch_size=8")  # 32 shards a draw
KILLPOINTS = Path(__file__).resolve().parent / "killpoints"
TASKS = 2  # of the slurm executor's array
# A file of an attempt, or the temporary file that was to become one.
_ATTEMPT = re.compile(r"(?:shards|index)/(?:\.tmp-\d+-\w+-)?d\d{3}-s\d{5,}\.(?P<attempt>[0-9a-f]{8})\.(?:tar|parquet)")


@dataclass
class Making:
    """A store of small shards that an executor makes in a lab which has data and a teacher."""

    lab: Lab
    executor: str
    draws: int = DRAWS
    sets: tuple[str, ...] = ()
    small: tuple[str, ...] = SMALL
    cluster: Mapping[str, str] = field(default_factory=dict)  # environment that leads to a Ray; else a local one
    workers: int = 2

    @property
    def store(self) -> Path:
        """The store; there is one nfm store in the lab."""
        found = [path.parent for path in self.lab.artifacts.glob("pairs/*/spec.json")]
        assert len(found) == 1, found
        return found[0]

    @property
    def settings(self) -> tuple[str, ...]:
        return (
            *self.small,
            f"pairs.draws={self.draws}",
            f"pairs.executor={self.executor}",
            f"pairs.workers={self.workers}",
            *self.sets,
        )

    @property
    def environment(self) -> dict[str, str]:
        return dict(self.cluster) if self.executor == "ray" else {}

    @property
    def dropped(self) -> int:
        """Attempts whose files may stay when the driver is stopped: Ray ends actors in the middle of a shard."""
        return self.workers if self.executor == "ray" else 0

    @property
    def shards(self) -> int:
        """How many shards the store has when it is complete."""
        return read_spec(self.store).shards_per_draw * self.draws

    def by(self, executor: str, **changes: object) -> Making:
        """The same store, made by another executor."""
        return Making(**{**vars(self), "executor": executor, **changes})  # type: ignore[arg-type]

    def arguments(self) -> list[str]:
        """`nfm run pairs` of this store."""
        return self.lab.arguments("pairs", *self.settings)

    def start(self, **environment: str) -> list[subprocess.Popen[str]]:
        """Begin to make the store: the driver's process, or those of the tasks of an array."""
        if self.executor != "slurm":
            return [self.lab.start(*self.arguments(), **self.environment, **environment)]
        file = self.plan()
        return [self.task(file, number, TASKS, **environment) for number in range(TASKS)]

    def plan(self) -> Path:
        """Freeze the list of what is pending."""
        file = self.lab.folder / f"list-{secrets.token_hex(4)}.json"
        sets = (part for text in self.settings for part in ("--set", text))
        self.command("pairs", "worklist", "-c", self.lab.config, *sets, "-o", file)
        return file

    def task(self, file: Path, number: int, of: int, **environment: str) -> subprocess.Popen[str]:
        """One task of an array."""
        return self.lab.start("pairs", "encode", file, "--task", number, "--of", of, **environment)

    def resume(self, exits: int = 0, **environment: str) -> str:
        """Run to the end what was begun; returns what was said."""
        said = ""
        for process in self.start(**environment):
            said += self.lab.wait(process, exits).stderr
        if self.executor == "slurm" and exits == 0:
            said += self.lab.run("pairs", *self.settings).stderr
        COUNTS.resumed[self.executor] += 1
        return said

    def command(self, *arguments: object, exits: int = 0) -> str:
        """`nfm` in this process, for what is not itself the case: it saves the seconds of a start."""
        done = self.lab.nfm(*arguments, exits=exits)
        return done.stdout + done.stderr

    def seal(self) -> None:
        """`nfm run pairs` in this process, where neither signals nor what is said are the case."""
        sets = (part for text in self.settings for part in ("--set", text))
        self.command("run", "pairs", "-c", self.lab.config, *sets)
        COUNTS.resumed[self.executor] += 1

    def committed(self) -> int:
        """How many shards are committed so far."""
        return len(list(self.lab.artifacts.glob("pairs/*/commits/d*.json")))

    def until(self, commits: int, processes: Sequence[subprocess.Popen[str]]) -> None:
        """Wait until so many commits stand, while the processes work."""
        self.lab.until(lambda: self.committed() >= commits, processes[0])

    def kill(self, process: subprocess.Popen[str]) -> bool:
        """SIGKILL; False when it had ended before."""
        process.kill()
        process.communicate()
        killed = process.returncode == -signal.SIGKILL
        COUNTS.killed[self.executor] += killed
        return killed

    def stop(self, processes: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
        """Ask all processes to stop."""
        for process in processes:
            process.send_signal(number)
        self.ended_by_signal(processes)

    def ended_by_signal(self, processes: Sequence[subprocess.Popen[str]], seconds: float = 10.0) -> None:
        """They end within these seconds, exit 130, and say that the same command goes on."""
        begun = time.monotonic()
        for process in processes:
            assert "goes on from here" in self.lab.wait(process, exits=130).stderr
        assert time.monotonic() - begun < allowed(seconds)
        COUNTS.stopped[self.executor] += len(processes)


def check_whole(making: Making, digest: str | None, orphans: int = 0, lacking: frozenset[str] = frozenset()) -> None:
    """The key set is exact, each key is there once, the audit is clean.

    And: the content is that of an uninterrupted serial run (`digest`; None where the batch shape differs), nothing lies
    in the store that no commit names, but what at most `orphans` killed attempts left. `lacking` are shards that the
    generation was allowed to lack.
    """
    store = PairStore.open(making.store)
    rows = range(store.spec.rows)
    expected = {key for draw in range(making.draws) for key in record_keys(draw, rows)}
    for name in lacking:
        draw, shard = int(name[1:4]), int(name.split("-s")[1])
        expected -= set(record_keys(draw, store.spec.slots_of(shard)))
    keys = Counter(store.index(["key"])["key"].to_pylist())
    COUNTS.checked += 1
    COUNTS.records_expected += len(expected)
    COUNTS.records_lost += len(expected - keys.keys())
    COUNTS.records_twice += sum(keys.values()) - len(keys)
    assert keys.keys() == expected
    assert set(keys.values()) == {1}
    if not lacking:
        for draw in range(making.draws):
            np.testing.assert_array_equal(store.gather(draw, np.arange(len(rows)))["slot"], np.arange(len(rows)))
    assert digest in (None, store.content_digest)
    assert "clean" in making.command("audit", making.store)
    _check_files(making, orphans, lacking)


def _check_files(making: Making, orphans: int, lacking: frozenset[str]) -> None:
    root = making.store
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    named = {"spec.json"} | {name for name in files if re.fullmatch(r"manifest\.g\d{4}\.json", name)}
    for commit in commits.committed(root, making.draws).values():
        named |= {f"commits/{commit.name}.json", commit.payload.path, commit.index.path}
    named |= {name for name in files if name.startswith(("events/", "audits/"))}
    named |= {f"failed/{name}.txt" for name in lacking}
    assert named <= files
    if orphans:
        named.add("lock.json")  # of a killed driver; whoever works here next takes it over
    attempts, others = set(), 0
    for name in sorted(files - named):
        match = _ATTEMPT.fullmatch(name)
        assert match or Path(name).name.startswith(TEMPORARY), f"{name}: neither committed nor left by an attempt"
        if match:
            attempts.add(match["attempt"])
        else:
            others += 1
    COUNTS.orphan_attempts += len(attempts)
    assert len(attempts) <= orphans, sorted(files - named)
    assert others <= orphans, sorted(files - named)


def killing(points: Mapping[str, tuple[int, Path]]) -> dict[str, str]:
    """The environment in which, at each point, the first process that passes it for the n-th time kills itself.

    `points` gives n and the file that whoever does it leaves.
    """
    kills = ",".join(f"{point}:{number}:{token}" for point, (number, token) in points.items())
    return {"PYTHONPATH": _path(), "NFM_TEST_KILL": kills}


def meeting(point: str, processes: int, folder: Path) -> dict[str, str]:
    """The environment in which processes wait for each other at `point` of every shard."""
    folder.mkdir()
    return {"PYTHONPATH": _path(), "NFM_TEST_MEET": f"{point}:{processes}:{folder}"}


def _path() -> str:
    return os.pathsep.join([str(KILLPOINTS), *filter(None, [os.environ.get("PYTHONPATH")])])


def actors_of(driver: subprocess.Popen[str]) -> list[int]:
    """Process numbers of the encoders on the local Ray of a driver, found among its descendants."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[pid] = (folder / "cmdline").read_bytes().decode(errors="replace")
    ours = {driver.pid}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return [pid for pid in ours if names.get(pid, "").startswith("ray::Worker")]


def ended(processes: Sequence[int], seconds: float = PATIENCE) -> None:
    """Wait until none of these processes is there any more."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        assert time.monotonic() < deadline, f"{processes}: outlive their driver"
        time.sleep(0.05)
