"""The same command in several processes: one leads, the others take part, and the artifact is that of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launched import group
from tests.support.patience import PATIENCE

if TYPE_CHECKING:
    from tests.support.lab import Lab

pytestmark = pytest.mark.seconds(120)  # three processes that import torch
SETS = ("student.seed=6", "student.permuted=true", "student.microbatch=24", "student.save_every=256")


def torchrun(lab: Lab, *sets: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.Popen(
        [*launcher, "-m", "nfm.pipeline.cli", *map(str, lab.arguments("student", *sets))],
        cwd=lab.folder,
        env={**os.environ, "NFM_ARTIFACTS": str(lab.artifacts), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def student_of(lab: Lab) -> Path:
    (path,) = (path.parent for path in lab.artifacts.glob("student/*/spec.json") if "permuted" in path.read_text())
    return path


@pytest.mark.long
def test_a_signal_to_the_launcher_makes_all_processes_save_and_stop(lab: Lab) -> None:
    process = torchrun(lab, *SETS, "student.pairs=400000")
    deadline = time.monotonic() + PATIENCE
    while not any("permuted" in (path.parents[1] / "spec.json").read_text()
                  for path in lab.artifacts.glob("student/*/checkpoints/0*")):  # fmt: skip
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=PATIENCE)[1]
    assert "stopped; the same command goes on from here" in told, told
    assert not (student_of(lab) / "weights.safetensors").exists()
    assert list((student_of(lab) / "checkpoints").glob("0*"))


def test_processes_that_were_told_of_each_other_make_the_student_of_one(lab: Lab) -> None:
    with group() as told:
        both = [lab.start(*lab.arguments("student", *SETS), **environment) for environment in told]
        for process in both:
            lab.wait(process)
    is_that_of_one(lab)


@pytest.mark.long
def test_the_processes_of_torchrun_make_the_student_of_one(lab: Lab) -> None:
    process = torchrun(lab, *SETS)
    told = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, told
    is_that_of_one(lab)


def is_that_of_one(lab: Lab) -> None:
    shared = load_file(student_of(lab) / "weights.safetensors")
    assert "clean" in lab.nfm("audit", student_of(lab)).stdout
    student_of(lab).rename(lab.folder / "shared")
    lab.run("student", *SETS)
    for name, value in load_file(student_of(lab) / "weights.safetensors").items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-4, msg=name)
