"""`nfm compare` on the tiny digits run: killed, resumed, repeated, and grown by a coupling."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Lab

COUPLINGS = "independent@0+1,minibatch-ot,semidiscrete-ot,nfm@0+1,nfm:soften=0.5"
SETS = ("student.pairs=768", "student.log_every=128", "student.save_every=128", "evaluate.samples=40",
        "evaluate.speed_batches=[4]", "potential.samples=5000", "pairs.group_size=32",
        "pairs.reflow_nfe=3")  # fmt: skip


def arguments(couplings: str, *more: object) -> list[object]:
    return ["compare", "-c", "tiny.toml", "--couplings", couplings, *(part for one in SETS for part in ("--set", one)),
            *more]  # fmt: skip


def manifests(lab: Lab) -> set[str]:
    """The finished artifacts, `stage/fingerprint/manifest`."""
    return {str(path.relative_to(lab.artifacts)) for path in lab.artifacts.glob("*/*/manifest*.json")}


def events(lab: Lab, stage: str, kind: str) -> int:
    lines = [line for path in lab.artifacts.glob(f"{stage}/*/events/*.jsonl") for line in path.open()]
    return sum(json.loads(line)["kind"] == kind for line in lines)


@pytest.fixture(scope="module")
def compared(made: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The comparison, killed with SIGKILL while its third student trains, and made to its end by the same command."""
    lab = Lab(tmp_path_factory.mktemp("compared") / "lab")
    shutil.copytree(made.folder, lab.folder)
    lab.drop("student", "evaluate", "report")
    process = lab.start(*arguments(COUPLINGS))

    def third_trains() -> bool:
        logs = list(lab.artifacts.glob("student/*/metrics.jsonl"))
        return len(logs) == 3 and sum(not (log.parent / "manifest.json").exists() for log in logs) == 1

    lab.until(third_trains, process)
    process.kill()
    process.communicate()
    done = {str(Path(name).parent) for name in manifests(lab)}
    assert sum(name.startswith("student/") for name in done) == 2
    before = {name: sha256 for name, sha256 in lab.committed().items() if "/".join(name.split("/")[:2]) in done}
    told = lab.nfm(*arguments(COUPLINGS, "-o", "results")).stderr
    assert told.count(": resuming student/") == 1
    after = lab.committed()
    assert {name: after[name] for name in before} == before
    yield lab
    lab.close()


@pytest.fixture
def body(compared: Lab) -> dict[str, Any]:
    return json.loads((compared.folder / "results/compare.json").read_text())


def test_a_killed_comparison_trains_nothing_twice(compared: Lab) -> None:
    students = compared.all("student")
    assert len(students) == 7
    assert events(compared, "student", "COMPLETE") == 7
    assert events(compared, "student", "START") == 8  # the killed one's, and its resumption
    assert len(compared.all("evaluate")) == 8  # one a student, and the teacher's
    for student in students:
        seen = [json.loads(line)["pairs_seen"] for line in (student.path / "metrics.jsonl").open()]
        assert len(seen) == len(set(seen))


def test_the_table_has_a_row_a_variant_and_sampler_with_the_spread_of_its_seeds(body: dict[str, Any]) -> None:
    variants = {"independent", "minibatch-ot", "semidiscrete-ot", "nfm", "nfm:soften=0.5"}
    assert {(row["variant"], row["nfe"]) for row in body["rows"]} == {
        (name, nfe) for name in variants for nfe in (7, 5)
    }
    for row in body["rows"]:
        found = row["metrics"]["fd_cnn"]
        several = row["variant"] in ("independent", "nfm")
        assert set(found["values"]) == ({"0", "1"} if several else {"0"})
        assert (found["spread"] is not None) == several
        assert found["mean"] > body["floor"]["metrics"]["fd_cnn"]["mean"]
    assert {row["variant"] for row in body["curvature"]} == variants
    assert [row["model"] for row in body["teacher"]] == ["teacher", "teacher"]
    assert len({store["order_key"] for store in body["stores"].values()}) == 1
    assert set(body["stores"]) == {"independent", "minibatch-ot", "semidiscrete-ot", "nfm"}


def test_the_folder_holds_what_is_committed_beside_its_command(compared: Lab) -> None:
    folder = compared.folder / "results"
    names = {"compare.json", "compare.txt", "distances.json", "distance.png", "loss.png", "curvature.png", "speed.png"}
    assert {path.name for path in folder.iterdir()} == {*names, "command.txt", "origin.json"}
    command = (folder / "command.txt").read_text()
    assert command.startswith(f"nfm compare -c tiny.toml --couplings {COUPLINGS} --set student.pairs=768 ")
    assert command.endswith("-o results\n")
    assert "Smallest FD-CNN: " in (folder / "compare.txt").read_text()
    origin = json.loads((folder / "origin.json").read_text())
    (artifact,) = (one for one in compared.all("compare") if one.name.endswith(origin["artifact"]))
    assert origin["inputs"] == artifact.manifest()["inputs"]
    assert set(origin["inputs"]["student:nfm@1"]) == {"artifact", "manifest", "content_digest"}


def test_a_folder_keeps_its_comparison_unless_it_is_forced(compared: Lab) -> None:
    few, here = "independent@0+1,nfm@0", ["-o", "mine"]
    first = compared.nfm(*arguments(COUPLINGS, *here)).stdout
    origin = json.loads((compared.folder / "mine/origin.json").read_text())
    assert first.strip().endswith(f"{origin['artifact']}, copied to mine")
    before = {path: path.read_bytes() for path in (compared.folder / "mine").iterdir()}
    told = compared.nfm(*arguments(few, *here), exits=2).stderr
    assert f"mine holds {origin['artifact']}, and this comparison is " in told
    assert "making compare/" not in told, "it is told before anything is made"
    assert {path: path.read_bytes() for path in before} == before
    compared.nfm(*arguments(few, *here, "--force"))
    assert json.loads((compared.folder / "mine/origin.json").read_text())["artifact"] != origin["artifact"]
    compared.nfm(*arguments(few, *here))


def test_an_output_folder_that_cannot_be_used_is_refused_before_anything_is_made(empty: Lab) -> None:
    told = empty.nfm(*arguments("nfm", "-o", "tiny.toml/table"), exits=2).stderr
    assert "there is no folder tiny.toml" in told.replace("\n", " ")
    assert not list(empty.artifacts.glob("*/*/manifest.json"))

    (empty.folder / "notes").mkdir()
    (empty.folder / "notes/command.txt").write_text("my own notes")
    told = empty.nfm(*arguments("nfm", "-o", "notes"), exits=2).stderr
    assert "notes holds other files (command.txt), which could be written over: give a folder of its own" in told
    assert (empty.folder / "notes/command.txt").read_text() == "my own notes"
    assert not list(empty.artifacts.glob("*/*/manifest.json"))


def test_stores_of_another_order_are_told_before_any_student_is_trained(made: Lab, tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab")
    shutil.copytree(made.folder, lab.folder)
    lab.drop("student", "evaluate", "report")
    data = lab.only("data").path / "train/s00001.tar"
    data.write_bytes(data.read_bytes()[:-3000])  # half of the shards fail, and minibatch-ot may lack them
    lacking = ["--set", "pairs.max_missing=1000000", "--set", "pairs.executor=serial"]
    told = lab.nfm(*arguments("nfm,minibatch-ot", *lacking), exits=1).stderr
    assert "the stores differ in their order keys (nfm " in told
    assert not lab.all("student")


def test_a_second_call_makes_nothing_and_takes_seconds(compared: Lab) -> None:
    before, used = compared.committed(), time.process_time()
    told = json.loads(compared.nfm(*arguments(COUPLINGS, "--json")).stdout)
    assert time.process_time() - used < 10, "of a core: others may share the clock"
    assert compared.committed() == before
    assert told == json.loads((compared.folder / "results/compare.json").read_text())


def test_a_coupling_more_makes_its_own_and_the_new_table(compared: Lab) -> None:
    before = manifests(compared)
    compared.nfm(*arguments(f"{COUPLINGS},reflow"))
    stages = sorted(name.split("/")[0] for name in manifests(compared) - before)
    assert stages == ["compare", "evaluate", "pairs", "student"]  # its generator, independent@0, was there
    assert before <= manifests(compared)


def test_a_comparison_is_audited_and_traced_back_like_any_artifact(compared: Lab) -> None:
    largest = max(compared.all("compare"), key=lambda made: len(made.spec["inputs"]))
    name = f"compare/{largest.path.name}"
    told = compared.nfm("audit", name, "--quick").stdout
    assert "FINDING" not in told
    assert all(f"{stage}/" in told for stage in ("compare", "evaluate", "student", "potential", "pairs", "teacher"))
    assert "evaluate:teacher: evaluate/" in compared.nfm("lineage", name).stdout
    assert name in compared.nfm("ls").stdout
    going = json.loads(compared.nfm("gc", "--dry-run", "-c", "tiny.toml", "--older-than", 0, "--json").stdout)["found"]
    assert [found["name"] for found in going if found["kind"] == "artifact"] == []


def test_a_student_is_sampled_by_the_solver_grid_and_guidance_that_are_asked_for(compared: Lab, tmp_path: Path) -> None:
    student, pictures = compared.all("student")[0].path, []
    for number, options in enumerate(([], ["--solver", "midpoint"], ["--grid", "uniform"], ["--guidance", 2])):
        path = tmp_path / f"{number}.png"
        compared.nfm("sample", student, "-n", 4, "--nfe", 4, *options, "-o", path)
        pictures.append(path.read_bytes())
    assert len(set(pictures)) == 4
    assert "rk4 takes 4N" in compared.nfm("sample", student, "--nfe", 5, "--solver", "rk4", exits=2).stderr


def test_a_config_with_a_compare_table_shows_and_makes_the_comparison(compared: Lab, tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab")
    shutil.copytree(compared.folder, lab.folder)
    lab.config.write_text(f"{lab.config.read_text()}\n[compare]\ncouplings = {json.dumps(COUPLINGS.split(','))}\n")
    sets = [part for one in SETS for part in ("--set", one)]
    rows = {row["stage"]: row for row in json.loads(lab.nfm("status", "-c", "tiny.toml", *sets, "--json").stdout)}
    assert rows["compare"]["state"] == rows["evaluate:nfm@1"]["state"] == rows["potential"]["state"] == "done"
    before = lab.committed()
    assert lab.run("compare", *SETS).stdout.strip().endswith("compare.txt")
    assert lab.committed() == before


def test_unknown_couplings_are_refused_before_anything_is_made(empty: Lab) -> None:
    assert "coupling 'nmf' is unknown" in empty.nfm("compare", "-c", "tiny.toml", "--couplings", "nmf", exits=2).stderr
    assert "name what is compared" in empty.nfm("compare", "-c", "tiny.toml", exits=2).stderr
    assert not empty.artifacts.exists()
