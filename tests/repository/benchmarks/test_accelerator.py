"""`make gpu`: it runs without the library's own packages, goes on where it was, and says what failed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.accelerator import trial
from benchmarks.accelerator.command import PIECES, accelerator
from benchmarks.accelerator.job import Job, Unfinished
from benchmarks.accelerator.reader import reader
from benchmarks.accelerator.sizes import PLANS
from benchmarks.accelerator.tests import ALONE, FILES
from nfm.trainers.checkpoint import unpack

ROOT = Path(__file__).resolve().parents[3]
ABSENT = ("ray", "pyarrow", "pydantic", "pydantic_core", "google_crc32c", "fsspec", "upath", "zarr", "webdataset",
          "pandas", "PIL", "torchdiffeq")  # fmt: skip
# Importing one of them fails; whether it is there may be asked, as torch's compiler does of what it traces.
REFUSING = f"""
import sys
from importlib.machinery import ModuleSpec

class Refusing:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in {ABSENT!r} else None

    def create_module(self, spec):
        raise ModuleNotFoundError(f"refused: {{spec.name}}")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Refusing())
"""
RUN = "from benchmarks.accelerator.command import accelerator; accelerator()"
TESTS = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
TINY = PLANS["tiny"]


def refusing(what: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", REFUSING + what, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ALONE
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)


def job(folder: Path, until: float = math.inf) -> Job:
    folder.mkdir(exist_ok=True)
    return Job(TINY, "cpu", folder, until, {})


@pytest.mark.long
@pytest.mark.seconds(120)
def test_every_piece_runs_tiny_without_the_packages_of_the_pipeline(tmp_path: Path) -> None:
    """In one process. The tests' piece, which starts another, has a test of its own."""
    output, chosen = tmp_path / "out.json", [f"--only={name}" for name in PIECES if name != "tests"]
    done = refusing(RUN, "--tiny", "--device=cpu", f"--work={tmp_path / 'work'}", "-o", output, *chosen)
    assert done.returncode == 0, done.stderr
    body = json.loads(output.read_text())
    assert (body["plan"], body["card"]) == ("tiny", "cpu")
    assert list(body["pieces"]) == [name for name in PIECES if name != "tests"]
    assert "pyarrow" in body["pieces"].pop("reader")["not_measured"], "the one piece that needs it"
    for name, found in body["pieces"].items():
        assert not {"failed", "unfinished", "not_measured"} & found.keys(), f"{name}: {found}"
    assert body["pieces"]["train"]["teacher, bfloat16"]["of_bf16_rate"] > 0
    assert body["pieces"]["sample"]["student_over_teacher"] > 0
    for coupling in ("independent", "nfm"):
        assert list(body["pieces"]["table"][coupling]["distance_by_nfe"]) == ["31", "15", "7", "5", "3", "1"]
    assert "left: tests; the same command goes on" in done.stderr


@pytest.mark.seconds(60)
def test_the_tests_for_devices_need_no_setup_of_the_others() -> None:
    """They run where pydantic and pyarrow are not; those for CUDA are skipped where there is none."""
    done = refusing(TESTS, "--noconftest", "-p", "no:cacheprovider", "--collect-only", "-q", *FILES)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in FILES:
        assert f"{file.partition('::')[0]}: " in done.stdout, "their number"


def test_what_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = trial.teacher(job(tmp_path / "whole"))
    (tmp_path / "again" / "teacher").mkdir(parents=True)
    planned = (tmp_path / "whole" / "teacher" / "plan.json").read_text()  # of the rate that was measured
    (tmp_path / "again" / "teacher" / "plan.json").write_text(planned)
    with pytest.raises(Unfinished, match=r"^0 of "):
        trial.teacher(job(tmp_path / "again", until=0.0))
    assert trial.teacher(job(tmp_path / "again")) == whole
    one, other = (unpack((tmp_path / name / "teacher.safetensors").read_bytes())[0] for name in ("whole", "again"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, msg=name)


def test_batches_go_on_with_the_next_one() -> None:
    images, labels = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)

    def labels_of(batches: trial.Batches, count: int) -> list[list[int]]:
        stream = iter(batches)
        return [next(stream).label.tolist() for _ in range(count)]

    whole = labels_of(trial.Batches(images, labels, None, 3), 8)
    first = trial.Batches(images, labels, None, 3)
    begun = labels_of(first, 5)
    again = trial.Batches(images, labels, None, 3)
    again.load_state_dict(first.state_dict())
    assert begun + labels_of(again, 3) == whole
    assert whole[:3] != whole[3:6], "another order in the next epoch"


def test_a_piece_that_fails_is_told_and_run_again_and_the_others_go_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", images=np.zeros((4, 1, 8, 8), np.uint8))
    common = ["--tiny", "--device=cpu", f"--work={tmp_path / 'work'}", "-o", str(tmp_path / "out.json")]
    chosen = ["--only=teacher", "--only=pairs"]
    failed = CliRunner().invoke(accelerator, [*common, f"--images={tmp_path / 'in.npz'}", *chosen])
    assert failed.exit_code == 1
    told = json.loads((tmp_path / "out.json").read_text())["pieces"]["teacher"]["failed"]
    assert "in.npz: no array data and no labels: save data=... and labels=..." in told
    assert "pairs: needs teacher first" in failed.output
    again = CliRunner().invoke(accelerator, [*common, "--only=teacher"], catch_exceptions=False)
    assert again.exit_code == 0
    assert "heldout_bits_per_dim" in json.loads((tmp_path / "out.json").read_text())["pieces"]["teacher"]


def test_work_of_another_size_is_not_mixed_in(tmp_path: Path) -> None:
    common = ["--device=cpu", f"--work={tmp_path / 'work'}", "-o", str(tmp_path / "out.json"), "--only=pairs"]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.json").write_text(json.dumps({"plan": "tiny", "card": "cpu", "pieces": {}}))
    done = CliRunner().invoke(accelerator, common)
    assert done.exit_code == 2
    assert "holds the tiny run of cpu, and this is the full one of cpu: give another --work" in done.output


@pytest.mark.parametrize(
    ("option", "says"),
    [("-o=out.txt", "its ending is .txt"), ("--work=s3://a/b", "a URL"), ("--images=none.npz", "no such file")],
)
def test_a_place_that_is_none_is_wrong_use(option: str, says: str) -> None:
    done = CliRunner().invoke(accelerator, ["--tiny", "--device=cpu", *option.split("=")])
    assert done.exit_code == 2
    assert says in done.output


def test_a_call_that_can_begin_nothing_leaves_nothing(tmp_path: Path) -> None:
    common = ["--device=cpu", f"--work={tmp_path / 'work'}", "-o", str(tmp_path / "out.json")]
    assert CliRunner().invoke(accelerator, [*common, "--minutes=0"]).exit_code == 2
    done = CliRunner().invoke(accelerator, [*common, "--minutes=0.1"])
    assert done.exit_code == 0, done.output
    assert "too few to begin it" in done.output
    assert not list(tmp_path.iterdir())


def test_images_of_ones_own_are_read_and_refused_by_name(tmp_path: Path) -> None:
    file, labels = tmp_path / "in.npz", np.arange(6) % 3
    np.savez(file, data=np.full((6, 1, 8, 8), 255, np.uint8), labels=labels)
    images, found = trial.read_images(file, (1, 8, 8), 3)
    assert images.unique().tolist() == [1.0]
    assert sorted(found.tolist()) == sorted(labels.tolist())
    for classes, shape, says in ((2, (1, 8, 8), "labels from 0 to 2"), (3, (1, 9, 9), "it must be uint8 of 1x9x9")):
        with pytest.raises(ValueError, match=says):
            trial.read_images(file, shape, classes)


def test_the_reader_brings_records_to_the_device(tmp_path: Path) -> None:
    found = reader(job(tmp_path))
    assert found["records_per_second"] > 0
    assert 0 <= found["student"]["data_wait_share"] < 1
