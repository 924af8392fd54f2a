"""The page about plans shows what its commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.lab import Lab

HOME = Path(__file__).parents[3]
BLOCKS = re.findall(
    r"```\n\$ nfm (plan .*)\n((?:.*\n)+?)```\n", (HOME / "docs/planning.md").read_text(encoding="utf-8")
)
SURE = {command: shown for command, shown in BLOCKS if "--rate" in command}  # others time the machine


def test_the_page_has_plans() -> None:
    assert len(BLOCKS) > len(SURE) >= 3


@pytest.mark.parametrize("command", SURE)
def test_a_plan_with_a_rate_is_as_the_page_shows_it(empty: Lab, command: str) -> None:
    words = [str(HOME / word) if word.startswith("configs/") else word for word in shlex.split(command)]
    assert empty.nfm(*words).stdout == SURE[command]


@pytest.mark.parametrize("command", sorted({command for command, _ in BLOCKS} - set(SURE)))
def test_a_plan_that_is_timed_has_the_rows_that_the_page_shows(empty: Lab, command: str) -> None:
    words = [str(HOME / word) if word.startswith("configs/") else word for word in shlex.split(command)]

    def names(text: str) -> list[str]:
        return [line.split("  ")[0] for line in text.splitlines()]

    assert names(empty.nfm(*words).stdout) == names(dict(BLOCKS)[command])
