"""`--at-once N`: students of several couplings at a time end as one after the other does, also when one fails."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.stages.trained.training.checkpoints import CHECKPOINTS

if TYPE_CHECKING:
    from tests.conftest import Lab

TWO = ("--at-once", 2)


def processes_of(lab: Lab) -> dict[str, int]:
    """The processes that make one stage in this lab, by the stage's name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            here = (path / "cwd").readlink() == lab.folder.resolve()
        except OSError:
            continue
        if here and "one-stage" in words:
            found[words[words.index("one-stage") + 1]] = int(path.name)
    return found


@pytest.mark.seconds(40)
def test_students_side_by_side_are_those_of_one_after_the_other_also_when_one_fails_at_first(lab: Lab) -> None:
    before = {lab.only("student", name).manifest()["content_digest"] for name in ("nfm", "independent")}
    lab.drop("student")
    shards = {path: path.read_bytes() for path in (lab.only("pairs", "independent").path / "shards").iterdir()}
    for path in shards:
        path.write_bytes(b"")
    process = lab.start(*lab.arguments("report"), *TWO)
    lab.until(lambda: len(processes_of(lab)) == 2, process)
    beside, fails = (processes_of(lab)[name] for name in ("student", "student:independent"))
    os.kill(beside, signal.SIGSTOP)  # so that it is not at its end before the other has failed
    lab.until(lambda: not Path(f"/proc/{fails}").exists(), process)
    os.kill(beside, signal.SIGCONT)
    failed = lab.wait(process, exits=1).stderr
    assert "student:independent: failed; student goes on to its end, nothing new begins" in failed
    assert "nfm: student:independent failed, see the lines above; the same command goes on from here" in failed
    assert "student: done" in failed
    assert "student: making" in failed[: failed.index("student: done")]
    assert not processes_of(lab)

    for path, held in shards.items():
        path.write_bytes(held)
    done = lab.wait(lab.start(*lab.arguments("report"), *TWO))
    assert "student: student/" in done.stderr, "what is finished is not made again"
    assert {lab.only("student", name).manifest()["content_digest"] for name in ("nfm", "independent")} == before
    assert done.stdout.strip() == str(lab.only("report").path / "report.html"), "nothing else is on standard output"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_of_them_and_the_same_command_goes_on(lab: Lab, number: signal.Signals) -> None:
    lab.drop("student")
    more = ("student.pairs=60_000", "student.log_every=500")
    process = lab.start(*lab.arguments("report", *more), *TWO)
    told = "student/*/metrics.jsonl"  # empty before the first step, from which nothing is to be gone on with
    lab.until(lambda: len([path for path in lab.artifacts.glob(told) if path.stat().st_size]) == 2, process)
    process.send_signal(number)
    said = lab.wait(process, exits=130).stderr
    assert said.count("stopped; the same command goes on from here") == 2
    assert not processes_of(lab)
    resumed = lab.wait(lab.start(*lab.arguments("report", *more), *TWO)).stderr
    assert resumed.count("continuing from") == 2, said + resumed


@pytest.mark.long
def test_they_do_not_outlive_a_killed_command(lab: Lab) -> None:
    lab.drop("student")
    process = lab.start(*lab.arguments("report", "student.pairs=600_000"), *TWO)
    lab.until(lambda: len(list(lab.artifacts.glob("student/*/metrics.jsonl"))) == 2, process)
    assert set(processes_of(lab)) == {"student", "student:independent"}
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # the end of what the processes print
    assert not processes_of(lab)


@pytest.mark.long
@pytest.mark.seconds(60)
def test_a_comparison_killed_in_the_middle_of_two_students_goes_on_to_the_table_of_an_undisturbed_one(
    lab: Lab,
) -> None:
    sets = ("student.pairs=5_000", "student.save_every=500", "student.log_every=500", "evaluate.nfe=[5]")
    words = ("compare", "-c", "tiny.toml", "--couplings", "nfm,independent", *TWO)
    words += tuple(word for one in sets for word in ("--set", one))
    lab.drop("student", "evaluate")
    lab.wait(lab.start(*words))
    undisturbed = lab.only("compare").manifest()["content_digest"]
    students = sorted(one.manifest()["content_digest"] for one in lab.all("student"))
    lab.drop("student", "evaluate", "compare")
    before = lab.committed()

    process = lab.start(*words)
    kept = f"student/*/{CHECKPOINTS}/[0-9]*"
    lab.until(lambda: len({path.parts[-3] for path in lab.artifacts.glob(kept)}) == 2, process)
    beside = processes_of(lab)
    assert len(beside) == 2, "both are in the middle"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # the end of what the processes print
    assert not processes_of(lab), "they end with it"
    assert not any(one.done for one in lab.all("student"))

    resumed = lab.wait(lab.start(*words)).stderr
    assert resumed.count("continuing from") == 2, resumed
    assert lab.only("compare").manifest()["content_digest"] == undisturbed
    assert sorted(one.manifest()["content_digest"] for one in lab.all("student")) == students
    assert before.items() <= lab.committed().items(), "what was there before is as it was"
    lab.nfm("audit", lab.name("compare"))  # and all that it was made from
