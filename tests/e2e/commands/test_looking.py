"""The commands that look: plan, status, ls, lineage, pairs info, verify and seal, sample, evaluation and report."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from nfm.pipeline.config import load
from nfm.stages.trained.sampling import sample_grid
from nfm.storage import PairStore

if TYPE_CHECKING:
    from tests.conftest import Lab

ALL = [
    "data",
    "features",
    "teacher",
    "pairs",
    "student",
    "pairs:independent",
    "student:independent",
    "evaluate",
    "report",
]


def rows(lab: Lab, *arguments: object) -> list[dict[str, Any]]:
    found = json.loads(lab.nfm(*arguments, "--json").stdout)
    assert isinstance(found, list)
    return found


def test_a_plan_says_what_would_run_and_what_it_costs_and_does_nothing(empty: Lab) -> None:
    first = rows(empty, "plan", "report", "-c", "tiny.toml")
    assert [row["stage"] for row in first] == ALL
    assert first[0]["would"] == "run"
    assert {row["would"] for row in first[1:]} == {"run after its inputs"}
    assert not any(empty.artifacts.glob("[a-z]*"))

    empty.run("data")
    planned = {row["stage"]: row for row in rows(empty, "plan", "student", "-c", "tiny.toml")}
    assert list(planned) == ["data", "teacher", "pairs", "student"]
    assert planned["data"]["would"] == "nothing, is done"
    assert planned["teacher"]["would"] == "run"
    assert "FLOPs" in planned["teacher"]["cost"]
    assert "512 pairs, 2 draws" in planned["pairs"]["cost"]
    assert len(list(empty.artifacts.glob("[a-z]*"))) == 1
    assert "nothing, is done" in empty.nfm("plan", "student", "-c", "tiny.toml").stdout


def test_status_has_a_line_a_stage_with_its_state_and_figures(made: Lab, empty: Lab) -> None:
    found = {row["stage"]: row for row in rows(made, "status", "-c", "tiny.toml")}
    assert list(found) == ALL
    assert {row["state"] for row in found.values()} == {"done"}
    assert found["pairs"]["artifact"] == made.name("pairs")
    assert "pairs 512, draws 2" in found["pairs"]["figures"]
    assert "heldout_bpd" in found["teacher"]["figures"]
    assert len(made.nfm("status", "-c", "tiny.toml").stdout.splitlines()) == 10
    assert {row["state"] for row in rows(empty, "status", "-c", "tiny.toml")} == {"-", "waiting"}


def test_status_shows_a_stage_that_was_killed_as_started(lab: Lab) -> None:
    done = lab.only("teacher").path
    process = lab.start(*lab.arguments("teacher", "teacher.images=400000"))
    lab.until(lambda: [p for p in lab.artifacts.glob("teacher/*/metrics.jsonl") if p.parent != done], process)
    process.kill()
    process.communicate()
    found = {row["stage"]: row for row in rows(lab, "status", "-c", "tiny.toml", "--set", "teacher.images=400000")}
    assert found["teacher"]["state"] == "started"
    assert found["pairs"]["state"] == "waiting"
    planned = {
        row["stage"]: row for row in rows(lab, "plan", "pairs", "-c", "tiny.toml", "--set", "teacher.images=400000")
    }
    assert planned["teacher"]["would"] == "resume"


@pytest.mark.parametrize("content", ["[]", "{", '{"stage": "pairs"}'])
def test_a_recipe_that_is_destroyed_is_damage_to_every_command(lab: Lab, content: str) -> None:
    spec = lab.only("pairs").path / "spec.json"
    spec.write_text(content)
    found = {row["stage"]: row["state"] for row in rows(lab, "status", "-c", "tiny.toml")}
    assert found["pairs"] == "damaged"
    assert found["teacher"] == "done"
    for command in (lab.arguments("pairs"), ("plan", "pairs", "-c", "tiny.toml")):
        assert str(spec) in lab.nfm(*command, exits=1).stderr


@pytest.mark.parametrize(
    ("stage", "waiting"), [("data", ["features", "teacher", "pairs", "student"]), ("pairs", ["student", "evaluate"])]
)
def test_status_shows_a_damaged_manifest_beside_the_other_stages(lab: Lab, stage: str, waiting: list[str]) -> None:
    (manifest,) = lab.only(stage).path.glob("manifest*.json")
    manifest.write_bytes(manifest.read_bytes()[:-20])
    found = {row["stage"]: row["state"] for row in rows(lab, "status", "-c", "tiny.toml")}
    assert list(found) == ALL
    assert found[stage] == "damaged"
    assert [found[name] for name in waiting] == ["waiting"] * len(waiting)
    assert {state for name, state in found.items() if name not in (stage, *waiting)} <= {"done", "waiting"}


def test_a_run_whose_spec_was_set_aside_says_what_mends_it(lab: Lab) -> None:
    teacher = lab.only("teacher").path
    (teacher / "spec.json").rename(lab.folder / "aside.json")
    told = lab.run("teacher", exits=1).stderr
    assert "spec.json: missing, and manifest.json stands beside it" in told
    assert "remove the folder and run the stage again" in told
    shutil.rmtree(teacher)
    lab.run("teacher")


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: os.truncate(path, 500)])
def test_nothing_is_begun_with_weights_that_are_cut_or_missing(lab: Lab, change: Callable[[Path], None]) -> None:
    change(lab.only("teacher").path / "weights.safetensors")
    before = {path.name for path in (lab.artifacts / "pairs").iterdir()}
    told = lab.run("pairs", "pairs.seed=99", exits=1).stderr
    assert "weights.safetensors: " in told
    assert "making" not in told
    assert {path.name for path in (lab.artifacts / "pairs").iterdir() if (path / "spec.json").exists()} == before


def test_a_student_that_is_not_finished_is_not_sampled_and_told_as_such(made: Lab) -> None:
    student = made.only("student")
    (student.path / "manifest.json").rename(student.path / "aside.json")
    try:
        told = made.nfm("sample", student.name, "-n", 1, exits=1).stderr
    finally:
        (student.path / "aside.json").rename(student.path / "manifest.json")
    assert f"{made.name('student')}: is not finished; the command that makes it goes on with it" in told


def test_numbers_that_make_no_samples_are_wrong_use(made: Lab) -> None:
    student = made.name("student")
    for wrong in (("--guidance", "nan"), ("--guidance", "1e30"), ("--seed", "-1"), ("--nfe", "0"), ("-n", "99999999")):
        assert wrong[0] in made.nfm("sample", student, *wrong, exits=2).stderr
    for wrong in (
        ("--nfe", 7),
        ("--solver", "euler"),
        ("--grid", "square"),
        ("--ema", "0.05"),
    ):  # which a teacher would ignore
        told = made.nfm("sample", made.name("teacher"), *wrong, exits=2).stderr
        assert f"{wrong[0]} is of a student's samples" in told
    assert not (made.folder / "grid.png").exists()


def test_ls_lists_every_artifact_and_who_needs_it(made: Lab, empty: Lab) -> None:
    found = {row["artifact"]: row for row in rows(made, "ls")}
    assert len(found) == 9
    assert {row["state"] for row in found.values()} == {"done"}
    teacher, store, report = (made.name(stage) for stage in ("teacher", "pairs", "report"))
    assert store in found[teacher]["needed by"]
    assert made.name("student") in found[store]["needed by"]
    assert found[report]["needed by"] == "-"
    assert made.nfm("ls").stdout.count("\n") == 10
    assert "no artifacts under" in empty.nfm("ls").stdout


def test_lineage_leads_back_to_the_data_with_licence_and_origin(made: Lab) -> None:
    student = made.name("student")
    lines = made.nfm("lineage", student).stdout.splitlines()
    names = [made.name(stage) for stage in ("student", "pairs", "data", "teacher", "data")]
    assert [re.findall(r"\w+/[0-9a-f]{12}", line)[0] for line in lines if "content" in line] == names
    assert "licence CC BY 4.0" in lines[3]
    assert "scikit-learn" in lines[3]
    found = rows(made, "lineage", student)
    assert [row["artifact"] for row in found] == [made.name(s) for s in ("data", "teacher", "pairs", "student")]
    for row in found:
        body = made.only(row["artifact"].split("/")[0]).manifest()
        assert row["artifact"] == made.name(row["artifact"].split("/")[0])
        assert row["content_digest"] == body["content_digest"]


def test_pairs_info_states_recipe_generations_and_moments(made: Lab) -> None:
    store = made.only("pairs")
    info = json.loads(made.nfm("pairs", "info", store.path, "--json").stdout)
    opened = PairStore.open(store.path)
    assert info["coupling"] == "nfm"
    assert info["pairs"] == 512
    assert info["content"] == opened.content_digest
    assert info["teacher"] == made.only("teacher").manifest()["content_digest"]
    assert info["source"] == made.only("data").manifest()["content_digest"]
    assert abs(info["noise mean"]) < 0.1
    assert abs(info["noise var"] - 1) < 0.1
    text = made.nfm("pairs", "info", store.path.name[:8]).stdout
    assert re.search(r"^generations +manifest\.g0001\.json$", text, re.MULTILINE)


def test_verify_needs_no_lineage(lab: Lab) -> None:
    store = lab.only("pairs").path
    moved = lab.folder / "elsewhere"
    shutil.move(store, moved)
    shutil.rmtree(lab.artifacts)
    assert lab.nfm("pairs", "verify", moved).stdout.startswith("clean: 8 shards of 512 pairs, 16 files, ")
    assert lab.nfm("pairs", "verify", moved, "--quick").stdout.startswith("clean: 8 shards of 512 pairs, 16 files, ")


def test_complete_draws_of_an_unfinished_store_are_sealed_on_request(lab: Lab) -> None:
    store = lab.only("pairs")
    lab.run("pairs", "pairs.draws=4")
    body = json.loads((store.path / "manifest.g0002.json").read_text())
    (store.path / "manifest.g0002.json").unlink()
    last = body["shards"][-1]["name"]
    for path in store.path.glob(f"*/{last}.*"):
        path.unlink()
    assert lab.nfm("pairs", "seal", store.path).stdout.strip() == str(store.path / "manifest.g0002.json")
    opened = PairStore.open(store.path)
    assert (opened.generation, opened.draws) == (2, 3)
    lab.nfm("audit", store.path)
    before = lab.committed()
    lab.nfm("pairs", "seal", store.path)  # nothing new: nothing written
    assert lab.committed() == before


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_sample_draws_a_grid_of_a_model_the_same_for_a_seed(made: Lab, tmp_path: Path, stage: str) -> None:
    name = made.name(stage)
    nfe = ("--nfe", 5) if stage == "student" else ()
    made.nfm("sample", name, "-n", 12, *nfe, "--seed", 3, "-o", tmp_path / "a.png")
    for seed, output in ((3, "b.png"), (4, "c.png")):
        sample_grid(made.only(stage).path, stage, 12, 5, seed, tmp_path / output)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    picture = Image.open(tmp_path / "a.png")
    assert picture.height == 3 * (2 * 9 + 1)  # 2 rows of 8x8 with gaps, tripled
    assert picture.width > 3 * (8 * 9 + 1)  # 8 columns, and at their left the classes of each row


def test_the_evaluation_has_every_sampler_with_what_stands_beside_a_figure(made: Lab) -> None:
    body = json.loads((made.only("evaluate").path / "evaluation.json").read_text())
    found = {row["name"]: row for row in body["rows"]}
    assert list(found) == [
        "floor", "teacher", "teacher-score", "student-nfm-heun-7", "student-nfm-euler-5",
        "student-independent-heun-7", "student-independent-euler-5",
    ]  # fmt: skip
    for name, row in found.items():
        assert row["fd_cnn"] >= 0
        assert row["samples"] == 64  # as many as are held out: the floor is a floor for every row
        assert {"kid", "kid_error", "kid_size"} <= set(row)
        if name == "floor":
            continue
        assert row["sampler"] in ("inverse", "inverse+score", "heun", "euler")
        assert row["guidance"] == 0.0
        assert row["nfe"] == (int(name.split("-")[-1]) if name.startswith("student") else 1 + name.endswith("score"))
        assert row["images_per_second"] > 0
        assert row["latency_seconds"] > 0
        stage = "teacher" if name.startswith("teacher") else "student"
        coupling = row["coupling"] or "nfm"
        assert row["parameters"] == made.only(stage, coupling).manifest()["metrics"]["parameters"]
    assert [(row["coupling"], row["steps"], row["trajectories"]) for row in body["curvature"]] == [
        ("nfm", 128, 8),
        ("independent", 128, 8),
    ]
    assert all(row["value"] > 0 for row in body["curvature"])
    text = (made.only("evaluate").path / "evaluation.txt").read_text()
    assert "FD-CNN" in text
    assert "FID" not in text
    assert "curvature of student (nfm)" in text


def test_the_report_is_one_page_that_needs_no_other_file(made: Lab) -> None:
    page = (made.only("report").path / "report.html").read_text()
    asked: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            asked.extend(
                v or "" for k, v in attrs if k in ("src", "href", "srcset", "data") and not tag.startswith("svg:")
            )

    Links().feed(page)
    assert asked
    assert all(link.startswith(("data:", "#")) for link in asked), [link[:80] for link in asked]
    assert "url(http" not in page
    for stage in ("data", "teacher", "pairs", "student", "evaluate"):
        assert made.only(stage).path.name in page


def test_ls_marks_a_damaged_artifact_and_lists_the_others(lab: Lab) -> None:
    spec = lab.only("teacher").path / "spec.json"
    spec.write_text(spec.read_text()[:100])
    rows = {row["artifact"]: row["state"] for row in json.loads(lab.nfm("ls", "--json").stdout)}
    assert rows[f"teacher/{spec.parent.name}"] == "damaged"
    assert rows[lab.name("data")] == "done"


def test_every_config_of_the_repository_is_valid() -> None:
    folder = Path(__file__).resolve().parents[3] / "configs"
    for path in sorted(folder.glob("*.toml")):
        assert load(path).data.source
