"""Copies of the events of a run in a bucket, so that others see how far it is."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.small_files import MOST_BYTES, read_tail

FIRST_SECONDS, SECONDS = 5.0, 30.0


class EventCopy:
    """Puts a growing file of events to a place in a bucket, in a thread, until it is closed."""

    def __init__(self, file: Path, place: Path) -> None:
        self._file, self._place = file, place
        self._copied = b""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="event-copy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Puts the last events there."""
        self._stop.set()
        self._thread.join()
        self._copy()

    def _follow(self) -> None:
        seconds = FIRST_SECONDS
        while not self._stop.wait(seconds):
            self._copy()
            seconds = SECONDS

    def _copy(self) -> None:
        with contextlib.suppress(StorageError, OSError):  # events help to see; no work fails for them
            data = read_tail(self._file, MOST_BYTES)
            if data != self._copied:
                atomic.write_bytes(self._place, data)
                self._copied = data
