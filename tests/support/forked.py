"""`nfm` in its own process, forked from one that has imported torch: a real pid, without the seconds of an import."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

from tests.support.forkserver import context
from tests.support.sizes import FULL


class Forked:
    """A started `nfm` with the part of `subprocess.Popen`'s face that tests use."""

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        (out, its_out), (err, its_err) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        self.args = ["nfm", *arguments]
        self._process = context.Process(target=_run, args=(self.args, str(folder), dict(environment), its_out, its_err))
        self._process.start()
        for end in (its_out, its_err):
            end.close()
        self.stdout, self.stderr = _text(out), _text(err)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """As `Popen` has it: None while it runs, negative where a signal ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Everything that it still prints, and its end."""
        said = ["", ""]
        readers = [
            threading.Thread(target=_drain, args=(stream, said, place), daemon=True)
            for place, stream in enumerate((self.stdout, self.stderr))
            if not stream.closed
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return said[0], said[1]


def _text(end: Connection) -> TextIO:
    stream = os.fdopen(os.dup(end.fileno()), encoding="utf-8")
    end.close()
    return stream


def _drain(stream: TextIO, said: list[str], place: int) -> None:
    with stream:
        said[place] = stream.read()


def _run(arguments: list[str], folder: str, environment: dict[str, str], out: Connection, err: Connection) -> None:
    """In the child: become the command."""
    from nfm.pipeline.cli import main

    gc.freeze()  # as in tests/conftest.py
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for end, number in ((out, 1), (err, 2)):
        os.dup2(end.fileno(), number)
        end.close()
    # The forkserver's own streams may be of a file, and what is asked of a file is an "Illegal seek" for a pipe.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if not FULL:
        os.fsync = lambda handle: None  # as in tests/conftest.py
    if "PYTHONPATH" in environment:  # what Python does with it when it starts
        sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        site.execsitecustomize()
    sys.argv = arguments
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without them; a command does not
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
