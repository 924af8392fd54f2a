"""The training examples as a user starts them: as scripts and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.support.patience import PATIENCE

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TRAINERS = ("own_trainer.py", "torchcfm_step.py", "flow_matching_step.py", "sit_transport.py")
LAUNCHED = ("ddp.py", "accelerate_loop.py")


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_runs_as_a_script(name: str, script: Callable[..., str], store: Callable[[str], Path]) -> None:
    said, value = script(name, store("blocks")).split()
    assert said == "loss"
    assert 0 < float(value) < 1


def test_pairs_of_ones_own_become_a_store_and_a_student(script: Callable[..., str], tmp_path: Path) -> None:
    """The example states a loss only after its store was sealed; run again, it writes nothing."""
    said, value = script("external_pairs.py", tmp_path / "store").split()
    assert said == "loss"
    assert 0 < float(value) < 1
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    assert script("external_pairs.py", tmp_path / "store").startswith("loss")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == files


def test_stock_zarr_reads_a_store_of_an_object_store(
    bucket: str, script: Callable[..., str], store: Callable[[str], Path]
) -> None:
    fsspec.filesystem("s3").put(str(store("zarr")), f"{bucket}/store", recursive=True)
    assert script("stock_zarr.py", f"{bucket}/store") == "600 pairs of draw 0\n"


def test_every_example_is_run_by_a_test(store: Callable[[str], Path]) -> None:
    stock = {"stock_webdataset.py", "stock_webdataset_samples.py", "stock_zarr.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        *TRAINERS,
        *LAUNCHED,
        *stock,
        "external_pairs.py",
        "network.py",
        "one_step.py",  # by tests/e2e/test_own_models.py
    }


@pytest.mark.seconds(40)
def test_launched_examples_train_on_two_processes_and_save_where_they_stand(
    store: Callable[[str], Path], tmp_path: Path
) -> None:
    """Both at once: most of their time is imports."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = {
        name: subprocess.Popen(
            [*torchrun, str(EXAMPLES / name), str(store("blocks")), str(tmp_path / f"{name}.saved")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in LAUNCHED
    }
    for name, process in running.items():
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        # torchrun's processes write unbuffered to one pipe: a line of one may begin before the other's has ended.
        losses = dict(re.findall(r"rank (\d) of 2: loss (\d+\.\d{4})", out))
        assert sorted(losses) == ["0", "1"], out
        assert (tmp_path / f"{name}.saved").exists()
