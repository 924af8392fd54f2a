"""Put on PYTHONPATH: lets a real `nfm` process kill itself, or wait for another one, at an exact point of a shard.

NFM_TEST_KILL="after-payload:3:TOKEN" sends SIGKILL to the process that passes the point for the third time, once: the
file TOKEN is created by who does it, and nobody does it again; commas separate several. With
NFM_TEST_MEET="before-commit:2:FOLDER" two processes go on from the point of each shard only together; FOLDER keeps a
file for each arrival. All else that runs is the real code. Points are before- and after- each of payload, index, commit
and manifest.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))
MEET_SECONDS = 120.0  # only a process that died does not come
# module -> its functions, by the point that they pass
POINTS = {
    "nfm.storage.layouts": {"closed": "payload"},
    "nfm.storage.ledger.shard_writer": {"write_index": "index"},
    "nfm.storage.ledger.commits": {"create_json": "commit"},
    "nfm.pipeline.artifacts.artifact": {"publish": "manifest"},
}
passages: dict[str, int] = {}


def reached(point: str, subject: str) -> None:
    """A process is at a point of a shard (or of an artifact's manifest)."""
    passages[point] = passages.get(point, 0) + 1
    for kill in filter(None, os.environ.get("NFM_TEST_KILL", "").split(",")):
        where, number, token = kill.split(":", 2)
        if where == point and passages[point] >= int(number) and _first(token):
            os.kill(os.getpid(), signal.SIGKILL)
    where, _, rest = os.environ.get("NFM_TEST_MEET", "").partition(":")
    if where == point:
        number, _, folder = rest.partition(":")
        Path(folder, f"{subject}.{os.getpid()}").touch()
        deadline = time.monotonic() + MEET_SECONDS
        while len(list(Path(folder).glob(f"{subject}.*"))) < int(number) and time.monotonic() < deadline:
            time.sleep(0.0005)


def _first(token: str) -> bool:
    try:
        os.close(os.open(token, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _watched(function, what):
    @functools.wraps(function)
    def wrapper(*arguments, **named):
        subject = _subject(arguments[0])
        reached(f"before-{what}", subject)
        result = function(*arguments, **named)
        reached(f"after-{what}", subject)
        return result

    return wrapper


def _watch(module) -> None:
    """Wrap a module's functions of POINTS, also where modules that are loaded already have them by name."""
    for function, what in POINTS[module.__name__].items():
        plain = getattr(module, function)
        watched = _watched(plain, what)
        for other in [each for name, each in list(sys.modules.items()) if name.startswith("nfm.")]:
            if vars(other).get(function) is plain:
                setattr(other, function, watched)


def _subject(argument) -> str:
    """The shard's name, from the writer or the path that the function is given first."""
    return Path(str(getattr(argument, "path", argument))).name.partition(".")[0]


class Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: wraps the functions of a module of POINTS as soon as that was loaded."""

    def find_spec(self, name, path=None, target=None):
        if name not in POINTS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _watch(module)

        spec.loader.exec_module = exec_module
        return spec


def _other() -> None:
    """Run the sitecustomize that would have run without this one."""
    rest = [folder for folder in sys.path if os.path.abspath(folder or ".") != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_other()
if "NFM_TEST_KILL" in os.environ or "NFM_TEST_MEET" in os.environ:
    sys.meta_path.insert(0, Finder())
    for loaded in [sys.modules[name] for name in POINTS if name in sys.modules]:  # in a process that was forked
        _watch(loaded)
