"""A local Ray needs no network: it works where the loopback interface is the only one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import Lab

pytestmark = [pytest.mark.ray, pytest.mark.seconds(30)]  # a small machine starts one Ray at a time


@pytest.fixture
def alone() -> list[str]:
    """The head of a command that runs where there is no other interface; skips where that is not allowed."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare (util-linux) and ip (iproute2)")
    own = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    head = [*own, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    tried = subprocess.run([*head, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no network namespace is allowed here: {tried.stderr.strip()}")
    return head


@pytest.mark.long
def test_pairs_are_made_on_a_local_ray_where_there_is_no_network(lab: Lab, alone: list[str]) -> None:
    nfm = str(Path(sysconfig.get_path("scripts")) / "nfm")
    sets = ("pairs.executor=ray", "pairs.workers=1", "pairs.coupling=independent", "pairs.seed=7", "pairs.draws=1")
    environment = {**os.environ, "NFM_ARTIFACTS": str(lab.artifacts)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*alone, nfm, *lab.arguments("pairs", *sets)], cwd=lab.folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the first Ray actor is ready" in done.stderr
    assert "on 127.0.0.1" in done.stderr
    assert (Path(done.stdout.strip())).name == "manifest.g0001.json"
