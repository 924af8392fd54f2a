"""Every command once in a process of its own, some as the script that a shell starts, and its exit code."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import commands
from tests.support.sizes import FULL

if TYPE_CHECKING:
    from tests.conftest import Lab

CONFIG = ("-c", "tiny.toml")
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "audit": (("{data}", "--quick"), 0),
    "compare": (("-c", "none.toml"), 2),
    "gc": (("--dry-run",), 0),
    "lineage": (("{teacher}",), 0),
    "ls": ((), 0),
    "one-stage": (("student",), 2),
    "pairs add-field": (("{pairs}", "said", "none.npy"), 2),
    "pairs encode": (("none.json", "--task", "0", "--of", "1"), 2),
    "pairs export": (("{teacher}", "out"), 2),
    "pairs card": (("{pairs}", "-o", "card.md"), 0),
    "pairs head": (("{teacher}",), 2),
    "pairs info": (("{pairs}",), 0),
    "pairs report": (("{teacher}",), 2),
    "pairs seal": (("{teacher}",), 2),
    "pairs verify": (("{pairs}",), 0),
    "pairs worklist": ((*CONFIG,), 2),
    "plan": (("data", *CONFIG), 0),
    "repair": (("{teacher}",), 2),
    "run": (("data", *CONFIG), 0),
    "sample": (("{data}",), 2),
    "status": (CONFIG, 0),
    "student": (("--pairs", "{teacher}", *CONFIG), 2),
    "submit data": ((*CONFIG,), 2),
    "submit features": ((*CONFIG,), 2),
    "submit latents": ((*CONFIG,), 2),
    "submit pairs": ((*CONFIG,), 2),
    "submit student": ((*CONFIG,), 2),
    "submit teacher": ((*CONFIG,), 2),
    "teacher import": (("none.pth", *CONFIG), 2),
    "work": (("none.json", "--task", "0", "--of", "1"), 2),
    "worklist": (("data", *CONFIG), 2),
}
SCRIPTS = ("ls", "run", "compare")  # all of them cost a second of imports each, and take the same way from there


def test_every_command_has_a_case_here() -> None:
    assert sorted(CASES) == sorted(" ".join(path) for path, _ in commands())


@pytest.mark.parametrize("command", CASES)
def test_a_process_ends_with_the_code_of_what_happened(made: Lab, command: str) -> None:
    arguments, code = CASES[command]
    names = {stage: made.name(stage) for stage in ("data", "teacher", "pairs")}
    begin = made.script if FULL or command in SCRIPTS else made.start
    made.wait(begin(*command.split(), *(text.format(**names) for text in arguments)), exits=code)


def test_a_stopped_script_ends_with_130(lab: Lab) -> None:
    process = lab.script(*lab.arguments("teacher", "teacher.images=400000"))
    lab.started.append(process)
    lab.until(lambda: list(lab.artifacts.glob("teacher/*/lock.json")), process)
    process.send_signal(signal.SIGTERM)
    lab.wait(process, exits=130)
