"""A teacher, or parts of a student, that are their user's own, by the commands: planned, trained, measured, audited."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfm.storage.files import atomic
from tests.support.lab import Lab

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "one_step.py"
NETWORK = """
import math
import pathlib
import torch

pathlib.Path(__file__).with_name("ran.txt").touch()  # a worker stands elsewhere

class Network(torch.nn.Module):
    def __init__(self, image_shape, classes, width):
        super().__init__()
        values = math.prod(image_shape)
        self.first, self.last = torch.nn.Linear(values + 1, width), torch.nn.Linear(width, values)

    def forward(self, x, t, label):
        return self.last(self.first(torch.cat([x.flatten(1), t[:, None]], 1)).tanh()).view_as(x)

def net(image_shape, classes, width=16):
    return Network(image_shape, classes, width)
"""
OWN = ("student.model=mine_net:net", "student.options={width = 24}", "student.pairs=256")
FLOW = """
import pathlib
import torch

pathlib.Path(__file__).with_name("ran.txt").touch()  # a worker stands elsewhere

class Affine(torch.nn.Module):
    def __init__(self, image_shape, classes):
        super().__init__()
        self.shift, self.scale = (torch.nn.Parameter(torch.zeros(classes + 1, *image_shape)) for _ in range(2))

    def encode(self, x, label):
        return (x - self.shift[label]) * (-self.scale[label]).exp(), -self.scale[label].flatten(1).mean(1)

    def decode(self, noise, label):
        return noise * self.scale[label].exp() + self.shift[label]

def flow(image_shape, classes):
    return Affine(image_shape, classes)
"""
OWN_FLOW = ("teacher.model=mine_flow:flow", "teacher.images=9600", "teacher.learning_rate=0.05", "pairs.draws=1")
ONE_STEP = ("student.objective=one_step:objective", "student.sampler=one_step:sampler", "student.pairs=512")


@pytest.fixture
def own(lab: Lab) -> Iterator[Lab]:
    """The tiny run, with the files of the functions beside its config."""
    (lab.folder / "mine_net.py").write_text(NETWORK)
    shutil.copy(EXAMPLE, lab.folder)
    lab.drop("student", "evaluate", "report")
    yield lab
    for name in ("mine_net", "mine_flow", "one_step"):
        sys.modules.pop(name, None)


def sets(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


def test_a_network_of_ones_own_runs_where_it_is_trained_and_where_its_digest_is_allowed(own: Lab) -> None:
    ran, sha256 = own.folder / "ran.txt", atomic.hash_file(own.folder / "mine_net.py")[0]
    plan = own.nfm("plan", "student", "-c", "tiny.toml", *sets(*OWN))
    assert "256 pairs" in plan.stdout
    own.nfm("status", "-c", "tiny.toml", *sets(*OWN))
    assert not ran.exists(), "a plan runs nobody's code"

    said = own.run("student", *OWN).stderr
    assert ran.exists()
    file = own.folder.resolve() / "mine_net.py"
    assert f"student.model = 'mine_net:net' runs the code of {file}, SHA-256 {sha256}" in said
    name = own.name("student")
    assert own.only("student").spec["external"] == {"model": sha256}

    ran.unlink()
    sampling = ("sample", name, "-n", 2, "-o", "grid.png")
    assert f"SHA-256 {sha256}, give --run-custom" in own.nfm(*sampling, exits=2).stderr
    own.nfm("sample", name, "--run-custom", "ab" * 32, exits=2)
    own.nfm("audit", name, "--deep")
    own.nfm("lineage", name)
    assert not ran.exists(), "nor does looking at what was sent"
    assert "runs the code of" in own.nfm(*sampling, "--run-custom", sha256).stderr

    (own.folder / "mine_net.py").write_text(NETWORK + "\n")
    other = atomic.hash_file(own.folder / "mine_net.py")[0]
    ran.unlink()
    for allowed in ((), ("--run-custom", other)):  # of the file as it is now, which is not the student's
        said = own.nfm(*sampling, *allowed, exits=2).stderr
        assert f"SHA-256 {sha256}, give --run-custom with it; {file} is another one, of SHA-256 {other}" in said
    said = own.nfm(*sampling, "--run-custom", sha256, exits=1).stderr
    assert f"{file}: not the file that was recorded: student.model = 'mine_net:net' was of SHA-256 {sha256}" in said
    assert f"this one is of {other}. Restore it" in said
    assert "runs the code" not in said
    assert not ran.exists()
    own.run("student", *OWN)
    assert len(own.all("student")) == 2, "another file makes another student"


def test_a_teacher_of_ones_own_encodes_and_its_pairs_are_encoded_again_where_its_digest_is_allowed(own: Lab) -> None:
    own.drop("teacher", "pairs")
    ran, file = own.folder / "ran.txt", own.folder / "mine_flow.py"
    file.write_text(FLOW)
    sha256 = atomic.hash_file(file)[0]
    assert "9,600 images" in own.nfm("plan", "pairs", "-c", "tiny.toml", *sets(*OWN_FLOW)).stdout
    assert not ran.exists(), "a plan runs nobody's code"
    said = own.run("pairs", *OWN_FLOW).stderr
    assert said.count("teacher.model = 'mine_flow:flow' runs the code of") == 2, "training, then encoding"

    ran.unlink()
    store, name = own.name("pairs"), own.name("teacher")
    assert f"SHA-256 {sha256}, give --run-custom" in own.nfm("audit", store, "--deep").stdout
    assert "give --teacher none" in own.nfm("pairs", "head", store, exits=2).stderr
    own.nfm("pairs", "head", store, "--teacher", "none", "-o", "head.png")
    own.nfm("pairs", "report", store)
    own.nfm("sample", name, exits=2)
    assert not ran.exists()
    said = own.nfm("audit", store, "--deep", "--sample", 30, "--run-custom", sha256).stdout
    assert "0 of 30 pairs bad" in said
    own.nfm("audit", "-c", "tiny.toml", *sets(*OWN_FLOW), "--deep", "--sample", 30)
    own.nfm("sample", name, "-n", 4, "-o", "grid.png", "--run-custom", sha256)
    said = own.nfm("sample", name, "--guidance", 1, "--run-custom", sha256, exits=2).stderr
    assert "a flow of its user's own, which has no guidance" in said


def test_pairs_that_such_a_student_generated_are_encoded_again_where_its_digest_is_allowed(own: Lab) -> None:
    own.run("student", *OWN, "pairs.draws=2")
    reflow = (f"pairs.student={own.name('student')}", "pairs.coupling=reflow", "pairs.draws=1", "pairs.reflow_nfe=2",
              "pairs.reflow_solver=euler")  # fmt: skip
    assert "runs the code of" in own.run("pairs", *reflow).stderr
    store, sha256 = own.name("pairs", "reflow"), atomic.hash_file(own.folder / "mine_net.py")[0]
    (own.folder / "ran.txt").unlink()
    said = own.nfm("audit", store, "--deep").stdout
    assert f"When you know the file of SHA-256 {sha256}, give --run-custom" in said
    assert not (own.folder / "ran.txt").exists()
    said = own.nfm("audit", store, "--deep", "--sample", 20, "--run-custom", sha256).stdout
    assert "0 of 20 pairs bad" in said


def test_code_that_does_not_fit_is_wrong_use_before_anything_is_made(own: Lab) -> None:
    own.drop("pairs")
    for change, message in (
        ("student.options={depth = 2}", "student.options.depth: student.model = 'mine_net:net' has no such keyword"),
        ("student.model=mine_net:other", "has no function 'other'"),
        ("student.model=nowhere:net", "there is no module nowhere"),
        ("student.times=mine_net:net", "student.times = 'mine_net:net'"),
    ):
        said = own.run("student", *OWN, change, exits=2).stderr
        assert message in said
        assert not (own.artifacts / "pairs").exists()
        assert not (own.artifacts / "student").exists()


def test_the_example_regresses_images_on_their_noise_and_is_measured_at_one_evaluation(own: Lab) -> None:
    said = own.run("report", *ONE_STEP, "evaluate.baselines=[]", "evaluate.curvature_trajectories=2").stderr
    assert "its own sampler has one row: evaluate.nfe, solver, grid and diffusion do not apply" in said
    body = json.loads((own.only("evaluate").path / "evaluation.json").read_text())
    rows = [row for row in body["rows"] if row["model"] == "student"]
    assert [(row["name"], row["sampler"], row["nfe"]) for row in rows] == [("student-nfm-own", "own", 1)]
    assert body["curvature"] == []
    assert own.only("report").done
    sha256 = atomic.hash_file(own.folder / "one_step.py")[0]
    own.nfm("sample", own.name("student"), "-n", 4, "-o", "grid.png", "--run-custom", sha256)
    for option in (("--solver", "heun"), ("--nfe", 9), ("--grid", "uniform"), ("--diffusion", "sin^2")):
        said = own.nfm("sample", own.name("student"), *option, "--run-custom", sha256, exits=2).stderr
        assert f"{option[0]} is of solvers, and this student has a sampler of its own" in said
    said = own.run("evaluate", *ONE_STEP, "evaluate.student_guidance=1.0", exits=2).stderr
    assert "student.sampler = 'one_step:sampler' samples, which has no guidance" in said
    said = own.run("evaluate", *ONE_STEP, "evaluate.reference=true", exits=2).stderr
    assert "evaluate.reference is of a student's velocity, and student.sampler = 'one_step:sampler' samples" in said


def test_a_student_begins_with_another_one(own: Lab) -> None:
    own.run("student", "student.pairs=256")
    first = own.name("student")
    own.run("student", "student.pairs=128", f"student.init={first}")
    (second,) = [found for found in own.all("student") if "init" in found.spec["inputs"]]
    assert second.spec["inputs"]["init"]["artifact"] == first
    assert f"init: {first}" in own.nfm("lineage", second.path).stdout
    said = own.run("student", "student.width=64", f"student.init={first}", exits=2).stderr
    assert f"student.init = {first}: it has width 32 there and 64 here" in said
    said = own.run("student", f"student.init={own.name('teacher')}", exits=2).stderr
    assert "no finished student" in said
