"""What is expensive is made once: a file's tests are on one process, and a run shares a fixture among processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

STARTS_A_RAY = "pytest.mark.ray"


class ByFile(LoadScopeScheduling):
    """A file stays on one process, and so do all files that start a Ray: a small machine carries one at a time.

    Not `--dist loadgroup`: pytest-xdist 3.8 cannot tell pytest 9.2 its groups, and shares out single tests instead.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _starts_a_ray(self.config.rootpath / file) else file


@cache
def _starts_a_ray(file: Path) -> bool:
    return STARTS_A_RAY in file.read_text("utf-8")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make(folder)` filled, in whichever process asked first. Only copies of it may be changed."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
