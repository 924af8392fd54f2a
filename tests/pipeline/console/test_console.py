"""The output of a running stage: the same figures on a terminal, in plain lines and in events."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nfm.pipeline.artifacts.artifact import Artifact
from nfm.pipeline.console import Console, StopRequest, progress
from nfm.pipeline.console.rate import Rate
from tests.support.patience import PATIENCE

if TYPE_CHECKING:
    from tests.conftest import Lab


def worker(name: str, rate: float, encode: float = 0.8) -> dict[str, Any]:
    """A worker's row as the executors give it."""
    shares = {"read": 0.1, "encode": encode, "write": 0.05, "wait": 0.05}
    return {"worker": name, "shards": 3, "per_second": rate, **shares}


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


class Screen:
    """What a terminal of this size shows after it was sent `text`: the few sequences that are sent, and wrapping."""

    def __init__(self, columns: int):
        self.columns, self.row, self.column = columns, 0, 0
        self.cells: dict[tuple[int, int], str] = {}

    def feed(self, text: str) -> Screen:
        for part in re.findall(r"\x1b\[\d*[A-Z]|\r|\n|[^\x1b\r\n]", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                self.column = 0  # the terminal's driver adds the return
            elif part[0] == "\x1b":
                self._control(part[-1], int(part[2:-1] or 0))
            else:
                if self.column == self.columns:
                    self.row, self.column = self.row + 1, 0
                self.cells[self.row, self.column] = part
                self.column += 1
        return self

    def _control(self, kind: str, number: int) -> None:
        assert kind in "AKJ", kind
        if kind == "A":
            self.row = max(self.row - number, 0)
            return
        here = (self.row, self.column)
        self.cells = {
            at: cell for at, cell in self.cells.items() if at < here or (kind == "K" and at[0] != self.row)
        }  # fmt: skip

    def lines(self) -> list[str]:
        last = max((row for row, _ in self.cells), default=-1)
        rows = range(last + 1)
        return ["".join(self.cells.get((row, column), " ") for column in range(self.columns)).rstrip() for row in rows]


SCRIPT = """
import sys, time
from pathlib import Path
from nfm.pipeline.console import Console, StopRequest
stop = StopRequest()
with stop.listening():
    console = Console("pairs", Path(sys.argv[1]), stop)
    console.say("making pairs/abc")
    rows = [{"worker": f"node{n}", "shards": n, "per_second": 10.0 * n, "read": 0.1, "encode": 0.8,
             "write": 0.06, "wait": 0.04} for n in range(int(sys.argv[2]))]
    for step in range(int(sys.argv[3])):
        console.progress(1000 + step * 10, 100_000, "pairs", rows, failed=1)
        if step == 5:
            console.say("d000-s00001 failed and is set aside: boom")
        if console.ending:
            break
        time.sleep(0.02)
    console.finish()
    console.say("done")
    console.close()
"""


class Terminal:
    """A script's process whose standard error is a real terminal of this size."""

    def __init__(self, folder: Path, workers: int, steps: int, columns: int = 100, rows: int = 24):
        self.master, slave = pty.openpty()
        self.text, self.seen = "", 0
        self.resize(columns, rows)
        command = [sys.executable, "-c", SCRIPT, str(folder / "events"), str(workers), str(steps)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave)
        os.close(slave)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, until: str | None = None) -> str:
        """Read on to a text that comes from now on, or to the end of the process; returns all that came so far."""
        deadline = time.monotonic() + PATIENCE
        while until is None or until not in self.text[self.seen :]:
            assert time.monotonic() < deadline, self.text
            if not select.select([self.master], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            self.text += data.decode(errors="replace").replace("\r\n", "\n")
        self.seen = len(self.text)
        return self.text

    def end(self) -> str:
        text = self.read()
        assert self.process.wait(PATIENCE) == 0, text
        os.close(self.master)
        return text


def test_a_terminal_shows_a_table_in_place_and_is_clean_at_the_end(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, workers=3, steps=60)
    text = terminal.end()
    in_between = Screen(100).feed(text[: text.index("pairs: done")].rpartition("\x1b[J")[0].rpartition("\r\x1b[")[0])
    bar, header, *rows = in_between.lines()[-5:]
    assert re.match(r"pairs: +[12]%\|", bar)
    assert "/100000" in bar
    assert "failed=1" in bar
    assert header.split() == ["worker", "pairs/s", "read", "encode", "write", "wait", "shards"]
    assert rows[2].split() == ["node2", "20.0", "10", "%", "80", "%", "6", "%", "4", "%", "2"]
    assert Screen(100).feed(text).lines() == [
        "pairs: making pairs/abc",
        "pairs: d000-s00001 failed and is set aside: boom",
        "pairs: done",
    ]
    assert 2 <= text.count("worker ") <= 12  # a few a second, not every call


def test_as_many_workers_are_shown_as_the_terminal_holds(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, workers=30, steps=8, columns=40, rows=10)
    text = terminal.end()
    drawn = text[: text.index("pairs: done")]
    assert "and 24 more" in drawn
    assert "node5" in drawn
    assert "node6" not in drawn
    lines = re.sub(r"\x1b\[\d*[A-Z]|\r", "", drawn).split("\n")
    assert max(len(line) for line in lines if not line.endswith("boom")) <= 39
    assert Screen(40).feed(text).lines()[-1] == "pairs: done"


def test_a_narrower_terminal_leaves_no_remains_of_the_table(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, workers=3, steps=90)
    terminal.read(until="boom\n")
    terminal.read(until="node2")  # drawn again below that line
    terminal.resize(50, 24)
    text = terminal.end()
    # The bar of 99 characters lies on two rows of the narrow terminal: once there is one row more to go back over.
    moves = [int(number) for number in re.findall(r"\r\x1b\[(\d+)A", text)]
    assert moves.count(6) == 1
    assert {moves[0], moves[-1]} == {5}


def test_a_signal_that_asks_to_end_is_no_stop_and_says_so(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, workers=2, steps=5000)
    terminal.read(until="boom\n")
    terminal.read(until="node1")
    terminal.process.send_signal(signal.SIGUSR1)
    screen = Screen(100).feed(terminal.end()).lines()
    assert "asked to end: the work in hand is finished, nothing new begins; the next run goes on" in screen
    assert screen[-1] == "pairs: done"


def test_ending_follows_every_signal_and_stopping_only_those_that_stop(tmp_path: Path) -> None:
    stop = StopRequest()
    console = Console("pairs", tmp_path / "events", stop)
    with stop.listening():
        assert not console.ending
        os.kill(os.getpid(), signal.SIGUSR1)
        assert console.ending
        assert not console.stopping
        os.kill(os.getpid(), signal.SIGUSR1)  # asked twice it still ends in order
        os.kill(os.getpid(), signal.SIGTERM)
        assert console.stopping
        assert console.ending
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_elsewhere_there_is_a_line_after_five_seconds_and_every_thirty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    console = Console("pairs", tmp_path / "events", StopRequest(), clock=clock)
    rows = [worker("a", 10), worker("b", 20, encode=0.6), worker("c", 30, encode=0.7)]
    for second in range(91):
        clock.now = 1000.0 + second
        console.progress(500 + 50 * second, 10_000, "pairs", rows, failed=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["750", "2,250", "3,750"]
    assert lines[0] == (
        "pairs: 750 of 10,000 pairs, 50 pairs/s, 3m05s left, failed 2, "
        "3 workers, in the median read 10 %, encode 70 %, write 5 %, wait 5 %"
    )
    console.close()


def test_events_carry_the_same_figures_and_the_rows_of_the_workers(tmp_path: Path) -> None:
    clock = Clock()
    console = Console("pairs", tmp_path / "events", StopRequest(), clock=clock)
    rows = [worker("a", 10), worker("b", 20)]
    for second in range(0, 61, 10):
        clock.now = 1000.0 + second
        console.progress(500 + 50 * second, 10_000, "pairs", rows, failed=2)
    console.close()
    found = events_of(tmp_path / "events")
    assert len(found) == 2
    assert found[0]["kind"] == "PROGRESS"
    assert (found[0]["done"], found[0]["total"], found[0]["per_second"]) == (1000, 10_000, 50.0)
    assert found[0]["seconds_left"] == 180.0
    assert found[0]["failed"] == 2
    assert found[0]["workers"] == rows
    assert found[0]["shares"] == {"read": 0.1, "encode": 0.8, "write": 0.05, "wait": 0.05}


def test_stages_without_workers_tell_as_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = Console("teacher", tmp_path / "events", StopRequest(), clock=clock)
    console.progress(0, 100, "images", loss=1.0)
    clock.now += 20
    console.progress(10, 100, "images", loss=0.5)
    clock.now += 20
    console.progress(20, 100, "images", loss=0.25)
    assert capsys.readouterr().err == "teacher: 20 of 100 images, 0.5 images/s, 2m40s left, loss 0.25\n"
    assert "workers" not in events_of(tmp_path / "events")[-1]


def test_a_line_without_a_rate_waits_for_one_but_not_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    console = Console("pairs", tmp_path / "events", StopRequest(), clock=clock)
    for second in range(0, 61, 2):
        clock.now = 1000.0 + second
        console.progress(*((0, 100, "pairs") if second < 50 else (20, 100, "pairs", [worker("a", 20)])))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["pairs: 0 of 100 pairs"]  # half a minute late, and no "0 pairs/s"
    for second in range(62, 80, 2):
        clock.now = 1000.0 + second
        console.progress(40, 100, "pairs", [worker("a", 40)])
    assert re.fullmatch(r"pairs: 40 of 100 pairs, 0\.\d+ pairs/s, \S+ left, read.*", capsys.readouterr().err.strip())


def test_what_a_training_compiles_before_its_first_step_is_not_in_its_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    console = Console("teacher", tmp_path / "events", StopRequest(), clock=clock)
    console.progress(6_400, 1_000_000, "images")
    for step in range(12):
        clock.now = 1000.0 + 60 + 0.5 * step
        console.progress(6_432 + 32 * step, 1_000_000, "images")
    told = capsys.readouterr().err.splitlines()
    assert told == ["teacher: 6,752 of 1,000,000 images, 64 images/s, 4h18m left"]
    console.close()


def test_the_rate_is_that_of_the_last_minutes() -> None:
    rate = Rate(10_000, 0.0)  # resumed: these were there
    for second in range(1, 1201):
        rate.add(10_000 + 100 * min(second, 600) + 10 * max(second - 600, 0), float(second))
    assert rate.per_second(76_000, 1200.0) == pytest.approx(10, rel=0.01)
    assert rate.per_second(76_000, 1300.0) < 10


def test_the_rate_of_steps_far_apart_does_not_jump() -> None:
    rate, seen = Rate(0, 0.0), []
    for second in range(1, 4001):  # eight workers at once, a shard of 4,000 pairs in ten minutes each
        done = 32_000 * (second // 600)
        rate.add(done, float(second))
        if second > 1200:
            seen.append(rate.per_second(done, float(second)))
    assert 32_000 / 600 * 0.6 < min(seen) <= max(seen) < 32_000 / 600 * 1.4


def test_a_store_in_the_making_counts_commits_and_adds_up_the_rates_of_its_writers(lab: Lab, root: Path) -> None:
    store = lab.only("pairs").path
    (store / "manifest.g0001.json").unlink()
    for name in ("d000-s00001", "d001-s00003"):
        (store / "commits" / f"{name}.json").unlink()
    failed = store / "failed" / "d000-s00001.txt"
    failed.parent.mkdir(exist_ok=True)
    failed.write_text("boom")
    for path in (store / "events").glob("*.jsonl"):
        path.unlink()
    assert progress.figures(Artifact(store), 2) == "384 of 512 pairs, 6 of 8 shards, 1 failed"
    now = time.time()
    task = {"kind": "PROGRESS", "done": 100, "total": 256, "unit": "pairs", "per_second": 2.0}
    for name, at, last in (("1", now, {}), ("2", now - 20, {}), ("3", now - 500, {}), ("4", now, {"kind": "STOP"})):
        lines = [{**task, "time": at}] + ([{"time": at, **last}] if last else [])
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"time": 1, "ki'  # killed in a line
        (store / "events" / f"{name}.jsonl").write_text(text)
    assert progress.figures(Artifact(store), 2) == "384 of 512 pairs, 6 of 8 shards, 1 failed, 4 pairs/s, 32s left"
    assert progress.figures(Artifact(store), 4).startswith("384 of 1,024 pairs, 6 of 16 shards")


def test_other_stages_in_the_making_show_their_newest_events(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher").path
    event = {"time": time.time(), "kind": "PROGRESS", "done": 50, "total": 200, "unit": "images", "per_second": 5.0}
    newest = teacher / "events" / "29990101T000000-host-1.jsonl"
    newest.write_text(json.dumps({**event, "seconds_left": 30.0}) + "\n")
    assert progress.figures(Artifact(teacher)) == "50 of 200 images, 5 images/s, 30s left"


def test_a_stopped_training_tells_from_where_the_next_run_goes_on(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher").path
    killed = {"time": time.time(), "kind": "PROGRESS", "done": 90, "total": 200, "unit": "images", "per_second": 5.0}
    stopped = [{**killed, "done": 150}, {"time": time.time(), "kind": "STOP"}]
    for name, events in (("2999-1", [killed]), ("2999-2", stopped)):  # the newest is stopped, whatever an older one did
        text = "".join(json.dumps(event) + "\n" for event in events)
        (teacher / "events" / f"{name}.jsonl").write_text(text)
    for path in (teacher / "checkpoints").iterdir():
        path.rename(path.with_name("120"))
    assert progress.figures(Artifact(teacher)) == "150 of 200 images; the next run goes on from 120"
    (teacher / "checkpoints/120").rename(teacher / "checkpoints/160")
    assert progress.figures(Artifact(teacher)) == "160 of 200 images; the next run goes on from there"
