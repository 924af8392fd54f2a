"""Bad input: one clear message with the remedy, an exit code, and every committed artifact as it was."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from nfm.storage.files import atomic

if TYPE_CHECKING:
    from tests.conftest import Lab


def refused(lab: Lab, *arguments: object, exits: int, says: tuple[str, ...]) -> None:
    """The command fails with a message that says all of this, and no committed file changes."""
    before = lab.committed()
    done = lab.nfm(*arguments, exits=exits)
    for part in says:
        assert part in done.stderr, done.stderr
    after = lab.committed()
    assert before.items() <= after.items()
    if exits == 2:
        assert after == before
    assert not [path for path in after.keys() - before.keys() if "manifest" in path]


WRONG_USE = {
    "unknown key": (["run", "pairs", "-c", "tiny.toml", "--set", "pairs.draw=3"],
                    ("pairs.draw: unknown key", "did you mean pairs.draws?")),
    "unknown section": (["run", "pairs", "-c", "tiny.toml", "--set", "teachr.seed=3"],
                        ("teachr: unknown key", "did you mean teacher?")),
    "set without value": (["plan", "pairs", "-c", "tiny.toml", "--set", "pairs.draws"],
                          ("--set pairs.draws", "section.key=value", "pairs.draws=4")),
    "set without section": (["plan", "pairs", "-c", "tiny.toml", "--set", "draws=3"], ("section.key=value",)),
    "value of another type": (["run", "pairs", "-c", "tiny.toml", "--set", "pairs.draws=many"],
                              ("pairs.draws = 'many'", "integer")),
    "value out of range": (["run", "pairs", "-c", "tiny.toml", "--set", "pairs.draws=0"],
                           ("pairs.draws = 0", "greater than or equal to 1")),
    "value of no choice": (["run", "pairs", "-c", "tiny.toml", "--set", "pairs.coupling=reflux"],
                           ("pairs.coupling = 'reflux'", "'reflow' or 'custom'")),
    "missing config": (["run", "pairs", "-c", "tinny.toml"], ("config tinny.toml: no such file",)),
    "unknown stage": (["run", "paris", "-c", "tiny.toml"], ("paris", "pairs")),
    "no config": (["run", "pairs"], ("-c",)),
    "unknown command": (["rum"], ("rum",)),
    "an even number of Heun evaluations": (["run", "evaluate", "-c", "tiny.toml", "--set", "evaluate.nfe=[8]"],
                                           ("evaluate.nfe", "odd")),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_USE)
def test_wrong_use_exits_2_and_names_the_field_and_the_remedy(made: Lab, what: str) -> None:
    arguments, says = WRONG_USE[what]
    refused(made, *arguments, exits=2, says=says)


def test_a_config_file_with_a_slip_is_refused_by_its_name(empty: Lab) -> None:
    text = empty.config.read_text()
    for name, changed, says in (
        ("typo.toml", text.replace("eta =", "etta ="), ("teacher.etta: unknown key; did you mean teacher.eta?",)),
        ("broken.toml", text.replace("[pairs]", "[pairs"), ("broken.toml: not valid TOML", "line")),
        ("bare.toml", "[pairs]\ndraws = 2\n", ("data: missing; add it to the config",)),
    ):
        (empty.folder / name).write_text(changed)
        refused(empty, "run", "pairs", "-c", name, exits=2, says=(f"config {name}", *says))
    assert not empty.artifacts.exists()


SIZES = {
    "teacher.patch=3": ("patch = 3 does not divide the image 8 x 8", "teacher"),
    "teacher.channels=33": ("channels = 33 is not a multiple of head_size = 32", "teacher"),
    "student.head_size=48": ("head_size = 48", "student"),
    "student.batch_size=100000": ("batch_size 100000 exceeds the 256 records", "student"),
}


@pytest.mark.parametrize("override", SIZES)
def test_sizes_that_only_the_data_can_refuse_are_refused_in_one_line(lab: Lab, override: str) -> None:
    refused(lab, "run", "student", "-c", "tiny.toml", "--set", override, exits=2, says=SIZES[override])


def test_a_missing_data_set_says_where_it_was_looked_for(empty: Lab) -> None:
    text = empty.config.read_text().replace('source = "digits"', 'source = "idx"\npath = "no/such/folder"')
    empty.config.write_text(text)
    refused(empty, *empty.arguments("pairs"), exits=2, says=("data.path = 'no/such/folder'", "is no folder"))


def test_a_missing_debian_package_says_how_to_install_it(empty: Lab) -> None:
    text = empty.config.read_text().replace('source = "digits"', 'source = "idx"\ndebian_package = "dataset-no-such"')
    empty.config.write_text(text)
    says = ("data.debian_package = 'dataset-no-such'", "apt-get install dataset-no-such", "data.path")
    refused(empty, *empty.arguments("pairs"), exits=2, says=says)


def test_unreadable_images_are_named_and_set_aside_when_that_is_allowed(empty: Lab) -> None:
    folder = empty.folder / "images"
    for row in range(40):
        path = folder / f"class{row % 2}" / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    bad = folder / "class1/007.png"
    bad.write_bytes(bad.read_bytes()[:70])
    empty.config.write_text(empty.config.read_text().replace('source = "digits"', 'source = "images"\npath = "images"'))
    says = ("1 of 40 images cannot be used", "class1/007.png", "rejected.parquet", "data.max_rejected")
    refused(empty, *empty.arguments("data"), exits=1, says=says)
    done = empty.run("data", "data.max_rejected=0.05")
    assert "rejected 1" in done.stderr
    assert empty.only("data").manifest()["metrics"]["rejected"] == 1


def test_a_truncated_data_shard_fails_its_pairs_and_no_others(lab: Lab) -> None:
    lab.drop("pairs", "student", "evaluate", "report")
    shard = lab.only("data").path / "train/s00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3000])
    says = ("shards are missing", "the others are committed", "run the same command again", "s00001.tar")
    refused(lab, *lab.arguments("pairs"), exits=1, says=says)
    store = lab.all("pairs")[0].path
    tracebacks = list((store / "failed").glob("*.txt"))
    assert tracebacks
    assert all("s00001.tar" in path.read_text() for path in tracebacks)
    committed = {path.stem for path in (store / "commits").glob("d*.json")}
    assert len(committed) + len(tracebacks) == 8
    assert committed
    shard.write_bytes(whole)
    assert f"{len(committed)} of 8 shards are committed already" in lab.run("pairs").stderr
    lab.nfm("audit", store)


def test_a_ray_cluster_that_does_not_answer_is_named(lab: Lab) -> None:
    arguments = [*lab.arguments("pairs", "pairs.executor=ray", "pairs.draws=3"), "--ray-address", "127.0.0.1:1"]
    refused(
        lab,
        *arguments,
        exits=1,
        says=("no Ray cluster answers at '127.0.0.1:1'", "ray_address", "`ray start --head`"),
    )


def test_a_truncated_pair_shard_stops_the_student_that_reads_it(lab: Lab) -> None:
    store = lab.only("pairs")
    shard = store.path / store.manifest()["shards"][0]["payload"]
    shard.write_bytes(shard.read_bytes()[:-2000])
    refused(lab, *lab.arguments("student", "student.seed=3"), exits=1, says=(str(shard), "truncated"))


def test_a_commit_without_its_shard_stops_a_resumed_run_and_is_found_by_the_audit(lab: Lab) -> None:
    store = lab.only("pairs")
    body = store.manifest()
    shard = store.path / body["shards"][3]["payload"]
    shard.unlink()
    commit = f"commits/{body['shards'][3]['name']}.json"
    says = (f"{shard}: missing", commit, "nfm repair")
    refused(lab, *lab.arguments("pairs", "pairs.draws=3"), exits=1, says=says)
    assert f"{shard}: the file is missing" in lab.nfm("audit", store.path, exits=1).stdout
    lab.nfm("repair", store.path)
    lab.run("pairs")
    lab.nfm("audit", store.path)
    assert lab.only("pairs").manifest()["content_digest"] == body["content_digest"]


def rewrite(path: Path, **changes: Any) -> None:
    """A JSON file as another version would have written it: whole, with a right digest."""
    body = json.loads(path.read_text(encoding="utf-8"))
    body.update(changes)
    path.unlink()
    assert atomic.create_json(path, body)


def test_an_artifact_of_a_newer_schema_is_left_alone(lab: Lab) -> None:
    path = lab.only("data").path / "manifest.json"
    rewrite(path, schema=99)
    says = (f"{path}: schema 99 is newer", "upgrade nfm-pairs")
    refused(lab, *lab.arguments("pairs"), exits=1, says=says)
    assert "schema 99 is newer" in lab.nfm("audit", "-c", "tiny.toml", exits=1).stdout


def test_a_store_of_a_newer_format_is_left_alone(lab: Lab) -> None:
    store = lab.only("pairs").path
    path = store / "manifest.g0001.json"
    rewrite(path, format=99)
    says = (f"{path}: format 99", "install a newer one")
    refused(lab, *lab.arguments("pairs", "pairs.draws=3"), exits=1, says=says)
    refused(lab, "student", "--pairs", store, "-c", "tiny.toml", "--set", "student.seed=4", exits=1, says=says)
    assert "format 99" in lab.nfm("audit", store, exits=1).stdout


def test_a_second_writer_is_told_who_holds_the_artifact(lab: Lab) -> None:
    long = ("teacher.images=400000",)
    first = lab.start(*lab.arguments("teacher", *long))
    lab.until(lambda: list(lab.artifacts.glob("teacher/*/lock.json")), first)
    says = (f"process {first.pid}", "is working on it", "wait for it or stop it")
    refused(lab, *lab.arguments("teacher", *long), exits=1, says=says)
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    lab.wait(first, exits=130)
    assert not list(lab.artifacts.glob("teacher/*/lock.json"))


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[Path]:
    """A file system with the artifacts, which somebody else fills up as soon as pairs are committed there.

    Skipped where none can be mounted.
    """
    folder = lab.folder / "disk"
    folder.mkdir()
    size = sum(path.stat().st_size + 4096 for path in lab.artifacts.rglob("*")) + 30_000_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here; the file size limit below is the same promise")
    over = threading.Event()
    try:
        subprocess.run(["cp", "-a", f"{lab.artifacts}/.", str(folder)], check=True)
        filler = threading.Thread(target=_fill, args=(folder, over))
        filler.start()
        yield folder
    finally:
        over.set()
        filler.join()
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder: Path, over: threading.Event) -> None:
    """Take all room but 50 kB of a file system once there is a commit that was not there before."""
    before = len(list(folder.glob("pairs/*/commits/*.json")))
    while len(list(folder.glob("pairs/*/commits/*.json"))) == before:
        if over.wait(0.001):
            return
    with (folder / "somebody-else").open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(folder).free - 50_000, 1))


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(lab: Lab, small_disk: Path) -> None:
    before = lab.committed()
    more = ("pairs.draws=40",)
    told = lab.run("pairs", *more, exits=1, NFM_ARTIFACTS=str(small_disk)).stderr
    assert "No space left on device" in told
    assert "free space" in told
    assert str(small_disk) in told.splitlines()[-1]
    assert len(told.splitlines()) < 20
    for path, digest in before.items():
        assert atomic.hash_file(small_disk / path)[0] == digest
    assert not list(small_disk.rglob("lock.json"))
    assert not list(small_disk.rglob(".tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert "shards are committed already" in lab.run("pairs", *more, NFM_ARTIFACTS=str(small_disk)).stderr
    lab.nfm("audit", lab.name("pairs"), NFM_ARTIFACTS=str(small_disk))


def test_a_file_that_may_not_grow_is_named_and_nothing_committed_changes(lab: Lab) -> None:
    before = lab.committed()
    command = [str(Path(sysconfig.get_path("scripts")) / "nfm"), *lab.arguments("student", "student.seed=9")]
    done = subprocess.run(
        command,
        cwd=lab.folder,
        env={**os.environ, "NFM_ARTIFACTS": str(lab.artifacts)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "checkpoints: cannot write (File too large)" in done.stderr
    assert before.items() <= lab.committed().items()
    lab.run("student", "student.seed=9")


def test_a_damaged_checkpoint_is_named_with_the_way_out(lab: Lab) -> None:
    sets = ("student.pairs=8000", "student.save_every=640", "student.log_every=640")
    process = lab.start(*lab.arguments("student", *sets))

    def newest() -> list[Path]:
        found = sorted(lab.artifacts.glob("student/*/checkpoints/0*/*.safetensors"))
        return [path for path in found if not (path.parents[2] / "manifest.json").exists()]

    lab.until(newest, process)
    process.kill()
    process.communicate()
    whole = newest()[-1].read_bytes()
    newest()[-1].write_bytes(whole[:5000])
    refused(lab, *lab.arguments("student", *sets), exits=1, says=("checkpoints/0", "remove the folder"))
    at = len(whole) // 2
    newest()[-1].write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused(lab, *lab.arguments("student", *sets), exits=1, says=("checkpoints/0", "remove the folder"))
    shutil.rmtree(newest()[-1].parent)
    lab.run("student", *sets)


def test_what_wants_a_store_or_a_model_refuses_the_rest_and_leaves_nothing_behind(made: Lab) -> None:
    before, teacher = made.committed(), made.name("teacher")
    refused(made, "repair", teacher, exits=2, says=(teacher, "no pair store"))
    refused(made, "pairs", "seal", teacher, exits=2, says=(teacher, "no pair store"))
    refused(made, "pairs", "info", teacher, exits=2, says=(teacher, "no pair store"))
    refused(made, "student", "--pairs", teacher, "-c", "tiny.toml", exits=2, says=(teacher, "no pair store"))
    refused(made, "sample", made.name("data"), exits=2, says=("name a student or a teacher",))
    refused(made, "sample", made.name("student"), "--nfe", "8", exits=2, says=("odd",))
    assert made.committed() == before
