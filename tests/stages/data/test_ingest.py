"""The data set is the same wherever and however often its parts were decoded, and what is committed stays decoded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nfm.stages.base import Result, StageError, Unfit
from nfm.stages.data import parts as of_parts
from nfm.stages.data import records, stage
from nfm.stages.data.config import DataConfig
from nfm.stages.data.ingest import ingest_shard
from nfm.stages.data.source import Encoded
from nfm.stages.executors.jobs import Job
from nfm.storage.dataset.writer import DatasetWriter
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import as_path, names_in, remove
from tests.stages.data.image_files import picture
from tests.stages.data.sources import test_parquet as parquet
from tests.stages.data.sources import test_webdataset as webdataset
from tests.support.recorder import Recorder

ROWS, EACH = 22, 4


def folder(root: Path, bad: tuple[int, ...] = ()) -> DataConfig:
    for number in range(ROWS):
        file = picture(root / "in" / f"c{number % 2}" / f"{number:02d}.png", 10 * number)
        if number in bad:
            file.write_bytes(file.read_bytes()[:50])
    return config(source="images", path=str(root / "in"))


def tars(root: Path) -> DataConfig:
    (root / "in").mkdir()
    for number in range(2):
        webdataset.pack(root / "in" / f"{number}.tar", webdataset.good(ROWS // 2, start=100 * number))
    return config(source="webdataset", path=str(root / "in"))


def rows_of_parquet(root: Path) -> DataConfig:
    parquet.write(root / "a.parquet", parquet.table(ROWS), row_group_size=3)
    return config(source="parquet", path=str(root / "a.parquet"))


def config(**values: object) -> DataConfig:
    return DataConfig.model_validate(
        {"rows_per_shard": EACH, "heldout": 0.25, "max_rejected": 0.5, "threads": 1, "workers": 2, **values}
    )


def made(config: DataConfig, out: Path, report: Recorder | None = None) -> Result:
    out.mkdir(exist_ok=True)
    return stage.run(config, {}, out, report or Recorder())


def in_one_go(config: DataConfig, out: Path) -> dict[str, tuple[str, int]]:
    """The payload as it is if all images are decoded at once and written by one process."""
    source = stage.open_source(config)
    own, apart = stage.split_rows(source, config)
    rows = np.concatenate([own, apart])
    (out / "s").mkdir(parents=True)
    loaded = source.load(rows, out / "s", Recorder())
    usable = np.setdiff1d(np.arange(len(rows)), list(loaded.rejected))
    classes, shape = list(source.classes), loaded.images.shape[1:]
    writer = DatasetWriter(out, source.name, shape, classes, config.rows_per_shard, "uint8", None, None)
    for split, at in zip(("train", "heldout"), np.split(usable, [np.searchsorted(usable, len(own))])):
        keys = [source.keys[row] for row in rows[at]]
        captions = getattr(source, "captions", None)
        texts = None if captions is None else [captions[row] for row in rows[at]]
        writer.write_split(split, len(at), [(loaded.images[at], source.labels[rows[at]], keys)], texts)
    rejected = [(source.keys[rows[position]], reason) for position, reason in loaded.rejected.items()]
    return writer.close(rejected) | writer.files


MADE_FROM = {
    "a folder": folder,
    "a folder with images that cannot be read": lambda root: folder(root, bad=(3, 9, 17)),
    "tars": tars,
    "parquet": rows_of_parquet,
}


@pytest.mark.parametrize("kind", MADE_FROM)
def test_parts_give_the_bytes_of_a_data_set_that_was_decoded_in_one_go(tmp_path: Path, kind: str) -> None:
    settings = MADE_FROM[kind](tmp_path)
    expected = in_one_go(settings, tmp_path / "whole")
    result = made(settings, tmp_path / "out")
    assert dict(result.digests) == expected
    assert result.metrics["rejected"] == (3 if "cannot" in kind else 0)
    assert not (tmp_path / "out" / "scratch").exists()


@pytest.mark.seconds(60)
@pytest.mark.parametrize(
    "kind", ["a folder with images that cannot be read", pytest.param("parquet", marks=pytest.mark.long)]
)
def test_workers_of_ray_give_the_same_bytes(tmp_path: Path, kind: str, cluster: None) -> None:
    settings = MADE_FROM[kind](tmp_path)
    expected = dict(made(settings, tmp_path / "here").digests)
    report = Recorder()
    result = made(settings.model_copy(update={"executor": "ray"}), tmp_path / "there", report)
    assert dict(result.digests) == expected
    assert report.seen[-1][:2] == (ROWS - result.metrics["rejected"],) * 2


class KillsAWorker(Recorder):
    """Kills the actor of this process's own Ray when the first part is there."""

    killed = False

    def progress(self, done: int, total: int, unit: str, workers: object = (), **figures: object) -> None:
        super().progress(done, total, unit)
        if done and not self.killed:
            self.killed = True
            for pid in filter(is_our_actor, [int(path.name) for path in Path("/proc").glob("[0-9]*")]):
                os.kill(pid, signal.SIGKILL)


def is_our_actor(pid: int) -> bool:
    with contextlib.suppress(OSError):
        if (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(b"ray::Worker"):
            while pid > 1 and pid != os.getpid():
                pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
            return pid == os.getpid()
    return False


@pytest.mark.seconds(60)
def test_a_killed_worker_of_ray_changes_nothing(tmp_path: Path, cluster: None) -> None:
    settings = folder(tmp_path, bad=(3,))
    expected = dict(made(settings, tmp_path / "here").digests)
    report = KillsAWorker()
    result = made(settings.model_copy(update={"executor": "ray", "workers": 1}), tmp_path / "there", report)
    assert any("lost Ray actor" in said for said in report.said)
    assert dict(result.digests) == expected


KILLED = """
import os, sys
from pathlib import Path
from nfm.stages.data import records, stage
from nfm.stages.data.config import DataConfig
from tests.support.recorder import Recorder

class Killed(Recorder):
    def progress(self, done, total, unit, workers=(), **figures):
        if done >= 8:
            os.kill(os.getpid(), 9)

stage.run(DataConfig.model_validate_json(sys.argv[1]), {}, Path(sys.argv[2]), Killed())
"""


@pytest.mark.seconds(40)
def test_a_killed_run_goes_on_with_the_parts_that_it_committed(tmp_path: Path) -> None:
    settings, out = folder(tmp_path, bad=(3, 9, 17)), tmp_path / "out"
    out.mkdir()
    told = subprocess.run([sys.executable, "-c", KILLED, settings.model_dump_json(), str(out)], capture_output=True)
    assert told.returncode == -9, told.stderr
    before = {path.name: path.stat().st_mtime_ns for path in (out / "commits").iterdir()}
    assert len(before) >= 2

    report = Recorder()
    result = made(settings, out, report)
    assert any(f"{len(before)} of 6 parts are decoded already" in said for said in report.said)
    assert dict(result.digests) == in_one_go(settings, tmp_path / "whole")


def planned(settings: DataConfig, out: Path) -> tuple[Encoded, list[of_parts.Part]]:
    source = stage.open_source(settings)
    assert isinstance(source, Encoded)
    own, apart = stage.split_rows(source, settings)
    rows = np.concatenate([own, apart])
    labels, size = source.labels[rows], source.look(Recorder())
    plan = of_parts.planned(source, rows, labels, len(own), EACH, size)
    of_parts.write_plan(out, plan, source, rows, labels, size)
    return source, plan


def test_two_workers_on_a_part_leave_one_commit_and_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source, plan = planned(folder(tmp_path), out)
    first, _ = ingest_shard(source, out, Job(plan[0].name, "first"))
    second, _ = ingest_shard(source, out, Job(plan[0].name, "second"))
    assert second == first
    assert [path.name for path in (out / "parts").glob("*.tar")] == [f"{plan[0].name}.first.tar"]


def test_a_part_is_stopped_between_batches_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source, plan = planned(folder(tmp_path), out)
    with pytest.raises(InterruptedError):
        ingest_shard(source, out, Job(plan[0].name, "a"), lambda: True)
    assert [path.name for path in (out / "parts").iterdir()] == ["plan.parquet"]
    assert not (out / "commits").exists()


@pytest.mark.parametrize("harm", ["of other rows", "without its file", "damaged"])
def test_a_commit_that_does_not_fit_is_made_anew(tmp_path: Path, harm: str) -> None:
    settings, out = folder(tmp_path), tmp_path / "out"
    source, plan = planned(settings, out)
    commit, _ = ingest_shard(source, out, Job(plan[0].name, "a"))
    path = records.path_of(out, commit.name)
    if harm == "of other rows":
        body = {name: value for name, value in atomic.read_json(path).items() if name != "digest"}
        atomic.write_json(path, {**body, "rows_digest": "0" * 64})
    elif harm == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        (out / commit.file).unlink()
    assert of_parts.committed(out, plan[0]) is None
    assert dict(made(settings, out).digests) == in_one_go(settings, tmp_path / "whole")


class CutsOff(Recorder):
    """Cuts a file off when decoding begins."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file

    def progress(self, done: int, total: int, unit: str, workers: object = (), **figures: object) -> None:
        if done == 0:
            self.file.write_bytes(self.file.read_bytes()[:600])


def test_parts_that_fail_are_named_and_the_others_stay_committed(tmp_path: Path) -> None:
    settings, out = tars(tmp_path), tmp_path / "out"
    file = tmp_path / "in" / "0.tar"
    whole = file.read_bytes()
    with pytest.raises(StageError, match=r"parts of the data are missing: .*0\.tar.*others are committed"):
        made(settings, out, CutsOff(file))
    assert list((out / "failed").glob("*.txt"))
    file.write_bytes(whole)
    assert dict(made(settings, out).digests) == in_one_go(settings, tmp_path / "whole")


def test_a_source_without_encoded_images_is_not_sent_to_workers(tmp_path: Path) -> None:
    with pytest.raises(Unfit, match=r'data\.executor = "ray": source "digits" has no encoded images'):
        made(config(source="digits", executor="ray", workers=0), tmp_path / "out")


def in_a_bucket(out: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `out` the local folder of an artifact in a bucket. Gives the artifact."""
    monkeypatch.setenv("NFM_SCRATCH", str(out.parent / "scratch"))
    out.mkdir()
    atomic.write_json(out / mirror.ORIGIN, {"artifact": f"{bucket}/run/data/ab12", "manifest": ""})
    return as_path(f"{bucket}/run/data/ab12")


def test_parts_in_a_bucket_that_others_made_are_not_decoded_again(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = folder(tmp_path).model_copy(update={"executor": "ray"})
    there = in_a_bucket(tmp_path / "out", bucket, monkeypatch)
    source, plan = planned(settings, there)
    for part in plan:
        own = tmp_path / part.name
        first, _ = ingest_shard(source, there, Job(part.name, "first"), folder=own)
    second, _ = ingest_shard(source, there, Job(part.name, "second"), folder=own)
    assert second == first
    assert names_in(there / "parts") == sorted(["plan.parquet", *(f"{part.name}.first.tar" for part in plan)])
    gone, damaged = plan[0].name, plan[1].name
    remove(there / "parts" / f"{gone}.first.tar")
    (there / "commits" / f"{damaged}.json").write_bytes(b"{}")
    assert [part.name for part in plan if of_parts.committed(there, part) is None] == [gone, damaged]
    for name in (gone, damaged):
        ingest_shard(source, there, Job(name, "third"), folder=tmp_path / name)
    report = Recorder()
    expected = in_one_go(settings.model_copy(update={"executor": "serial"}), tmp_path / "whole")
    assert dict(made(settings, tmp_path / "out", report).digests) == expected, "no worker was needed"
    assert f"{len(plan)} of {len(plan)} parts are decoded already" in report.said
    assert names_in(there) != [], "the run that publishes removes the parts"
