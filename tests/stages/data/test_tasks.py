"""Data and latents in an array of tasks: a list, its tasks, and an end that makes what one process makes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfm.storage.files import atomic
from tests.e2e.conftest import Nfm, command
from tests.stages.data.latents.small import FOLDED, SLOW
from tests.support.lab import Lab

IMAGES, BROKEN = 60, 7
LATENTS = """
[latents]
vae = "mine_vae:vae"
mirrors = true
rows_per_shard = 16
batch_size = 8
executor = "serial"
"""


@pytest.fixture
def pictures(empty: Lab) -> Iterator[Lab]:
    """A lab whose data are 60 files, one of which is broken, and which has latents."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = empty.folder / "pictures" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
        if number == BROKEN:
            path.write_bytes(path.read_bytes()[:60])
    whole = empty.config.read_text()
    data = """[data]
source = "images"
path = "pictures"
image_size = 8
channels = 1
heldout = 0.1
max_rejected = 0.1
rows_per_shard = 8
"""
    start = whole.index("[data]")
    end = whole.find("\n[", start + 1)
    empty.config.write_text(whole[:start] + data + whole[end:] + LATENTS)
    (empty.folder / "mine_vae.py").write_text(FOLDED)
    yield empty
    sys.modules.pop("mine_vae", None)


@pytest.fixture
def nfm(pictures: Lab, monkeypatch: pytest.MonkeyPatch) -> Nfm:
    return command(pictures, monkeypatch)


@pytest.mark.seconds(40)
@pytest.mark.parametrize("stage", ["data", "latents"])
def test_tasks_make_what_one_process_makes(stage: str, pictures: Lab, nfm: Nfm) -> None:
    nfm("run", stage, "-c", "tiny.toml")
    alone = pictures.only(stage).manifest()
    pictures.drop(stage)

    listed = nfm("worklist", stage, "-c", "tiny.toml", "-o", "list.json")
    pieces = json.loads((pictures.folder / "list.json").read_text())["shards"]
    assert f"{len(pieces)} shards of {pictures.artifacts.resolve()}/{stage}/" in listed
    assert len(pieces) >= 7
    end = ("run", stage, "-c", "tiny.toml", "--set", f"{stage}.executor=slurm")
    lacking = nfm(*end, exits=1)
    assert f"{len(pieces)} of {len(pieces)} " in lacking
    assert "not made yet" in lacking
    assert f"run `nfm submit {stage} --slurm` again, which makes only these" in lacking
    for task in (2, 0):
        nfm("work", "list.json", "--task", task, "--of", 3)
    assert f"{len(pieces[1::3])} of {len(pieces)} " in nfm(*end, exits=1)
    nfm("work", "list.json", "--task", 1, "--of", 3)
    assert "2 of them committed already" in nfm("work", "list.json", "--task", 1, "--of", len(pieces) // 2)

    nfm(*end)
    made = pictures.only(stage)
    assert made.manifest()["content_digest"] == alone["content_digest"]
    assert made.manifest()["metrics"] == alone["metrics"]
    assert not (made.path / "commits").exists()
    text = (pictures.folder / "list.json").read_text()
    atomic.write_json(pictures.folder / "odd.json", {**json.loads(text), "stage": "os"})
    assert "stage 'os' of the worklist: it is one of" in nfm("work", "odd.json", "--task", 0, "--of", 1, exits=2)
    assert "committed already" in nfm("work", "list.json", "--task", 0, "--of", 1), "a task that Slurm begins again"
    assert "0 shards" in nfm("worklist", stage, "-c", "tiny.toml", "-o", "another.json")
    assert "clean" in nfm("audit", f"{stage}/{made.path.name}")


@pytest.mark.seconds(20)
def test_a_killed_task_leaves_its_commits_and_the_same_task_makes_the_rest(pictures: Lab, nfm: Nfm) -> None:
    (pictures.folder / "mine_vae.py").write_text(SLOW)
    nfm("worklist", "latents", "-c", "tiny.toml", "-o", "list.json")
    folder = pictures.artifacts / "latents"

    def commits() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.glob("*/commits/[th]*.json")}

    process = pictures.start("work", "list.json", "--task", 0, "--of", 1)
    pictures.until(lambda: commits(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = commits()
    pieces = len(json.loads((pictures.folder / "list.json").read_text())["shards"])
    assert 0 < len(kept) < pieces
    said = nfm("work", "list.json", "--task", 0, "--of", 1)
    assert f"{pieces} shards are this task's, {len(kept)} of them committed already" in said
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(commits()) == pieces


@pytest.mark.seconds(20)
def test_a_list_of_another_config_is_refused_by_name(pictures: Lab, nfm: Nfm) -> None:
    words = ("worklist", "data", "-c", "tiny.toml", "-o", "list.json")
    nfm(*words)
    before = (pictures.folder / "list.json").read_bytes()
    assert "list.json: exists and is the list of" in nfm(*words, "--set", "data.seed=5", exits=2)
    assert (pictures.folder / "list.json").read_bytes() == before
    spec = pictures.artifacts / "data" / Path(json.loads(before)["store"]).name / "spec.json"
    body = {name: value for name, value in atomic.read_json(spec).items() if name != "digest"}
    atomic.write_json(spec, {**body, "fingerprint": "0" * 64})
    told = nfm("work", "list.json", "--task", 0, "--of", 1, exits=1)
    assert "spec.json: not the recipe that list.json was made for; make a new list with `nfm worklist`" in told


def test_arrays_copied_whole_have_no_list(empty: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    nfm = command(empty, monkeypatch)
    for words in (("worklist", "data", "-o", "list.json"), ("submit", "data", "--slurm")):
        assert 'source "digits" has no encoded images' in nfm(*words, "-c", "tiny.toml", exits=2)
    assert not empty.all("data")
    assert "no stage latents" in nfm("worklist", "latents", "-o", "list.json", "-c", "tiny.toml", exits=2)
    assert not (empty.folder / "list.json").exists()
