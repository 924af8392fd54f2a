"""An exclusive lock on the folder of an artifact, which does not outlive its holder.

The lock is a file that names its holder and has a heartbeat counter. It is stale if its holder is known to be dead
(same machine, same process namespace), or if the counter has not changed for 60 s on the observer's own clock. So the
clocks of different hosts do not matter. A stale lock is also taken over by create-if-absent, so only one process
succeeds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from nfm.storage.errors import StorageError, Told, legible
from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class Held(Told):
    """Another process works on the artifact. The message says which one and what to do."""


class Lock:
    """`with Lock(folder):` holds `folder/lock.json` with a heartbeat. Raises `Held` if a live holder has it."""

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS):
        self.path = folder / "lock.json"
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
        while not atomic.create_json(self.path, self._body):
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
        if self._read().get("id") == self._body["id"]:
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises `Held` if another process took over the lock, for example while this one was suspended."""
        holder = self._read()
        if holder.get("id") != self._body["id"]:
            self.lost = True
            who = f"{holder['command']!r} on {holder['host']} (process {holder['pid']})" if holder else "somebody"
            raise Held(
                f"{self.path.parent}: {who} took this work over while this process stood still for over "
                f"{self.stale_seconds:.0f} s; nothing more is written here, the other one goes on"
            )

    def _take_over_if_stale(self) -> bool:
        """Returns True if the lock is now ours, False if it disappeared (try again).

        Raises `Held` while its holder lives.
        """
        seen = self._read()
        if not seen:
            return False
        if not self._dead(seen):
            deadline = time.monotonic() + self.stale_seconds
            while True:
                if seen["space"] == self._body["space"] or (time.monotonic() < deadline and self._moved(seen)):
                    raise Held(
                        f"{self.path.parent}: {seen['command']!r} on {seen['host']} (process {seen['pid']}, since "
                        f"{seen['since']}) is working on it; wait for it or stop it, then run this again"
                    )
                if time.monotonic() >= deadline:
                    break
                time.sleep(min(1.0, self.stale_seconds / 10))
                if not self.path.exists():
                    return False
        marker = self.path.with_name(f"lock.{seen['id']}.taken")
        if not atomic.create_bytes(marker, self._body["id"].encode()):
            time.sleep(0.1)
            if self._read().get("id") == seen["id"] and not self._taker_lives(marker):
                marker.unlink(missing_ok=True)
            return False
        still_stale = self._read().get("id") == seen["id"]  # checked again now that the marker keeps others out
        if still_stale:
            atomic.write_json(self.path, self._body)
        marker.unlink(missing_ok=True)
        return still_stale

    def _taker_lives(self, marker: Path) -> bool:
        """A takeover needs milliseconds. A process whose marker is older than 10 s has died during it."""
        try:
            return time.time() - marker.stat().st_mtime < 10
        except FileNotFoundError:
            return True

    def _moved(self, seen: dict[str, Any]) -> bool:
        now = self._read()
        return bool(now) and (now["id"], now["beat"]) != (seen["id"], seen["beat"])

    def _dead(self, seen: dict[str, Any]) -> bool:
        return seen["space"] == self._body["space"] and _born(seen["pid"]) != seen["born"]

    def _read(self) -> dict[str, Any]:
        """The contents of the lock; empty if there is none. Its names are checked, because they become file names."""
        try:
            seen = atomic.read_json(self.path)
        except StorageError:
            if os.path.lexists(self.path):
                raise
            return {}
        texts = all(isinstance(seen.get(key), str) for key in ("id", "host", "space", "command", "since"))
        numbers = all(isinstance(seen.get(key), int) for key in ("pid", "beat"))
        if not (texts and numbers and re.fullmatch("[0-9a-f]{1,64}", seen["id"])):
            raise StorageError(f"{self.path}: no lock of ours; when nobody works on the folder, remove the file")
        return seen

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(StorageError, OSError):  # a full or failing disk: the next heartbeat tries again
                if self._read().get("id") != self._body["id"]:
                    self.lost = True
                    return
                self._body["beat"] += 1
                atomic.write_json(self.path, self._body)


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
