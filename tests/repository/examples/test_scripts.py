"""The training examples as a user starts them: as scripts and under torchrun."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.clusters.distributed import processes
from tests.support.launched import group

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


@pytest.mark.parametrize("name", LAUNCHED)
def test_launched_examples_train_on_two_processes_and_save_where_they_stand(
    store: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    saved, arguments = tmp_path / "saved", [str(store("blocks")), str(tmp_path / "saved")]
    with group() as told:
        out = [tmp_path / f"said.{environment['RANK']}" for environment in told]
        calls = {file.name: (name, arguments, environment, file) for environment, file in zip(told, out)}
        processes.run(run_example, tmp_path, calls)
    for rank, file in enumerate(out):
        assert re.fullmatch(rf"rank {rank} of 2: loss \d+\.\d{{4}}\n", file.read_text())
    assert saved.exists()


@pytest.mark.long
@pytest.mark.seconds(40)
@pytest.mark.parametrize("name", LAUNCHED)
def test_torchrun_launches_them(store: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = subprocess.run(
        [*torchrun, str(EXAMPLES / name), str(store("blocks")), str(tmp_path / "saved")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    # torchrun's processes write unbuffered to one pipe: a line of one may begin before the other's has ended.
    losses = dict(re.findall(r"rank (\d) of 2: loss (\d+\.\d{4})", said.stdout))
    assert sorted(losses) == ["0", "1"], said.stdout
    assert (tmp_path / "saved").exists()


def run_example(name: str, arguments: list[str], environment: dict[str, str], out: Path) -> None:
    """An example as a script, in a process that a launcher told this environment; what it prints goes to a file."""
    os.environ.update(environment)
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(EXAMPLES))
    with out.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
