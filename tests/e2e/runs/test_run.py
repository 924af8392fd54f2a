"""Running stages: a second run is a no-op, stores grow by draws, results do not depend on who computed them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfm.storage import PairStore
from tests.support.patience import allowed

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_every_stage_of_a_run_is_made_once_and_baselines_beside(made: Lab) -> None:
    stages = [folder for folder in made.artifacts.iterdir() if not folder.name.startswith(".")]
    counts = {stage.name: len(list(stage.iterdir())) for stage in stages}
    assert counts == {"data": 1, "features": 1, "teacher": 1, "pairs": 2, "student": 2, "evaluate": 1, "report": 1}
    for stage in counts:
        for artifact in made.all(stage):
            assert artifact.done
            assert not (artifact.path / "lock.json").exists()
            assert artifact.manifest()["config"]


def test_a_second_run_does_nothing_and_says_so(lab: Lab) -> None:
    before = {path: path.stat().st_mtime_ns for path in lab.artifacts.rglob("*")}
    started = time.monotonic()
    done = lab.run("report")
    assert time.monotonic() - started < allowed(10)
    lines = done.stderr.splitlines()
    assert len(lines) == 9
    assert all("is up to date" in line for line in lines)
    assert done.stdout.strip() == str(lab.only("report").path / "report.html")
    assert {path: path.stat().st_mtime_ns for path in lab.artifacts.rglob("*")} == before


def test_the_same_config_elsewhere_gives_the_same_content(made: Lab, empty: Lab) -> None:
    empty.run("student")
    for stage in ("data", "teacher", "pairs", "student"):
        ours, again = made.only(stage), empty.only(stage)
        assert ours.path.name == again.path.name
        assert ours.manifest()["content_digest"] == again.manifest()["content_digest"]


def test_another_seed_is_another_artifact_and_leaves_the_first_alone(lab: Lab) -> None:
    before = lab.committed()
    lab.run("student", "student.seed=1", "student.pairs=128")
    after = lab.committed()
    assert before.items() <= after.items()
    assert len(lab.all("student")) == 3
    assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"student"}


def test_a_third_draw_writes_only_itself_and_a_reader_of_the_first_generation_reads_on(lab: Lab) -> None:
    store = lab.only("pairs").path
    before = lab.committed()
    pinned = PairStore.open(store, generation=1)
    reader = pinned.batches(32, seed=5)
    first = [next(reader) for _ in range(3)]

    lab.run("pairs", "pairs.draws=3")

    after = lab.committed()
    assert before.items() <= after.items()
    added = {path.removeprefix(f"pairs/{store.name}/") for path in after.keys() - before.keys()}
    assert "manifest.g0002.json" in added
    assert {path.split("/")[-1][:4] for path in added if "/" in path} == {"d002"}
    assert len(added) == 1 + 3 * pinned.spec.shards_per_draw  # the manifest; payload, index part and commit of each
    assert PairStore.open(store).generation == 2
    assert PairStore.open(store).draws == 3

    rest = list(reader)
    again = list(PairStore.open(store, generation=1).batches(32, seed=5))
    assert len(again) == len(first) + len(rest) == 8
    for ours, theirs in zip([*first, *rest], again):
        np.testing.assert_array_equal(ours.noise, theirs.noise)
        np.testing.assert_array_equal(ours.image, theirs.image)
    for draw in range(2):
        slots = np.arange(len(pinned))
        old, new = pinned.gather(draw, slots), PairStore.open(store).gather(draw, slots)
        assert all(np.array_equal(old[name], new[name]) for name in old)


def test_going_back_to_fewer_draws_finds_the_older_generation(lab: Lab) -> None:
    lab.run("pairs", "pairs.draws=3")
    done = lab.run("pairs", "pairs.draws=2")
    assert "is up to date (pairs 512, draws 2" in done.stderr
    assert [path.name for path in sorted(lab.only("pairs").path.glob("manifest.*"))] == [
        "manifest.g0001.json",
        "manifest.g0002.json",
    ]


def test_a_config_of_fewer_draws_gets_its_own_and_the_store_keeps_all_for_others(lab: Lab) -> None:
    store = lab.only("pairs").path
    said = lab.run("pairs", "pairs.draws=1").stderr
    assert "whoever opens the folder still gets generation 1, with more draws" in said
    assert "done in" in said
    assert "draws 1" in said
    assert "is up to date (pairs 256, draws 1" in lab.run("pairs", "pairs.draws=1").stderr
    assert PairStore.open(store).draws == 2
    assert json.loads(lab.nfm("pairs", "info", store, "--json").stdout)["draws"] == 2
    lab.nfm("pairs", "export", store, "copy")
    assert PairStore.open(lab.folder / "copy").draws == 2
    lab.run("student", "pairs.draws=1", "student.pairs=128")
    pairs = next(found.manifest() for found in lab.all("student") if found.manifest()["metrics"]["draws"] == 1)
    assert pairs["inputs"]["pairs"]["manifest"] == "manifest.g0002.json"
    lab.nfm("pairs", "seal", store)
    assert PairStore.open(store).draws == 2
    lab.nfm("audit", store)


def test_workers_and_executors_stay_out_of_the_fingerprint(made: Lab) -> None:
    done = made.nfm("plan", "pairs", "-c", "tiny.toml", "--set", "pairs.executor=ray", "--set", "pairs.workers=7",
                    "--set", "teacher.log_every=1", "--json")  # fmt: skip
    rows = json.loads(done.stdout)
    assert [row["would"] for row in rows] == ["nothing, is done"] * 3


def test_a_student_alone_is_the_pipelines_student(made: Lab, lab: Lab) -> None:
    store = lab.only("pairs")
    lab.drop("student", "evaluate", "report", "teacher", "features", "data")
    done = lab.nfm("student", "--pairs", store.path, "-c", "tiny.toml")
    ours, theirs = lab.only("student"), made.only("student")
    assert done.stdout.strip() == str(ours.path)
    assert ours.path.name == theirs.path.name
    assert (ours.path / "weights.safetensors").read_bytes() == (theirs.path / "weights.safetensors").read_bytes()


def test_a_student_alone_takes_the_generation_that_it_is_given(lab: Lab) -> None:
    store = lab.only("pairs").path
    lab.run("pairs", "pairs.draws=3")
    lab.drop("student")
    for manifest, draws in (("manifest.g0001.json", 2), ("manifest.g0002.json", 3)):
        done = lab.nfm("student", "--pairs", store / manifest, "-c", "tiny.toml", "--set", "student.pairs=128")
        body = json.loads((Path(done.stdout.strip()) / "manifest.json").read_text())
        assert body["metrics"]["draws"] == draws
        assert body["inputs"]["pairs"]["manifest"] == manifest
    assert len(lab.all("student")) == 2


def test_the_student_stage_imports_no_teacher(lab: Lab) -> None:
    script = (
        "import sys; from pathlib import Path; from nfm.stages.trained.student import StudentConfig, run\n"
        "class Quiet:\n"
        "    stopping = False\n"
        "    check_lock = progress = say = log = lambda *a, **k: None\n"
        "config = StudentConfig(pairs=128, batch_size=64, patch=2, width=32, depth=1, head_size=32)\n"
        "out = Path(sys.argv[2]); out.mkdir()\n"
        "run(config, {'pairs': Path(sys.argv[1])}, out, Quiet())\n"
        "print(*sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(lab.only("pairs").path), str(lab.folder / "out")]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert (lab.folder / "out/weights.safetensors").exists()
    assert "nfm.trainers.models.sit" in loaded
    assert not [name for name in loaded if "teacher" in name or "tarflow" in name or "trainers.couplings" in name]
