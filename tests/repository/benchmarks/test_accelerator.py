"""`make gpu`: it runs without the library's own packages, goes on where it was, and says what failed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks.accelerator import trial
from benchmarks.accelerator.command import PIECES, accelerator
from benchmarks.accelerator.job import Job, Unfinished
from benchmarks.accelerator.kept import Kept, alone
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
    assert "left: tests; the same command without --only goes on" in done.stderr


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


def called(folder: Path, *arguments: str) -> Result:
    common = ["--tiny", "--device=cpu", f"--work={folder / 'work'}", "-o", str(folder / "out.json")]
    return CliRunner().invoke(accelerator, [*common, *arguments], catch_exceptions=False)


def rows(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())["pieces"]
    return found


def test_a_piece_that_fails_is_told_and_run_again_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "teacher").write_text("where its folder is to be")
    failed = called(tmp_path, "--only=teacher", "--only=pairs")
    assert failed.exit_code == 1
    assert "FileExistsError" in rows(tmp_path)["teacher"]["failed"]
    assert "pairs: needs teacher first" in failed.output
    (tmp_path / "work" / "teacher").unlink()
    assert called(tmp_path, "--only=teacher").exit_code == 0
    assert "heldout_bits_per_dim" in rows(tmp_path)["teacher"]


def test_a_piece_that_is_asked_for_again_is_measured_again_and_what_was_made_of_it_is_left(tmp_path: Path) -> None:
    assert called(tmp_path, "--only=pairs", "--only=teacher").exit_code == 0, (
        "in the order in which they need each other"
    )
    first, weights = rows(tmp_path), tmp_path / "work" / "teacher.safetensors"
    assert set(first) == {"teacher", "pairs"}
    planned = tmp_path / "work" / "teacher" / "plan.json"
    planned.write_text(json.dumps({"examples": 1, "images_per_second": -1.0}))
    before = weights.stat().st_mtime_ns
    again = called(tmp_path, "--only=teacher")
    assert again.exit_code == 0
    assert "teacher: made again, so pairs of the one before are left to be made again" in again.output
    assert set(rows(tmp_path)) == {"teacher"}
    assert rows(tmp_path)["teacher"]["images_per_second"] > 0, "of the old plan"
    assert weights.stat().st_mtime_ns != before
    assert not (tmp_path / "work" / "pairs.safetensors").exists()


def test_a_call_that_finds_all_done_says_whose_figures_these_are(tmp_path: Path) -> None:
    state = {
        "plan": "tiny",
        "card": "cpu",
        "output": str(tmp_path / "old.json"),
        "pieces": {name: {} for name in PIECES},
    }
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.json").write_text(json.dumps(state))
    done = called(tmp_path)
    assert done.exit_code == 0
    assert "these are the figures of earlier calls; --only PIECE" in done.output
    assert rows(tmp_path).keys() == PIECES.keys(), "in the file that this call named"
    kept = Kept(tmp_path / "work", "tiny", "cpu", None, None)
    kept.add("tests", {"passed": 1})
    assert rows(tmp_path)["tests"]["machine"], "the first call's is not known"


def test_a_call_that_was_killed_while_it_forgot_leaves_nothing_old(tmp_path: Path) -> None:
    state = {"plan": "tiny", "card": "cpu", "output": "o.json", "pieces": {}, "to_remove": ["teacher"]}
    (tmp_path / "work" / "teacher").mkdir(parents=True)
    (tmp_path / "work" / "teacher.safetensors").touch()
    (tmp_path / "work" / "state.json").write_text(json.dumps(state))
    Kept(tmp_path / "work", "tiny", "cpu", None, None)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["state.json"]


def test_two_folders_of_one_day_have_a_json_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for work in ("first", "second", "third", "first"):
        (tmp_path / work).mkdir(exist_ok=True)
        Kept(tmp_path / work, "tiny", "cpu", None, None).add("tests", {"of": work})
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("results/gpu/*.json"))]
    assert sorted(body["pieces"]["tests"]["of"] for body in found) == ["first", "second", "third"]


def test_two_calls_in_one_folder_are_refused(tmp_path: Path) -> None:
    with alone(tmp_path / "work"):
        done = called(tmp_path, "--only=matrices")
    assert done.exit_code == 2
    assert "another call works here; wait for it, or give another --work" in done.output
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"plan": "tiny", "card": "cpu", "output": "o.json", "pieces": {"a": 1}}']
)
def test_a_state_that_is_broken_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.json").write_text(text)
    done = called(tmp_path, "--only=matrices")
    assert done.exit_code == 2
    assert "state.json: is not what a call leaves there" in done.output
    assert "give another --work, or remove it" in done.output


def test_images_are_checked_before_anything_is_measured_and_never_mixed(tmp_path: Path) -> None:
    file = tmp_path / "in.npz"
    for arrays, says in (
        ({"images": np.zeros((4, 1, 8, 8), np.uint8)}, "no array data and no labels; write it with numpy.savez"),
        ({"data": np.zeros((4, 1, 8, 8), np.uint8), "labels": np.zeros(4)}, "4 labels of type float64"),
        ({"data": np.zeros((4, 1, 8, 8), np.uint8), "labels": np.zeros(4, int)}, "4 images, and "),
        ({"data": np.array([None]), "labels": np.zeros(1, int)}, "Object arrays cannot be loaded"),
    ):
        np.savez(file, **arrays)
        done = called(tmp_path, f"--images={file}", "--only=matrices")
        assert done.exit_code == 2
        assert says in " ".join(done.output.replace("│", "").split()), done.output
    np.save(tmp_path / "one.npy", np.zeros((4, 1, 8, 8), np.uint8))
    assert "its ending is .npy, and this is .npz" in called(tmp_path, f"--images={tmp_path / 'one.npy'}").output
    (tmp_path / "one.npy").rename(file)
    assert "File is not a zip file" in called(tmp_path, f"--images={file}").output
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]
    count = 2 * TINY.samples + 100
    np.savez(file, data=np.zeros((count, *TINY.trial.image_shape), np.uint8), labels=np.zeros(count, int))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.json").write_text(
        json.dumps({"plan": "tiny", "card": "cpu", "output": "o.json", "pieces": {}})
    )
    done = called(tmp_path, f"--images={file}", "--only=matrices")
    assert done.exit_code == 2
    assert "its images are drawn flowers, and those of --images are " in done.output


def test_work_of_another_size_is_not_mixed_in(tmp_path: Path) -> None:
    common = ["--device=cpu", f"--work={tmp_path / 'work'}", "-o", str(tmp_path / "out.json"), "--only=pairs"]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.json").write_text(
        json.dumps({"plan": "tiny", "card": "cpu", "output": "o", "pieces": {}})
    )
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
    assert done.exit_code == 2, done.output
    assert "nothing was begun: " in done.output
    assert "too few to begin it (--minutes)" in done.output
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
