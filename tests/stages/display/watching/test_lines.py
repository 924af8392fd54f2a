"""Who is told of a training beside `metrics.jsonl`: each figure once, also after a kill, and never at its cost."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nfm.stages.base import Stopped, Unfit
from nfm.stages.display.pictures import save_grid
from nfm.stages.display.watching import weights_biases
from nfm.stages.display.watching.grids import path_of
from nfm.stages.display.watching.lines import Lines, check_watching, read_lines
from nfm.stages.trained import training
from nfm.stages.trained.training import Task, fit
from nfm.stages.trained.training.section import TrainingSection
from tests.support.patience import until
from tests.support.recorder import Recorder

EXAMPLES, EVERY = 96, 16


@dataclass
class Batch:
    image: Tensor
    place: None = None

    def __len__(self) -> int:
        return len(self.image)


class Batches:
    """Endless batches of 8 that know where they are."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.read += 1
            yield Batch(torch.arange(8.0).add(self.read).cos()[:, None])

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


def task(config: Any, inputs: Any, device: str) -> Task:
    torch.manual_seed(0)

    def loss(model: Any, batch: Batch, random: Any) -> tuple[Tensor, dict[str, float]]:
        return (model(batch.image) - 1).square().mean(), {}

    return Task(nn.Linear(1, 1), loss, Batches(), {}, EXAMPLES, "pairs")


def config(*watch: str) -> TrainingSection:
    return TrainingSection.model_validate({"batch_size": 8, "save_every": 32, "log_every": EVERY, "watch": watch})


class KilledError(Exception):
    pass


class Dies(Recorder):
    """The reporter of a training that ends without a word when it is past this many examples."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after

    def progress(self, done: int, total: int, unit: str, workers: object = (), **figures: object) -> None:
        if done > self._after:
            raise KilledError
        super().progress(done, total, unit, workers, **figures)


def train(out: Path, *watch: str, reporter: Recorder | None = None) -> Recorder:
    out.mkdir(parents=True, exist_ok=True)
    recorder = reporter or Recorder()
    a_second_later(watch)
    fit(task, config(*watch), {}, out, recorder)
    return recorder


def a_second_later(watch: Sequence[str]) -> None:
    """W&B names the folder of a run by the second in which it began."""
    time.sleep(1.05 if "wandb" in watch else 0)


def stop_and_go_on(out: Path, *watch: str) -> None:
    """Killed two lines after the checkpoint of 32, then stopped and continued again."""
    with pytest.raises(KilledError):
        train(out, *watch, reporter=Dies(56))
    assert [line["pairs_seen"] for line in read_lines(out / "metrics.jsonl")] == [16, 32, 48, 64]
    with pytest.raises(Stopped):
        train(out, *watch, reporter=Recorder(patience=5))
    train(out, *watch)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


@pytest.mark.seconds(30)
def test_tensorboard_has_the_lines_of_the_metrics_once_after_a_kill_and_a_stop(tmp_path: Path) -> None:
    stop_and_go_on(tmp_path, "tensorboard")
    found, lines = events(tmp_path / "tensorboard"), read_lines(tmp_path / "metrics.jsonl")
    assert found.keys() == lines[0].keys()
    for name, values in found.items():
        assert values == [(line["pairs_seen"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert [step for step, _ in found["loss"]] == list(range(EVERY, EXAMPLES + 1, EVERY))


def test_tensorboard_that_is_switched_on_later_knows_the_lines_before(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, reporter=Recorder(patience=7))
    train(tmp_path, "tensorboard")
    assert [step for step, _ in events(tmp_path / "tensorboard")["loss"]] == list(range(EVERY, EXAMPLES + 1, EVERY))


def records(file: Path) -> Iterator[Any]:
    """What a run of W&B has on disk: a leveldb log, 7 bytes of its own and then pieces in blocks of 32 KB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + size > len(data):
            return  # it is being written
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_runs(out: Path) -> list[tuple[str, list[dict[str, float]]]]:
    """The id and the history of each run that W&B kept offline, the oldest first.

    Its own process writes them, on a busy machine later than a run is finished.
    """
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name)
    until(lambda: all(any(record.HasField("exit") for record in records(file)) for file in files), "a run without end")
    runs = []
    for file in files:
        ids, history = set(), []
        for record in records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items}
                history.append(values | {"_step": record.history.step.num})
        runs.append((ids.pop(), history))
    return runs


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B with nobody's settings, no login, and nobody at its address."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()  # it reads settings once in a process
    yield
    wandb.teardown()


@pytest.mark.long
@pytest.mark.seconds(30)
@pytest.mark.usefixtures("no_login")
def test_wandb_goes_on_with_the_same_run_and_is_told_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    stop_and_go_on(tmp_path / "student/ab12", "wandb")
    runs, lines = wandb_runs(tmp_path / "student/ab12"), read_lines(tmp_path / "student/ab12/metrics.jsonl")
    assert len({name for name, _ in runs}) == 1
    told = [values for _, history in runs for values in history]
    assert [values["_step"] for values in told] == [line["pairs_seen"] for line in lines]
    assert [values["loss"] for values in told] == [line["loss"] for line in lines]


@pytest.mark.seconds(30)
@pytest.mark.usefixtures("no_login")
def test_wandb_is_told_of_a_grid_once_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    grid = path_of(tmp_path, 16)
    grid.parent.mkdir()
    save_grid(grid, np.zeros((4, 1, 8, 8), np.uint8))
    for _ in range(2):  # begun, and gone on with
        a_second_later(["wandb"])
        with Lines(tmp_path, "pairs", 16, ["wandb"], {}, print) as lines:
            lines.picture(16, grid)
    told = [values for _, history in wandb_runs(tmp_path) for values in history if "samples" in values]
    assert [values["_step"] for values in told] == [16]


@pytest.mark.seconds(30)
@pytest.mark.usefixtures("no_login")
def test_wandb_without_a_login_keeps_the_run_and_says_so_once(tmp_path: Path) -> None:
    recorder = train(tmp_path / "student/ab12", "wandb")
    (said,) = [text for text in recorder.said if "W&B" in text]
    assert "no login: `wandb login` makes one" in said
    assert "wandb sync" in said
    ((_, history),) = wandb_runs(tmp_path / "student/ab12")
    assert [values["_step"] for values in history] == list(range(EVERY, EXAMPLES + 1, EVERY))


def test_a_network_that_is_gone_at_the_end_does_not_hold_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_biases, "PATIENCE", 0.01)
    never = threading.Event()
    watcher = object.__new__(weights_biases.WeightsBiases)
    said: list[str] = []
    watcher._say, watcher._run = said.append, type("Run", (), {"finish": never.wait})()
    watcher.close()
    never.set()
    assert said == ["W&B has not taken everything yet; `wandb sync` of the folder `wandb` sends the rest"]


def test_who_looks_on_and_fails_is_told_nothing_more_and_the_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    recorder = train(tmp_path, "tensorboard")
    assert len([text for text in recorder.said if "TensorBoard is told nothing more" in text]) == 1
    assert len(read_lines(tmp_path / "metrics.jsonl")) == EXAMPLES // EVERY


def test_the_weights_and_the_fingerprint_are_those_of_a_training_that_nobody_watches(tmp_path: Path) -> None:
    train(tmp_path / "alone")
    train(tmp_path / "watched", "tensorboard")
    one, other = (tmp_path / name / training.WEIGHTS for name in ("alone", "watched"))
    assert one.read_bytes() == other.read_bytes()
    assert config().semantic() == config("tensorboard", "wandb").semantic()


def test_a_watcher_whose_package_is_missing_is_refused_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unfit, match=r"student\.watch names 'wandb', and wandb is not installed: .*nfm-pairs\[watch\]"):
        check_watching("student", ["wandb"])
    check_watching("student", [])


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"pairs_seen": 16, "loss": 1.0}\n{"pairs_seen": 32, "lo')
    with Lines(tmp_path, "pairs", 16, (), {}, print) as lines:
        lines.add({"pairs_seen": 32.0, "loss": math.pi})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"pairs_seen": 16, "loss": 1.0},
                                                      {"pairs_seen": 32.0, "loss": 3.141593}]  # fmt: skip


@pytest.mark.parametrize("mode", ["", "ofline"])
def test_a_mode_that_is_none_is_wrong_use_before_the_training(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(Unfit, match=f"WANDB_MODE = '{mode}' is no mode of W&B: unset it, or set it to online, offline"):
        check_watching("student", ["wandb"])
