"""What exists and what would run, as rows."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline import overview
from nfm.pipeline.artifacts.artifact import ArtifactError
from nfm.pipeline.builder import build
from nfm.pipeline.config import load
from nfm.stages.trained import costs

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_costs_grow_with_what_they_count(lab: Lab, root: Path) -> None:
    lab.drop("teacher", "pairs", "student", "evaluate", "report")

    def cost(stage: str, *overrides: str) -> dict[str, str]:
        rows = {row["stage"]: row for row in overview.plan(build(load(lab.config, overrides)), "student")}
        assert "here" in rows["teacher"]["cost"]
        return {part.split(" ", 1)[1]: part.split(" ", 1)[0] for part in rows[stage]["cost"].split(", ")}

    assert cost("pairs")["pairs"] == "512"
    small, large = cost("teacher")["FLOPs"], cost("teacher", "teacher.images=30000")["FLOPs"]
    assert float(large) == pytest.approx(10 * float(small), rel=0.1)
    assert float(cost("student", "student.depth=4")["FLOPs"]) > float(cost("student")["FLOPs"])


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_planned_bytes_and_shards_are_those_of_the_store_that_is_made(lab: Lab, layout: str) -> None:
    sets = ("pairs.coupling=independent", "evaluate.baselines=[]", f"pairs.layout={layout}", "pairs.codec=float32")
    arguments = [part for override in sets for part in ("--set", override)]
    (row,) = [
        row
        for row in json.loads(lab.nfm("plan", "pairs", "-c", "tiny.toml", *arguments, "--workers=2", "--json").stdout)
        if row["stage"] == "pairs"
    ]
    lab.drop("pairs")
    lab.run("pairs", *sets)
    store = lab.all("pairs")[0]
    metrics = store.manifest()["metrics"]
    files = [path for path in store.path.rglob("*") if path.is_file() and path.parent.name != "events"]
    on_disk = sum(path.stat().st_size for path in files if not path.name.startswith(("spec", "manifest", "lock")))
    assert (row["plan"]["pairs"], row["plan"]["shards"]) == (metrics["pairs"], metrics["shards"])
    assert row["plan"]["bytes"]["float32"] == pytest.approx(on_disk, rel=0.05)
    assert row["plan"]["bytes"]["float32"] > metrics["bytes"]
    assert "hours" not in row["plan"], "no teacher runs"


def test_pairs_are_planned_before_there_is_any_data(empty: Lab) -> None:
    common = ("plan", "pairs", "-c", "tiny.toml", "--images", 10**8, "--image-shape", "1x8x8", "--classes", 10,
              "--set", "pairs.rows_per_shard=2000")  # fmt: skip
    (row,) = json.loads(empty.nfm(*common, "--rate", 1000, "--workers", 1, "--workers", 10, "--json").stdout)
    plan = row["plan"]
    assert plan["pairs"] == 2 * 10**8
    assert plan["shards"] == 2 * -(-(10**8) // 2000)
    assert plan["bytes"]["float32"] > plan["bytes"]["float16"] > plan["bytes"]["int8"] > 2 * 10**8 * 2 * 64
    assert plan["hours"]["1"] == pytest.approx(2 * 10**8 / 1000 / 3600, rel=0.01)
    assert plan["hours"]["10"] == pytest.approx(plan["hours"]["1"] / 10, rel=0.01)
    measured = empty.nfm(*common).stdout
    assert "measured here, 1 of" in measured
    assert not empty.artifacts.exists()


def test_a_plan_of_pairs_without_data_says_what_to_give(empty: Lab) -> None:
    assert "give --images N --image-shape CxHxW" in empty.nfm("plan", "pairs", "-c", "tiny.toml").stdout
    wrong = ("plan", "pairs", "-c", "tiny.toml", "--images", 100)
    assert "--image-shape together" in empty.nfm(*wrong, exits=2).stderr
    assert "3x64x64" in empty.nfm(*wrong, "--image-shape", "3,64,64", exits=2).stderr
    refused = empty.nfm(*wrong, "--image-shape", "3x9x9", "--rate", 1, exits=2).stderr
    assert "patch = 2 does not divide the image 9 x 9" in refused


def test_the_age_and_size_of_an_artifact_are_those_of_its_files(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher").path
    past = time.time() - 3 * 86400
    os.utime(teacher / "spec.json", (past, past))
    (teacher / "big").write_bytes(bytes(3_000_000))
    row = next(row for row in overview.inventory() if row["artifact"] == lab.name("teacher"))
    assert row["age"] == "3 d"
    assert row["size"].endswith(" MB")
    assert 3 <= float(row["size"].split()[0]) <= 5


def test_columns_stand_under_their_names() -> None:
    text = overview.as_text([{"a": "x", "long name": 1}, {"a": "longer", "long name": 22}])
    assert text.splitlines() == ["a       long name", "x       1", "longer  22"]


def test_only_a_store_has_a_recipe_to_show(lab: Lab, root: Path) -> None:
    info = overview.store_info(lab.only("pairs"))
    assert info["store"] == lab.name("pairs")
    assert info["order key"] == overview.store_info(lab.only("pairs", "independent"))["order key"]
    with pytest.raises(ArtifactError, match="is no pair store"):
        overview.store_info(lab.only("teacher"))


def test_what_is_committed_is_not_planned_again(lab: Lab) -> None:
    whole, rest = (
        json.loads(lab.nfm("plan", "pairs", "-c", "tiny.toml", "--set", sets, "--rate", 100, "--json").stdout)[-1][
            "plan"
        ]
        for sets in ("pairs.seed=9", "pairs.draws=3")
    )
    assert (whole["committed"], rest["committed"]) == (0, 512)
    assert rest["pairs"] == 768
    assert rest["flops"] == pytest.approx(256 * rest["flops_per_image"])
    assert rest["hours"]["1"] == pytest.approx(256 / 100 / 3600, rel=0.01)
    assert whole["flops"] == pytest.approx(512 * whole["flops_per_image"])


def test_a_plan_without_torch_tells_the_rest_and_what_is_not_installed(
    lab: Lab, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.drop("teacher", "pairs", "student", "evaluate", "report")
    monkeypatch.setitem(sys.modules, "torch", None)  # as in the base install
    costs.matrix_rate.cache_clear()
    told = lab.nfm("plan", "student", "-c", "tiny.toml").stdout.splitlines()
    row = {line.split()[0]: line for line in told}
    assert "nothing, is done" in row["data"]
    for stage in ("teacher", "student"):
        assert row[stage].endswith("told with torch, which is not installed here")


def test_a_command_that_needs_what_is_not_installed_says_how_to_install_it(
    empty: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    common = ("plan", "pairs", "-c", "tiny.toml", "--images", 1000, "--image-shape", "1x8x8")
    assert empty.nfm(*common, exits=1).stderr == (
        "nfm: torch is not installed here: pip install 'nfm-pairs[train]' brings it\n"
    )
    assert "as given by --rate" in empty.nfm(*common, "--rate", 1000).stdout
