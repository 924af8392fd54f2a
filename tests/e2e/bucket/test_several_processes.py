"""A student of processes that share only a bucket and a network: each has its own scratch and working directory."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from nfm.storage.files.paths import as_path, names_in, size_of
from tests.support.patience import PATIENCE

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.support.buckets.in_bucket import Bucket

pytestmark = pytest.mark.seconds(180)  # two times three processes that import torch
SETS = ("student.microbatch=24", "student.save_every=512")


def torchrun(there: Bucket) -> subprocess.Popen[str]:
    """Two processes, one on each of two machines."""
    words = [sys.executable, "-m", "nfm.pipeline.cli", *map(str, there.lab.arguments("student", *SETS))]
    config = shlex.quote(str(there.lab.config))
    own = f"export NFM_SCRATCH=$PWD/scratch$RANK NFM_CACHE=$PWD/cache$RANK; mkdir -p at$RANK; cp {config} at$RANK"
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"),
            *("bash", "-c", f"{own}; cd at$RANK; exec {shlex.join(words)}"),
        ],
        cwd=there.lab.folder,
        env={**os.environ, **there.environment, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_processes_on_machines_apart_make_the_student_of_one_and_others_go_on_from_their_checkpoint(
    made: Lab, there: Bucket
) -> None:
    there.upload(made, "data", "teacher", "pairs")
    student = as_path(there.url) / "student" / made.only("student").path.name
    begun = torchrun(there)
    states, deadline = student / "resume", time.monotonic() + PATIENCE
    while not any(size_of(states / name / "files.json") for name in names_in(states)):
        assert begun.poll() is None, begun.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    begun.send_signal(signal.SIGTERM)
    assert "the same command goes on from here" in begun.communicate(timeout=PATIENCE)[1]

    others = torchrun(there.on("two"))
    told = others.communicate(timeout=PATIENCE)[1]
    assert others.returncode == 0, told
    assert "continuing from " in told
    (artifact,) = there.all("student")
    assert {"weights.safetensors", "metrics.jsonl"} <= {file["path"] for file in artifact.manifest()["files"]}
    found = load_file(there.brought(artifact) / "weights.safetensors")
    for name, value in load_file(made.only("student").path / "weights.safetensors").items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)
