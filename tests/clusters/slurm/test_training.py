"""A training as one Slurm job of several processes: the weights of an undisturbed run, though it was stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from nfm.storage.files.atomic import read_json
from tests.support.patience import PATIENCE

if TYPE_CHECKING:
    from tests.clusters.slurm.conftest import Site

pytestmark = pytest.mark.slurm

FEATURES = ("features.seed=4", "features.images=20000", "features.save_every=1280")


def submit(site: Site, *sets: str) -> str:
    options = [part for text in sets for part in ("--set", text)]
    site.lab.nfm("submit", "features", "-c", "tiny.toml", *options, "--slurm", "--per-node", 2, "--go")
    return str(dict(read_json(site.newest() / "jobs.json")["jobs"])["features"])


def weights(site: Site) -> dict[str, torch.Tensor]:
    (path,) = site.lab.artifacts.glob("features/*/weights.safetensors")
    return load_file(path)


def test_two_tasks_come_to_the_weights_of_an_undisturbed_run_and_a_stop_goes_on(site: Site) -> None:
    job = submit(site, *FEATURES)
    site.cluster.until(lambda: list(site.lab.artifacts.glob("features/*/checkpoints/0*")))
    site.cluster.ask("scancel", "--signal=TERM", job)  # to its processes, as before its time limit
    site.ended()
    assert "stopped; the same command goes on from here" in site.log("features")
    assert not list(site.lab.artifacts.glob("features/*/weights.safetensors"))

    submit(site, *FEATURES)
    site.ended()
    assert "continuing from" in site.log("features")
    shared = weights(site)

    (made,) = site.lab.artifacts.glob("features/*")
    made.rename(site.lab.folder / "by-slurm")
    by_torchrun(site, *FEATURES)
    undisturbed = weights(site)
    assert all(torch.equal(shared[name], value) for name, value in undisturbed.items())


def by_torchrun(site: Site, *sets: str) -> None:
    """The same training in two processes of a launcher on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    options = [part for text in sets for part in ("--set", text)]
    environment = {**os.environ, "NFM_ARTIFACTS": str(site.lab.artifacts), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launcher, "-m", "nfm.pipeline.cli", "run", "features", "-c", "tiny.toml", *options],
        cwd=site.lab.folder, env=environment, check=True, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
