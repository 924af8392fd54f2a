"""An exclusive lock on the folder of an artifact, which does not outlive its holder.

The lock names its holder and has a heartbeat counter. It is stale if its holder is known to be dead (same machine, same
process namespace), or if the counter has not changed for 60 s on the observer's own clock. So the clocks of different
hosts do not matter. lock_places.py keeps it, in a file or in an object of a bucket. Of several processes that take over
a stale lock only one succeeds.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from nfm.pipeline.artifacts.lock_places import place_for
from nfm.storage.errors import StorageError, Told, legible
from nfm.storage.errors.masked import masked

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
BEATING_SECONDS = 86400.0  # for those who only look: generous, because the clock of another host may be wrong


class Held(Told):
    """Another process works on the artifact. The message says which one and what to do."""


class Lock:
    """`with Lock(folder):` holds `folder/lock.json` with a heartbeat. Raises `Held` if a live holder has it."""

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS):
        self.folder = folder
        self.place = place_for(folder)
        self.stale_seconds = stale_seconds
        self.lost = False
        command = masked(legible(shlex.join(sys.argv)))
        self._body: dict[str, Any] = {
            "id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "space": _process_space(),
            "born": _born(os.getpid()), "command": command, "since": time.strftime("%F %T%z"),
            "beat": 0,
        }  # fmt: skip
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)

    def __enter__(self) -> Lock:
        while not self.place.create(self._body):
            if self._take_over_if_stale():
                break
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._release()
        except KeyboardInterrupt:  # a second signal, when the first one's stop was almost complete
            self._release()
            raise

    def _release(self) -> None:
        self._stop.set()
        self._thread.join()
        self.place.release(self._body)

    def check(self) -> None:
        """Raises `Held` if another process took over the lock, for example while this one was suspended."""
        holder = self.place.read()
        if holder.get("id") != self._body["id"]:
            self.lost = True
            who = f"{holder['command']!r} on {holder['host']} (process {holder['pid']})" if holder else "somebody"
            raise Held(
                f"{self.folder}: {who} took this work over while this process stood still for over "
                f"{self.stale_seconds:.0f} s; nothing more is written here, the other one goes on"
            )

    def lives(self) -> bool:
        """Whether a process holds the lock of the folder, by reading only. In doubt, the answer is yes."""
        try:
            seen = self.place.read()
            if not seen or self._dead(seen):
                return False
            return seen["space"] == self._body["space"] or self.place.age() < BEATING_SECONDS
        except (StorageError, KeyError):
            return True

    def _take_over_if_stale(self) -> bool:
        """Returns True if the lock is now ours, False if it disappeared or others took it (try again).

        Raises `Held` while its holder lives.
        """
        seen = self.place.read()
        if not seen:
            return False
        if not self._dead(seen):
            deadline = time.monotonic() + self.stale_seconds
            while True:
                now = self.place.read()
                if not now:
                    return False
                moved = time.monotonic() < deadline and (now["id"], now["beat"]) != (seen["id"], seen["beat"])
                if moved or seen["space"] == self._body["space"]:
                    raise Held(
                        f"{self.folder}: {seen['command']!r} on {seen['host']} (process {seen['pid']}, since "
                        f"{seen['since']}) is working on it; wait for it or stop it, then run this again"
                    )
                if time.monotonic() >= deadline:
                    break
                time.sleep(min(1.0, self.stale_seconds / 10))
        return self.place.take_over(self._body, seen)

    def _dead(self, seen: dict[str, Any]) -> bool:
        return seen["space"] == self._body["space"] and _born(seen["pid"]) != seen["born"]

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(StorageError, OSError):  # a full or failing disk: the next heartbeat tries again
                self._body["beat"] += 1
                if not self.place.beat(self._body):
                    self.lost = True
                    return


def _process_space() -> str:
    """Identifies the machine's boot and process namespace. Process numbers can be compared only within it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        return f"{socket.gethostname()}-unknown-{os.getpid()}"


def _born(pid: int) -> str | None:
    """The start time of a process in clock ticks since boot; None if there is no such process or only a zombie."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else facts[18]
    except (OSError, ValueError, IndexError):
        return None
