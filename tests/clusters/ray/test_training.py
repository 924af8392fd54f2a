"""Trainings on Ray workers: what dies begins again by itself, and the weights are those of an undisturbed training."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.clusters.ray.conftest import Nodes
    from tests.conftest import Lab

pytestmark = pytest.mark.faults

SETS = ("student.seed=5", "student.pairs=40000", "student.save_every=1280", "student.log_every=1280")
TWO = (*SETS, "student.workers=2")


def student_of(lab: Lab) -> Path:
    """The student with many pairs, beside the one that the tiny run made."""
    return next(path.parent for path in lab.artifacts.glob("student/*/spec.json") if "40000" in path.read_text())


def checkpoint_of(lab: Lab) -> int:
    try:
        return max((int(path.name) for path in (student_of(lab) / "checkpoints").glob("0*")), default=0)
    except StopIteration:
        return 0


def weights_of(lab: Lab) -> bytes:
    return (student_of(lab) / "weights.safetensors").read_bytes()


def workers_below(pid: int) -> list[int]:
    """The processes of trainings that a process started, through whatever stands between."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.read_text().rpartition(")")[::2]
            parents[int(path.parent.name)] = (int(fields.split()[1]), name.partition("(")[2])
        except OSError:
            continue

    def below(child: int) -> bool:
        while child in parents:
            if child == pid:
                return True
            child = parents[child][0]
        return False

    return [child for child, (_, name) in parents.items() if name.startswith("ray::RayTrainW") and below(child)]


@pytest.fixture(scope="module")
def undisturbed(made: Lab, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that two workers of a local cluster come to."""
    import shutil

    lab = type(made)(tmp_path_factory.mktemp("undisturbed") / "lab")
    shutil.copytree(made.folder, lab.folder)
    lab.run("student", *TWO)
    return weights_of(lab)


def test_a_killed_worker_is_replaced_and_training_ends_with_the_same_bits(
    lab: Lab, undisturbed: bytes, start_nodes: Callable[..., Nodes]
) -> None:
    nodes = start_nodes(2)
    driver = lab.start(*lab.arguments("student", *TWO), **nodes.environment)
    for least in (2000, 12_000):
        lab.until(lambda least=least: checkpoint_of(lab) >= least, driver)
        os.kill(workers_below(nodes.process.pid)[-1], signal.SIGKILL)
    done = lab.wait(driver)
    assert done.stderr.count("a worker died; training begins again from") == 2
    assert weights_of(lab) == undisturbed
    assert not (student_of(lab) / "ray-train").exists()
    assert "clean" in lab.nfm("audit", student_of(lab)).stdout


def test_a_lost_node_is_replaced_by_one_that_is_left_and_training_ends_with_the_same_bits(
    lab: Lab, undisturbed: bytes, start_nodes: Callable[..., Nodes]
) -> None:
    nodes = start_nodes(0)
    nodes.add("a")
    nodes.add("b")
    driver = lab.start(*lab.arguments("student", *TWO), **nodes.environment)
    lab.until(lambda: checkpoint_of(lab) >= 2000, driver)
    nodes.add("c")
    nodes.remove("a")
    done = lab.wait(driver)
    assert "a worker died; training begins again from" in done.stderr
    assert weights_of(lab) == undisturbed


def test_a_stop_saves_and_the_same_command_goes_on_with_another_number_of_workers(
    lab: Lab, start_nodes: Callable[..., Nodes]
) -> None:
    nodes = start_nodes(2)
    driver = lab.start(*lab.arguments("student", *TWO), **nodes.environment)
    lab.until(lambda: checkpoint_of(lab) >= 2000, driver)
    driver.send_signal(signal.SIGTERM)
    assert "stopped; the same command goes on from here" in lab.wait(driver, exits=130).stderr
    kept = checkpoint_of(lab)
    assert 2000 <= kept < 40_000
    done = lab.run("student", *SETS)  # alone
    assert f"continuing from {kept:,} of" in done.stderr


def test_a_driver_that_is_killed_takes_its_workers_with_it_and_the_same_command_goes_on(
    lab: Lab, undisturbed: bytes, start_nodes: Callable[..., Nodes]
) -> None:
    nodes = start_nodes(2)
    driver = lab.start(*lab.arguments("student", *TWO), **nodes.environment)
    lab.until(lambda: checkpoint_of(lab) >= 2000, driver)
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 120
    while workers_below(nodes.process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    lab.wait(lab.start(*lab.arguments("student", *TWO), **nodes.environment))
    assert weights_of(lab) == undisturbed


def test_what_dies_again_and_again_is_given_up_with_the_reason(lab: Lab, start_nodes: Callable[..., Nodes]) -> None:
    nodes = start_nodes(2)
    driver = lab.start(*lab.arguments("student", *TWO, "student.save_every=40000"), **nodes.environment)
    assert driver.stderr
    seen = 0
    while driver.poll() is None:
        lines = sum(path.read_bytes().count(b"\n") for path in lab.artifacts.glob("student/*/metrics.jsonl"))
        if lines != seen:  # it trains: a death before that is one of a start
            for pid in workers_below(nodes.process.pid)[:1]:
                os.kill(pid, signal.SIGKILL)
        seen = lines
        time.sleep(0.5)
    stderr = driver.stderr.read()
    assert driver.returncode == 1
    assert "Traceback" not in stderr
    assert "5 times in a row" in stderr
