"""What would run and what it costs: of every stage and coupling, before there is data too, by every option."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nfm.stages.trained import student
from nfm.stages.trained.student import StudentConfig

if TYPE_CHECKING:
    from tests.conftest import Lab

# As the data of the tiny run are.
DATA = ("--images", 256, "--image-shape", "1x8x8", "--classes", 10)


def rows(lab: Lab, stage: str, *arguments: object) -> dict[str, dict[str, Any]]:
    """The rows of a plan by their stages."""
    found = json.loads(lab.nfm("plan", stage, "-c", "tiny.toml", *arguments, "--json").stdout)
    return {row["stage"]: row for row in found}


def without_times(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        stage: {name: value for name, value in row["figures"].items() if name != "seconds"}
        for stage, row in found.items()
    }


def test_costs_grow_with_what_they_count(empty: Lab) -> None:
    def figures(stage: str, *sets: str) -> dict[str, Any]:
        overrides = [word for override in sets for word in ("--set", override)]
        return dict(rows(empty, "student", *DATA, *overrides)[stage]["figures"])

    assert figures("pairs")["pairs"] == 512
    small, large = figures("teacher"), figures("teacher", "teacher.images=30000")
    assert [small["images"], large["images"]] == [3_008, 30_016], "whole batches are trained"
    assert large["flops"] / small["flops"] == pytest.approx(30_016 / 3_008)
    assert large["seconds"] > small["seconds"]
    assert figures("student", "student.depth=4")["flops"] > figures("student")["flops"]


@pytest.mark.parametrize("stage", ["features", "teacher", "potential", "pairs", "student", "report"])
def test_a_stage_is_planned_before_there_is_data_as_when_it_is_there(lab: Lab, stage: str) -> None:
    lab.drop("features", "teacher", "pairs", "student", "evaluate", "report")
    there = rows(lab, stage)
    assert there.pop("data")["would"] == "nothing, is done"
    before = rows(lab, stage, *DATA, "--set", "data.limit=1", "--set", "evaluate.samples=64")  # which nobody looks at
    assert without_times(before) == without_times(there)
    timed = {row for row in before if row.partition(":")[0] in ("features", "teacher", "student", "potential")}
    assert timed
    assert all(before[name]["figures"]["seconds"] > 0 for name in timed)


def test_what_a_finished_model_takes_on_disk_is_what_was_planned(lab: Lab) -> None:
    planned = rows(lab, "evaluate", *DATA)
    for stage in ("features", "teacher", "student"):
        folder = lab.all(stage)[0].path
        kept = [folder / "weights.safetensors", *(folder / "checkpoints").rglob("*")]
        on_disk = sum(path.stat().st_size for path in kept if path.is_file())
        assert planned[stage]["figures"]["bytes"] == pytest.approx(on_disk, rel=0.3), stage


WRONG = {
    **{
        f"{stage}, rate": (stage, ("--rate", 5), f"{stage} has no rate")
        for stage in ("potential", "evaluate", "report", "compare")
    },
    **{
        f"{stage}, workers": (stage, ("--workers", 5), f"of what trains, not of {stage}")
        for stage in ("data", "potential", "evaluate", "report", "compare")
    },
    **{
        f"{stage}, memory": (stage, ("--memory", 5), f"not of {stage}")
        for stage in ("data", "pairs", "potential", "evaluate", "report", "compare")
    },
    "workers of a training, twice": ("teacher", ("--workers", 2, "--workers", 4), "give it once"),
    "workers that do not divide": ("student", (*DATA, "--workers", 3), "batch_size 64 is shared by 3 processes"),
    "memory of nothing": ("teacher", (*DATA, "--memory", 0), "--memory"),
    **{f"rate {rate}": ("teacher", ("--rate", rate), "--rate") for rate in ("nan", "inf", "0", "-1", "1e300", "x")},
    "rate of nothing": ("student", ("--rate", 5), "nothing can be counted yet; run the data stage, or give --images"),
    "workers of nothing": ("pairs", ("--workers", 5), "nothing can be counted yet"),
    "half": ("teacher", DATA[:2], "--image-shape together"),
    "other half": ("report", DATA[2:4], "--image-shape together"),
    "classes alone": ("pairs", DATA[4:], "--image-shape together"),
    "shape": ("student", ("--images", 9, "--image-shape", "3,64,64"), "3x64x64"),
    "patch": ("pairs", ("--images", 100, "--image-shape", "3x9x9"), "patch = 2 does not divide the image 9 x 9"),
    "batch": ("teacher", ("--images", 9, "--image-shape", "1x8x8"), "batch_size 64 exceeds the 9 records"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_option_that_would_say_nothing_is_refused(empty: Lab, wrong: str) -> None:
    stage, options, said = WRONG[wrong]
    config = ("--set", 'compare.couplings=["independent"]')
    assert said in empty.nfm("plan", stage, "-c", "tiny.toml", *config, *options, exits=2).stderr


@pytest.mark.parametrize("stage", ["features", "teacher", "pairs", "student"])
def test_a_rate_that_is_given_is_used_and_nothing_is_timed(empty: Lab, stage: str) -> None:
    done = empty.nfm("plan", stage, "-c", "tiny.toml", *DATA, "--rate", 50, "--json")
    *others, row = json.loads(done.stdout)
    unit = "pairs" if stage in ("pairs", "student") else "images"
    assert row["stage"] == stage
    assert row["figures"]["seconds"] == pytest.approx(row["figures"][unit] / 50)
    assert "at --rate" in row["cost"]
    assert "timing" not in done.stderr
    assert not any("seconds" in other["figures"] for other in others)


def test_the_data_stage_is_planned_from_its_source_and_for_images_that_are_not_there(empty: Lab) -> None:
    there = rows(empty, "data")["data"]
    assert there["figures"]["images"] == 320
    more = ("--images", 1_281_167, "--image-shape", "3x256x256")
    paper = rows(empty, "data", *more, "--rate", 200)["data"]["figures"]
    assert paper == {"images": 1_281_167, "seconds": 1_281_167 / 200, "bytes": 1_281_167 * 3 * 256 * 256}
    assert "no time (nothing is decoded for images" in rows(empty, "data", *more)["data"]["cost"]
    assert not empty.artifacts.exists()


def test_workers_of_a_training_divide_its_time(empty: Lab) -> None:
    four = ("--set", "student.workers=4")
    figures = rows(empty, "student", *DATA, *four, "--rate", 50)["student"]
    assert figures["figures"]["seconds"] == 2048 / 50 / 4
    assert "by 4 workers, without what they tell each other" in figures["cost"]
    assert rows(empty, "student", *DATA, *four)["student"]["figures"]["seconds"] > 0


def test_a_rate_is_used_for_a_stage_that_is_done(made: Lab) -> None:
    assert rows(made, "teacher", "--rate", 3008)["teacher"]["figures"]["seconds"] == 1


def test_what_is_timed_is_told_once_each_beside_the_plan(empty: Lab) -> None:
    told = empty.nfm("plan", "report", "-c", "tiny.toml", *DATA, "--json").stderr.splitlines()
    assert all(line.startswith("timing ") and line.endswith(" in float32, 1 s at most ...") for line in told)
    assert len(told) == len(set(told)) == 5  # features, teacher, encoding, one student for both, its velocity


def test_a_device_that_is_elsewhere_has_no_time_and_all_else(empty: Lab) -> None:
    elsewhere = [word for name in ("teacher", "pairs", "student") for word in ("--set", f'{name}.device="cuda:7"')]
    for name, row in rows(empty, "student", *DATA, *elsewhere).items():
        assert "seconds" not in row["figures"], name
        assert row["figures"]["flops"] > 0
        assert "no time (device = 'cuda:7'" in row["cost"]


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_planned_bytes_and_shards_are_those_of_the_store_that_is_made(lab: Lab, layout: str) -> None:
    sets = ("pairs.coupling=independent", "evaluate.baselines=[]", f"pairs.layout={layout}", "pairs.codec=float32")
    arguments = [part for override in sets for part in ("--set", override)]
    row = rows(lab, "pairs", *arguments)["pairs"]
    lab.drop("pairs")
    lab.run("pairs", *sets)
    store = lab.all("pairs")[0]
    metrics = store.manifest()["metrics"]
    files = [path for path in store.path.rglob("*") if path.is_file() and path.parent.name != "events"]
    on_disk = sum(path.stat().st_size for path in files if not path.name.startswith(("spec", "manifest", "lock")))
    assert (row["plan"]["pairs"], row["plan"]["shards"]) == (metrics["pairs"], metrics["shards"])
    assert row["plan"]["bytes"]["float32"] == pytest.approx(on_disk, rel=0.05)
    assert row["plan"]["bytes"]["float32"] > metrics["bytes"]


def test_pairs_are_planned_before_there_is_any_data(empty: Lab) -> None:
    common = ("--images", 10**8, "--image-shape", "1x8x8", "--classes", 10, "--set", "pairs.rows_per_shard=2000")
    row = rows(empty, "pairs", *common, "--rate", 1000, "--workers", 1, "--workers", 10)["pairs"]
    plan = row["plan"]
    assert plan["pairs"] == 2 * 10**8
    assert plan["shards"] == 2 * -(-(10**8) // 2000)
    assert plan["bytes"]["float32"] > plan["bytes"]["float16"] > plan["bytes"]["int8"] > 2 * 10**8 * 2 * 64
    assert plan["hours"]["1"] == pytest.approx(2 * 10**8 / 1000 / 3600, rel=0.01)
    assert plan["hours"]["10"] == pytest.approx(plan["hours"]["1"] / 10, rel=0.01)
    measured = empty.nfm("plan", "pairs", "-c", "tiny.toml", *common).stdout
    assert "measured here, 1 of" in measured
    assert not empty.artifacts.exists()


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


COUPLINGS = ("independent", "minibatch-ot", "semidiscrete-ot", "custom")


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_coupling_that_is_not_timed_says_what_decides_and_takes_a_rate(empty: Lab, coupling: str) -> None:
    (empty.folder / "mine.py").write_text("def pair(images, labels, rng): return images\n", encoding="utf-8")
    custom = ("--set", 'pairs.custom="mine:pair"') if coupling == "custom" else ()
    sets = ("--set", f"pairs.coupling={coupling}", *custom)
    common = ("plan", "pairs", "-c", "tiny.toml", *DATA, *sets)
    told = empty.nfm(*common).stdout
    assert f"not known: pairs of {coupling} are not timed: " in told
    assert "decide" in told
    refused = empty.nfm(*common, "--workers", 4, exits=2).stderr
    assert f"--workers: pairs of {coupling} are not timed" in refused
    assert "give --rate" in refused
    plan = rows(empty, "pairs", *DATA, *sets, "--workers", 4, "--rate", 16)["pairs"]["plan"]
    assert plan["hours"] == {"4": pytest.approx(512 / 16 / 4 / 3600, rel=0.01)}


def test_reflow_is_planned_by_the_evaluations_of_its_student(empty: Lab) -> None:
    sets = ("--set", "pairs.coupling=reflow", "--set", "pairs.reflow_nfe=7", "--set", "student.width=64")
    plan = rows(empty, "pairs", *DATA, *sets)["pairs"]["plan"]
    of_student = StudentConfig(patch=2, width=64, depth=2, head_size=32)
    assert plan["flops_per_image"] == 7 * student.flops(of_student, (1, 8, 8))
    assert plan["flops"] == 512 * plan["flops_per_image"]
    longer = rows(empty, "pairs", *DATA, *sets, "--set", "pairs.reflow_nfe=3001")["pairs"]["plan"]
    assert longer["worker"]["images_per_second"] < plan["worker"]["images_per_second"] / 20
    assert longer["hours"]["1"] > 20 * plan["hours"]["1"] > 0


def test_reflow_of_a_student_that_is_named_is_planned_by_that_one(lab: Lab) -> None:
    sets = ("--set", "pairs.coupling=reflow", "--set", f"pairs.student={lab.all('student')[0].path}")
    found = rows(lab, "pairs", *sets, "--set", "student.width=256", "--set", "student.depth=9")
    assert list(found) == ["data", "pairs"]
    of_student = StudentConfig(patch=2, width=32, depth=2, head_size=32)
    assert found["pairs"]["plan"]["flops_per_image"] == 31 * student.flops(of_student, (1, 8, 8))


def test_a_comparison_is_planned_as_sums_by_kind_of_stage(empty: Lab) -> None:
    options = (*DATA, "--couplings", "independent,nfm,nfm:soften=0.5", "--seeds", "0,1")
    found = rows(empty, "compare", *options)
    students = [row["figures"] for name, row in found.items() if name.startswith("student")]
    assert len(students) == 6
    text = empty.nfm("plan", "compare", "-c", "tiny.toml", *options).stdout
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert list(lines)[:7] == ["stage", "features", "teacher", "pairs", "student", "evaluate", "compare"]
    assert lines["student"][1:5] == ["6", "6", "12,288", "pairs"]
    assert lines["pairs"][1:5] == ["2", "2", "1,024", "pairs"]
    total = sum(row["figures"].get("flops", 0) for row in found.values())
    assert lines["all"][1:4] == [str(len(found)), str(len(found)), f"{total:.2g}"]
    assert "at least" in " ".join(lines["all"]), "the pairs of independent are in no sum"
    assert "pairs: no time (pairs of independent are not timed" in text
    assert len(text.splitlines()) < 16


def test_what_is_made_is_in_no_sum_of_a_comparison(made: Lab) -> None:
    text = made.nfm("plan", "compare", "-c", "tiny.toml", "--couplings", "independent,nfm", "--seeds", "0,1").stdout
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["pairs"] == ["pairs", "2", "0"]
    assert lines["teacher"] == ["teacher", "1", "0"]
    assert lines["student"][1:5] == ["4", "2", "4,096", "pairs"]


def test_a_plan_says_whether_a_training_fits_a_device_and_what_makes_it_fit(empty: Lab) -> None:
    def told(*options: object) -> str:
        return empty.nfm("plan", "teacher", "-c", "tiny.toml", *DATA, "--rate", 50, *options).stdout

    assert "which fits 1 GB" in told("--memory", 1)
    assert "does not fit 5 MB; it would with microbatch = " in told("--memory", 0.005)
    assert "does not fit 1 kB with any setting" in told("--memory", 1e-6)
    assert "by 4 workers" in told("--workers", 4)
