"""What Ray writes to the terminal: a line each on standard error, and nothing of what we say ourselves."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("ray")

DIED = "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem"
FULL = "The node with node id: 0a29 has {} % of its disk used. Object creation will fail. " + "More of it. " * 20


def reported(text: str) -> None:
    """As the thread of Ray that hears of its processes does."""
    from ray._private import worker

    worker.print_to_stdstream({"lines": [text], "pid": "raylet", "is_err": False}, ignore_prefix=False)


def test_what_rays_processes_report_is_a_line_on_standard_error_once(capfd: pytest.CaptureFixture[str]) -> None:
    from ray._private import worker

    from nfm.stages.executors.ray_messages import shortened

    before = worker.print_to_stdstream
    with shortened():
        reported(DIED)  # the executor says which, and what becomes of its shards
        for percent in (96.1, 97.2):
            reported(f"\x1b[33m{FULL.format(percent)}\x1b[0m")
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("Ray: The node with node id: 0a29 has 96.1 % of its disk used; its logs are in /")
    assert told.err.count("\n") == 1
    assert worker.print_to_stdstream is before


def test_rays_own_log_lines_say_who_speaks_and_the_usual_one_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    from nfm.stages.executors.ray_messages import shortened

    logger = logging.getLogger("ray._private.authentication")
    last = logging.lastResort
    assert last is not None

    def tell(name: str, text: str) -> None:  # as logging does where nobody has set it up
        last.handle(logging.LogRecord(name, logging.WARNING, "", 0, text, None, None))

    with shortened():
        tell(logger.name, "Token authentication is enabled for this Ray cluster. Set RAY_AUTH_MODE=disabled")
        tell(logger.name, "Token authentication is disabled for this Ray cluster.")
        tell("torch", "mind this")
    tell("ray", "as before")
    told = capfd.readouterr().err
    assert told == "Ray: Token authentication is disabled for this Ray cluster.\nmind this\nas before\n"
