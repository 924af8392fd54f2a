"""Which tests share a process where pytest has several."""

from __future__ import annotations

from functools import cache
from pathlib import Path

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
