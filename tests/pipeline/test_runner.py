"""Running stages in this process: provenance in specs, manifests and events; failures leave what they must."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nfm.pipeline import builder, runner
from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError
from nfm.pipeline.artifacts.lock import Held, Lock
from nfm.pipeline.config import load
from nfm.pipeline.console import StopRequest
from nfm.stages.base import StageError, Stopped
from nfm.stages.data import source
from nfm.stages.pairs import sealing
from nfm.storage.files import atomic
from tests.support.recorder import Recorder

if TYPE_CHECKING:
    from tests.conftest import Lab


def events(artifact: Artifact) -> list[dict[str, Any]]:
    lines = [line for path in sorted((artifact.path / "events").glob("*.jsonl")) for line in path.open()]
    return [json.loads(line) for line in lines]


def test_a_spec_holds_what_decides_the_result_and_no_time_host_or_path(made: Lab) -> None:
    for stage in ("data", "teacher", "pairs", "student", "evaluate"):
        spec = made.only(stage).spec
        assert {"stage", "version", "fingerprint", "config", "inputs", "external"} <= set(spec)
        text = json.dumps(spec)
        assert str(made.folder) not in text
        assert os.uname().nodename not in text
        assert spec["fingerprint"].startswith(made.only(stage).path.name)
    assert "draws" not in made.only("pairs").spec["config"]


def test_a_manifest_says_who_made_it_from_what_when_and_with_which_code(made: Lab) -> None:
    body = made.only("student").manifest()
    assert body["inputs"]["pairs"]["artifact"] == made.name("pairs")
    assert body["inputs"]["pairs"]["content_digest"] == made.only("pairs").manifest()["content_digest"]
    assert body["config"]["log_every"] == 1_000  # the whole config, what is left out of the fingerprint too
    assert {"python", "torch", "numpy", "nfm-pairs"} <= set(body["versions"])
    assert body["finished"] >= body["started"]
    assert body["seconds"] > 0
    dataset = made.only("data").manifest()["dataset"]
    assert dataset["licence"] == "CC BY 4.0"
    assert dataset["source"]["digest"]


def test_events_begin_with_start_and_end_with_complete(made: Lab) -> None:
    for stage in ("data", "teacher", "pairs", "student", "evaluate", "report"):
        kinds = [event["kind"] for event in events(made.only(stage))]
        assert (kinds[0], kinds[-1]) == ("START", "COMPLETE")
    committed = [event["shard"] for event in events(made.only("pairs")) if event["kind"] == "COMMIT"]
    assert len(set(committed)) == len(committed) == 8


def test_a_failure_is_written_to_events_and_releases_the_lock(lab: Lab, root: Path) -> None:
    store = lab.only("pairs")
    shard = store.path / store.manifest()["shards"][0]["payload"]
    shard.write_bytes(shard.read_bytes()[:-3000])
    fresh = builder.build(load(lab.config, ["student.seed=11"]))
    with pytest.raises(Exception, match=shard.name):
        runner.run(fresh, "student")
    artifact = fresh["student"].artifact()
    assert artifact is not None
    assert artifact.started
    assert not artifact.done
    assert events(artifact)[-1]["kind"] == "FAIL"
    assert shard.name in events(artifact)[-1]["error"]
    assert not (artifact.path / "lock.json").exists()


def test_a_stop_before_the_work_leaves_a_resumable_artifact(lab: Lab, root: Path) -> None:
    nodes = builder.build(load(lab.config, ["student.seed=12"]))
    stop = StopRequest()
    stop.asked = True
    with pytest.raises(Stopped):
        runner.run(nodes, "student", stop)
    artifact = nodes["student"].artifact()
    assert artifact is not None
    assert not artifact.done
    assert events(artifact)[-1]["kind"] == "STOP"
    assert runner.run(nodes, "student").done
    assert [event["kind"] for event in events(artifact)].count("START") == 2
    assert [event.get("resumed") for event in events(artifact) if event["kind"] == "START"] == [False, True]


@pytest.mark.parametrize("begun", [False, True], ids=["while it is named", "in the stage"])
def test_a_signal_stops_the_data_stage_wherever_it_is(
    empty: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begun: bool
) -> None:
    """Of a source that takes an hour to read; the stage itself is reached when the name's digest is known already."""
    monkeypatch.setenv("NFM_ARTIFACTS", str(empty.artifacts))
    image = empty.folder / "images" / "a" / "1.png"
    image.parent.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(1 << 40)
    note = empty.artifacts / ".sources" / f"{source._signature([('a/1.png', image)])}.json"
    if begun:
        note.parent.mkdir(parents=True)
        atomic.write_json(note, {"identity": {"digest": "ab" * 32, "files": 1, "bytes": 1 << 40}})
    nodes = builder.build(load(empty.config, ["data.source=images", f"data.path={image.parents[1]}"]))
    stop, over, before = StopRequest(), threading.Event(), set(threading.enumerate())

    def send() -> None:
        while begun and not over.is_set() and not list(empty.artifacts.glob("data/*/events/*")):
            time.sleep(0.01)
        if not over.wait(0.1):
            os.kill(os.getpid(), signal.SIGTERM)

    with stop.listening():
        sender = threading.Thread(target=send)
        sender.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                runner.run(nodes, "data", stop)
        finally:
            over.set()
            sender.join()
    assert list(empty.artifacts.glob("data/*/manifest.json")) == []
    assert bool(list(empty.artifacts.glob("data/*"))) == begun
    assert note.exists() == begun
    told = capsys.readouterr().err
    assert ("stopped; the same command goes on from here" in told) == begun
    assert "begins it anew" not in told
    if begun:  # once more, asked to stop before it has done anything
        again = StopRequest()
        again.asked = True
        with pytest.raises(Stopped):
            runner.run(nodes, "data", again)
        assert "data: resuming data/" in capsys.readouterr().err
    assert set(threading.enumerate()) <= before  # no thread goes on reading


def test_a_device_that_is_not_there_is_named(lab: Lab, root: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    nodes = builder.build(load(lab.config, ["student.device=cuda", "student.seed=13"]))
    with pytest.raises(StageError, match="device = 'cuda': torch sees no CUDA device here"):
        runner.run(nodes, "student")


def test_a_stop_that_ends_the_processes_of_torchs_compiler_is_a_stop() -> None:
    broken = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("its pool is broken")
    for stopping, expected in ((True, Stopped), (False, RuntimeError)):
        with pytest.raises(expected), runner._compiling(Recorder(0 if stopping else 10**6)):
            raise broken
    with pytest.raises(KeyError), runner._compiling(Recorder(0)):
        raise KeyError("a fault of ours")


def test_an_artifact_under_lock_is_not_touched(lab: Lab, root: Path) -> None:
    nodes = builder.build(load(lab.config, ["student.seed=14"]))
    artifact = nodes["student"].artifact()
    assert artifact is not None
    artifact.path.mkdir()
    with Lock(artifact.path):
        with pytest.raises(Held):
            runner.run(nodes, "student")
        assert [path.name for path in artifact.path.iterdir()] == ["lock.json"]


def test_only_stores_are_sealed(made: Lab) -> None:
    with pytest.raises(ArtifactError, match="only stores are sealed"):
        runner.seal_store(made.only("teacher"))


def test_sealing_says_why_a_generation_has_no_coupling_report(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    store = lab.only("pairs", "independent")
    content = store.manifest()["content_digest"]
    store.reference.unlink()
    atomic.write_json(store.path / sealing.BEGUN, {"content_digest": content})
    again = runner.seal_store(store)
    assert again.manifest()["content_digest"] == content
    assert "coupling_report" not in again.manifest()
    assert "without a coupling report: one was begun before" in capsys.readouterr().err
    assert "FINDING" not in lab.nfm("audit", store.path, "--quick").stdout, "what a killed report left is no fault"
