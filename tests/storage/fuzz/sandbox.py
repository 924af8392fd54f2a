"""Runs one call after another in a forked child that may crash, hang, grow or look around, and says what it did."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError

GROWTH = 500 << 20  # bytes of memory that a call may take beyond what was there
_ADDRESS_SPACE = 6 << 30  # above this an allocation fails, which is a defect too
_NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
_SYSTEM = tuple(
    {f"{Path(path).resolve()}/" for path in (sys.prefix, sys.base_prefix)}
    | {"/proc/", "/sys/", "/dev/", "/usr/", "/lib", "/etc/ld.so", "/etc/localtime"}
    | {f"{Path(__file__).resolve().parents[3]}/"}
)


@dataclass(frozen=True)
class Outcome:
    """How a call ended: `data`, `refused` (a StorageError), or a defect, with its traceback or description."""

    target: str
    kind: str
    detail: str = ""

    @property
    def defect(self) -> bool:
        return self.kind not in ("data", "refused", "findings", "clean", "skipped")


Target = Callable[[], str]  # returns the kind of its success


def run(targets: Mapping[str, Target], readable: Sequence[Path], log: Path, seconds: float) -> list[Outcome]:
    """The outcomes of all targets, in their order. Files outside `readable` and the system's may not be opened.

    A crash or a hang ends the child; the targets after it are left out.
    """
    sys.stdout.flush()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            _in_child(targets, readable, log, seconds, send)
        except BaseException:
            log.write_text(traceback.format_exc(), encoding="utf-8")
            os._exit(3)
        os._exit(0)
    os.close(send)
    lines = _read_all(receive, deadline=time.monotonic() + (seconds + 5) * len(targets), child=child)
    _, status = os.waitpid(child, 0)
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    if len(outcomes) < len(targets):
        target = list(targets)[len(outcomes)]
        trace = log.read_text(encoding="utf-8", errors="replace")[:8000] if log.exists() else ""
        if "Timeout (" in trace:
            outcomes.append(Outcome(target, "hang", trace))
        else:
            how = signal.strsignal(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else f"exit {status >> 8}"
            outcomes.append(Outcome(target, "crash", f"{how}\n{trace}"))
    return outcomes


def _read_all(receive: int, deadline: float, child: int) -> list[bytes]:
    data = b""
    with open(receive, "rb", buffering=0) as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
            part = pipe.read(1 << 16)
            if not part:
                return data.splitlines()
            data += part


def _in_child(targets: Mapping[str, Target], readable: Sequence[Path], log: Path, seconds: float, send: int) -> None:
    trace = open(log, "w", encoding="utf-8")  # noqa: SIM115  open until the child ends
    faulthandler.enable(trace)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    seen: list[str] = []
    sys.addaudithook(_watch(tuple(f"{path}/" for path in readable), seen))
    for name, target in targets.items():
        faulthandler.dump_traceback_later(seconds, exit=True, file=trace)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kind, detail = _called(target)
        faulthandler.cancel_dump_traceback_later()
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if growth > GROWTH:
            kind, detail = "memory", f"{growth >> 20} MiB more, after {kind}: {detail}"
        if seen:
            kind, detail = "outside", f"{'; '.join(seen[:5])}, after {kind}: {detail}"
            seen.clear()
        line = json.dumps({"target": name, "kind": kind, "detail": detail[-4000:]}) + "\n"
        with contextlib.suppress(BrokenPipeError):
            os.write(send, line.encode(errors="backslashreplace"))


def _called(target: Target) -> tuple[str, str]:
    try:
        return target(), ""
    except StorageError as error:
        text = str(error)
        return "refused", f"{type(error).__name__}: {text[:200]}"
    except BaseException as error:
        return f"raised {type(error).__name__}", "".join(traceback.format_exception(error))


def _watch(readable: tuple[str, ...], seen: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that notes files opened outside, and whatever runs or connects."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _NEVER:
            seen.append(f"{event} {arguments[:2]!r}"[:200])
        if event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not f"{path}/".startswith((*readable, *_SYSTEM)):
            seen.append(f"{event} {path}")

    return hook


class Watch:
    """Notes when a file of a folder is opened by anybody, whatever library does it (inotify; nothing elsewhere)."""

    _OPEN, _IS_FOLDER = 0x20, 0x40000000

    def __init__(self, folder: Path) -> None:
        self._handle = -1
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "inotify_init1"):
            return
        self._handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            libc.inotify_add_watch(self._handle, os.fsencode(path), self._OPEN)

    def opened(self) -> list[str]:
        """The names of files opened since the last call."""
        names = []
        with contextlib.suppress(BlockingIOError):
            while self._handle >= 0:
                data, at = os.read(self._handle, 1 << 16), 0
                while at < len(data):
                    _, mask, _, size = struct.unpack_from("iIII", data, at)
                    if not mask & self._IS_FOLDER:  # anybody may walk through the machine's temporary folder
                        names.append(os.fsdecode(data[at + 16 : at + 16 + size].rstrip(b"\0")))
                    at += 16 + size
        return names
