"""`--at-once N`: stages of a run that do not wait for each other, each made in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import click

from nfm.pipeline import builder, runner
from nfm.pipeline.config import RunConfig
from nfm.pipeline.console import StopRequest
from nfm.pipeline.graph import Node, upstream
from nfm.stages.base import StageError, Stopped
from nfm.stages.trained.devices import launched
from nfm.storage.errors import WrongUse

POLL_SECONDS = 0.1
WRONG_USE, STOPPED = 2, 130  # exit codes, see pipeline/cli/exits.py


class StagesError(StageError):
    """Stages failed in their own processes, which have said why."""


class Refused(StagesError, WrongUse):  # noqa: N818 - it reads as what it says
    """The same, where it was wrong use."""


def of(config: RunConfig, target: str, at_once: int) -> SideBySide | None:
    """What makes a run's stages side by side; None for one at a time. Raises Refused under a launcher."""
    if at_once == 1:
        return None
    if launched.size() > 1:
        raise Refused(
            f"--at-once {at_once}: a launcher (WORLD_SIZE = {launched.size()}) has all its processes take part in one "
            "training; leave --at-once out, or start nfm without the launcher"
        )
    return SideBySide(config, target, at_once)


class SideBySide:
    """Makes the stages that `target` needs, up to `at_once` at a time."""

    def __init__(self, config: RunConfig, target: str, at_once: int) -> None:
        self._config, self._target, self._at_once = config, target, at_once
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._failed: dict[str, int] = {}

    def finished(self, nodes: Mapping[str, Node], stop: StopRequest) -> Iterator[tuple[Node, bool]]:
        """The nodes of the run, each when its inputs are finished, and whether a process of ours has just made it.

        The others are finished already, or nothing else can run beside them: the caller makes those, with all threads.
        Stages that measure speeds, which say ALONE, are never made beside others.
        If one fails, those that run go on to their end, and nothing new begins.

        Raises:
            StagesError: a stage failed; Refused if that was wrong use.
            Stopped: by the user.
        """
        waiting = {node.name: node for node in upstream(nodes, self._target)}
        try:
            while waiting:
                for name in self._ended(stop):
                    yield waiting.pop(name), True
                if self._failed or stop.ending:
                    self._end(stop)
                ready = [
                    node for node in waiting.values() if not any(of.name in waiting for of in node.inputs.values())
                ]
                ready = [node for node in ready if node.name not in self._running]
                beside = [node for node in ready if not getattr(node.stage, "ALONE", False)]
                alone = not self._running and (len(ready) == 1 or not beside)
                if own := next((node for node in ready if alone or node.made()), None):
                    yield waiting.pop(own.name), False
                    continue
                for node in beside[: self._at_once - len(self._running)]:
                    self._running[node.name] = _start(self._config, self._target, node.name, self._at_once)
                self._wait(stop)
        finally:
            self._stop()

    def _ended(self, stop: StopRequest) -> Iterator[str]:
        for name in [name for name, process in self._running.items() if process.poll() is not None]:
            code = self._running.pop(name).returncode
            if code == 0:
                yield name
                continue
            self._failed[name] = code
            if self._running and not stop.ending:
                beside = " and ".join(self._running)
                click.echo(f"{name}: failed; {beside} goes on to its end, nothing new begins", err=True)

    def _wait(self, stop: StopRequest) -> None:
        told = stop.ending
        while self._running and stop.ending == told:
            if any(process.poll() is not None for process in self._running.values()):
                return
            time.sleep(POLL_SECONDS)

    def _end(self, stop: StopRequest) -> None:
        """Waits for the processes that run, which a stop ends, and raises what the run comes to."""
        told: set[int] = set()
        while self._running:
            for asked, number in ((stop.asked, signal.SIGTERM), (stop.asked_to_end, signal.SIGUSR1)):
                if asked and number not in told:
                    told.add(number)
                    for process in self._running.values():
                        process.send_signal(number)
            for _ in self._ended(stop):
                pass
            time.sleep(POLL_SECONDS)
        stopped = (STOPPED, -signal.SIGTERM) if stop.ending else ()
        failed = {name: code for name, code in self._failed.items() if code not in stopped}
        if not failed:
            raise Stopped
        kind = Refused if all(code == WRONG_USE for code in failed.values()) else StagesError
        raise kind(f"{' and '.join(failed)} failed, see the lines above; the same command goes on from here")

    def _stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            process.wait()


def _start(config: RunConfig, target: str, name: str, at_once: int) -> subprocess.Popen[bytes]:
    """A process that makes one stage, with its share of the cores and plain lines in place of a live table.

    It is a group of its own: Ctrl-C reaches this process alone, which passes it on once. Its standard input stays open
    as long as this process lives, so that it cannot outlive a killed one.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // at_once)
    environment = {"OMP_NUM_THREADS": str(cores)} | os.environ | {"TERM": "dumb"}
    command = [sys.executable, "-P", "-m", "nfm.pipeline.cli", "one-stage", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, env=environment, process_group=0)
    assert process.stdin is not None
    told = {"path": sys.path, "config": handed_over(config), "target": target, "name": name}
    with contextlib.suppress(BrokenPipeError):  # it has ended, and its exit code is looked at
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
    return process


def handed_over(config: RunConfig) -> dict[str, Any]:
    """A config as JSON that `RunConfig.model_validate` reads: what was given, since what was left out has a meaning."""
    return config.model_dump(mode="json", exclude_unset=True)


def make(told: IO[bytes]) -> None:
    """Makes the one stage that a process was begun for: what it is arrives on its standard input."""
    line = told.readline()
    if not line:
        raise Refused("one-stage: nothing to make was handed over; nfm starts it itself for --at-once")
    stop = StopRequest()
    with stop.listening():
        threading.Thread(target=_outlive, args=(told,), name="outlive", daemon=True).start()
        handed = json.loads(line)
        sys.path[:] = handed["path"]
        nodes = builder.build(RunConfig.model_validate(handed["config"]), target=handed["target"])
        if stop.asked:  # meanwhile, also by the end of the process that began this one
            raise Stopped
        runner.bring(nodes[handed["name"]], stop)


def _outlive(told: IO[bytes]) -> None:
    """Asks this process to stop when the one that began it is gone."""
    os.read(told.fileno(), 1)  # nothing more is written there: returns at its end
    os.kill(os.getpid(), signal.SIGTERM)
