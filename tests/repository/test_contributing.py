"""The examples of CONTRIBUTING.md work exactly as written: a toy coupling, executor, source, architecture
and layout.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfm.stages.couplings.facts import FACTS
from nfm.stages.data.sources import SOURCES
from nfm.stages.executors import EXECUTORS
from nfm.stages.trained.architectures import ARCHITECTURES
from nfm.storage.layouts import LAYOUTS
from tests.conftest import Lab

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {name: code for code, name in re.findall(r"```python\n(# (\S+)\n.*?)```", TEXT, re.S)}
TABLES = {"couplings": FACTS, "executors": EXECUTORS, "sources": SOURCES, "architectures": ARCHITECTURES,
          "layouts": LAYOUTS}  # fmt: skip
SETS = ("data.source=stripes", "data.points=160", "data.limit=160", "features.images=200", "student.arch=linear",
        "student.pairs=256", "pairs.executor=backwards", "pairs.layout=tiny", "pairs.draws=1", "evaluate.samples=32",
        "evaluate.kid_size=16", "evaluate.nfe=[3]", "evaluate.speed_batches=[4]",
        "evaluate.curvature_trajectories=2")  # fmt: skip


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of the examples are on Python's path, and their lines stand in the tables."""
    before = {name: dict(table) for name, table in TABLES.items()}
    files = [name for name in BLOCKS if name.endswith(".py")]
    for name in files:
        (tmp_path / name).write_text(BLOCKS[name], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for name in TABLES:
            exec(BLOCKS[name], {})
        yield
    finally:
        for name, table in TABLES.items():
            table.clear()
            table.update(before[name])
        for name in files:
            sys.modules.pop(name.removesuffix(".py"), None)


def test_an_example_is_at_most_twenty_lines_of_a_file_and_one_line_of_a_table() -> None:
    assert BLOCKS.keys() >= TABLES.keys()
    for name, code in BLOCKS.items():
        assert sum(bool(line.strip()) for line in code.splitlines()[1:]) <= 20, name
        assert name not in TABLES or code.strip().splitlines()[-1].count("] = ") == 1


@pytest.mark.seconds(60)
def test_what_the_examples_add_goes_from_data_to_the_comparison(followed: None, empty: Lab) -> None:
    sets = [part for one in SETS for part in ("--set", one)]
    done = empty.nfm("compare", "-c", "tiny.toml", "--couplings", "mirrored,independent", *sets, "-o", "results")
    assert "mirrored" in done.stdout + done.stderr
    body = json.loads((empty.folder / "results" / "compare.json").read_text())
    assert {row["variant"] for row in body["rows"]} == {"mirrored", "independent"}
    for name in ("distance.png", "loss.png", "curvature.png", "speed.png"):
        assert (empty.folder / "results" / name).stat().st_size > 1000
    spec = empty.only("pairs", "mirrored").spec["store"]
    assert (spec["coupling"], spec["layout"]) == ("mirrored", "tiny")
    assert empty.only("student", "mirrored").manifest()["config"]["arch"] == "linear"
    empty.nfm("audit", empty.name("pairs", "mirrored"), "--deep")


def test_a_name_that_no_table_has_is_refused_with_those_that_there_are(empty: Lab) -> None:
    for setting in ("data.source", "pairs.coupling", "pairs.executor", "pairs.layout", "student.arch"):
        told = empty.run("pairs", f"{setting}=mirrored", exits=2).stderr
        assert setting in told
        assert "mirrored" in told
