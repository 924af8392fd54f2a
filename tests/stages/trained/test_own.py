"""Networks, times, objectives and samplers of one's own: recorded by digest, tried before training, refused by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from nfm.stages.base import StageError, Unfit
from nfm.stages.trained import sampling, student, teacher
from nfm.stages.trained.foreign import own
from nfm.stages.trained.student import StudentConfig
from nfm.stages.trained.teacher import TeacherConfig
from nfm.storage.files import atomic
from nfm.trainers.checkpoint import unpack_weights
from nfm.trainers.training.randomness import Randomness
from tests.stages.trained.test_student import SHAPE, write_store
from tests.support.recorder import Recorder

CODE = """
import math
import torch

class Network(torch.nn.Module):
    def __init__(self, image_shape, classes, width=8, out=None):
        super().__init__()
        values = math.prod(image_shape)
        self.first, self.last = torch.nn.Linear(values + 1, width), torch.nn.Linear(width, out or values)
        self.out = out

    def forward(self, x, t, label):
        found = self.last(self.first(torch.cat([x.flatten(1), t[:, None]], 1)).tanh())
        return found if self.out else found.view_as(x)

def net(image_shape, classes, **options):
    return Network(image_shape, classes, **options)

def no_module(image_shape, classes):
    return [1, 2]

def fails(image_shape, classes):
    raise KeyError("no such size")

class TakesOne(Network):
    def forward(self, x):
        return x

def takes_one(image_shape, classes):
    return TakesOne(image_shape, classes)

def early(random):
    return random.uniform() ** 4

def late(random):
    return random.uniform() + 1

def scalar(random):
    return torch.tensor(0.5)

def objective(network, batch, random):
    return (network(batch.noise, torch.ones(len(batch)), batch.label) - batch.image).square().mean()

def each(network, batch, random):
    return (network(batch.noise, torch.ones(len(batch)), batch.label) - batch.image).square().flatten(1).mean(1)

def unknown(network, batch, random):
    return objective(network, batch, random) * math.nan

def steep(network, batch, random):
    nothing = 0 * network(batch.noise, batch.label + 1.0, batch.label)
    return objective(network, batch, random) + nothing.square().sum().sqrt()

def infinite(image_shape, classes):
    made = Network(image_shape, classes)
    torch.nn.init.constant_(made.last.bias, math.inf)
    return made

def constant(network, batch, random):
    return torch.tensor(1.0)

def sampler(network, noise, label):
    return network(noise, torch.ones(len(noise)), label)

class Flow(torch.nn.Module):
    def __init__(self, image_shape, shift=0.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(image_shape))
        self.shift = shift

    def encode(self, x, label):
        return x * self.scale.exp(), self.scale.mean().expand(len(x))

    def decode(self, noise, label):
        return noise * (-self.scale).exp() + self.shift

class Hidden(Flow):
    def decode(self, noise, label):
        return noise * (-self.scale).exp() + 8 * self.scale.abs().mean()

def hidden(image_shape, classes):
    return Hidden(image_shape)

def flow(image_shape, classes, **options):
    return Flow(image_shape, **options)

def sums(image_shape, classes):
    made = Flow(image_shape)
    made.encode = lambda x, label: (x * made.scale.exp(), made.scale.sum())
    return made

def flat(network, noise, label):
    return network(noise, torch.ones(len(noise)), label).flatten(1)
"""
TINY: dict[str, Any] = {"pairs": 96, "batch_size": 16, "device": "cpu"}
SIT: dict[str, Any] = {"width": 16, "depth": 1, "patch": 1, "head_size": 16}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the functions, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)


def trained(out: Path, pairs: Path | None = None, init: Path | None = None, **options: Any) -> dict[str, Any]:
    """Metrics of a student, made as the pipeline makes it as far as its folder is concerned."""
    config = StudentConfig(**TINY | options)
    inputs = {"pairs": pairs or write_store(out.parent / f"{out.name}-store", "nfm", 0)}
    out.mkdir()
    atomic.write_json(out / "spec.json", {"external": student.external(config)})
    result = student.run(config, inputs | ({"init": init} if init else {}), out, Recorder(10**6))
    atomic.write_json(out / "manifest.json", {"config": config.model_dump(mode="json"), "metrics": result.metrics})
    return result.metrics


def test_a_network_of_ones_own_is_trained_and_loaded_again_from_the_file_of_its_digest(
    code: Path, tmp_path: Path
) -> None:
    trained(tmp_path / "out", model="mine:net", options={"width": 4})
    sha256 = atomic.hash_file(code)[0]
    _, sizes = unpack_weights((tmp_path / "out" / "weights.safetensors").read_bytes())
    own_sizes = {"model": "mine:net", "sha256": sha256, "options": {"width": 4}}
    assert sizes == {**own_sizes, "image_shape": list(SHAPE), "classes": 3}
    network = student.load(tmp_path / "out")
    assert network.first.out_features == 4
    assert own.recorded(tmp_path / "out", "student") == {"student.model": ("mine:net", sha256)}
    images = sampling.student_sampler(tmp_path / "out", 3, "cpu", "float32")
    assert images.decode(torch.randn(2, *SHAPE), torch.tensor([0, 1])).shape == (2, *SHAPE)
    code.write_text(CODE + "\n", encoding="utf-8")
    with pytest.raises(
        StageError, match=r"mine\.py: not the file that was recorded: student\.model = 'mine:net' was of"
    ):
        student.load(tmp_path / "out")
    said: list[str] = []
    with pytest.raises(
        StageError, match=r"mine\.py: not the file that was recorded: student\.model = 'mine:net' was of"
    ):
        own.announce_made(tmp_path / "out", "student", said.append)
    assert said == [], "nothing of a file that is not run is said to run"


def test_the_digests_of_all_functions_are_in_the_fingerprint_and_nothing_of_them_runs(code: Path) -> None:
    code.write_text("raise SystemExit('run')\n", encoding="utf-8")
    config = StudentConfig(model="mine:net", objective="mine:objective", sampler="mine:sampler")
    assert student.external(config) == dict.fromkeys(("model", "objective", "sampler"), atomic.hash_file(code)[0])
    assert student.external(StudentConfig(times="mine:early")) == {"times": atomic.hash_file(code)[0]}
    assert student.external(StudentConfig()) == {}
    assert str(student.cost(config, {"image_shape": [1, 6, 7]}, None)).startswith("240,000 pairs, no time or FLOPs")
    code.write_text(f"raise SystemExit('run')\n{CODE}", encoding="utf-8")
    student.fits(config, {"image_shape": [1, 6, 7], "classes": 3, "images": 400})
    with pytest.raises(Unfit, match=r"student\.objective = 'mine:objectiv': .* \(did you mean 'objective'\?\)"):
        student.fits(StudentConfig(model="mine:net", objective="mine:objectiv", sampler="mine:sampler"), {})
    with pytest.raises(Unfit, match=r"student\.model = 'nowhere:net': there is no module nowhere"):
        student.fits(StudentConfig(model="nowhere:net"), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mine:nothing"}, r"student\.model = 'mine:nothing': .*mine\.py has no function 'nothing'"),
        (
            {"model": "mine:net", "options": {"depth": 3}},
            r"raised TypeError: .*keyword argument 'depth'; mend it in .*, or correct student\.options \(depth\)",
        ),
        (
            {"model": "mine:Network", "options": {"widht": 3}},
            r"student\.options\.widht: .* has no such keyword; it takes width, out \(did you mean 'width'\?\)",
        ),
        ({"model": "mine:Network", "options": {"classes": 3}}, r"student\.options\.classes: .* has no such keyword"),
        ({"model": "mine:no_module"}, r"returned list; return a torch\.nn\.Module"),
        ({"model": "mine:fails"}, "raised KeyError: 'no such size'"),
        (
            {"model": "mine:takes_one"},
            r"called as \(x, t, label\) .* for x .*, labels \[-1, 0\], raised TypeErr",
        ),
        (
            {"model": "mine:net", "options": {"out": 5}},
            r"gave torch.float32 2x5 for two .*2x1x6x7",
        ),
        (
            {"times": "mine:late"},
            r"student\.times = 'mine:late': gave times from 1\.\d+ to 1\.\d+; give times in \[0, 1\]",
        ),
        ({"times": "mine:scalar"}, r"gave torch.float32 one value for two records; give floats of shape 2"),
        ({"objective": "mine:each"}, r"student\.objective = 'mine:each': gave torch.float32 2 .*of shape one value"),
        ({"objective": "mine:unknown"}, r"'mine:unknown': gave values that are not finite .*look for a division by 0"),
        ({"objective": "mine:steep"}, r"'mine:steep': its gradient in .* is not finite .*a log or a root of 0"),
        ({"model": "mine:infinite"}, r"'mine:infinite': gave values that are not finite for two records"),
        ({"objective": "mine:constant"}, "its loss does not depend on the network's parameters"),
        ({"objective": "mine:objective", "sampler": "mine:flat"}, r"student\.sampler = 'mine:flat': gave .*2x42"),
    ],
)
def test_what_does_not_fit_is_wrong_use_told_before_training(
    options: dict[str, Any], message: str, code: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unfit, match=message):
        student.tries(StudentConfig(**TINY | SIT | options), {"image_shape": list(SHAPE), "classes": 3})
    with pytest.raises(Unfit, match=message):
        trained(tmp_path / "out", **SIT | options)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_times_are_spelled_in_one_way_and_old_fingerprints_stand() -> None:
    for text in ("logit-normal(-0.2, 1)", "logit-normal( -.2,1.0 )"):
        assert StudentConfig(times=text).semantic() == StudentConfig().semantic()
    assert StudentConfig(times="logit-normal(0, 2)").times == "logit-normal(0.0, 2.0)"
    for wrong in ("logit-normal(0)", "logit-normal(0, 0)", "logit-normal(0, -1)", "normal", "logit-normal(nan, 1)"):
        with pytest.raises(ValidationError, match='times are "uniform", "logit-normal'):
            StudentConfig(times=wrong)


def test_options_that_do_not_go_together_are_refused() -> None:
    for options, message in (
        ({"options": {"width": 3}}, "options are the keywords of student.model, and there is none"),
        ({"objective": "mse"}, 'an objective is "flow-matching" or a function'),
        ({"sampler": "mine:sampler"}, "sampler is of an objective of one's own"),
        ({"objective": "mine:objective", "times": "uniform"}, "times are flow matching's"),
    ):
        with pytest.raises(ValidationError, match=message):
            StudentConfig(**options)


def test_times_are_drawn_as_they_are_named(code: Path) -> None:
    random = 20_000
    drawn = {
        text: student._times(StudentConfig(times=text))(Randomness(0, random))
        for text in ("logit-normal(-0.2, 1)", "logit-normal(1, 0.5)", "uniform", "mine:early")
    }
    for text, mean, deviation in (("logit-normal(-0.2, 1)", -0.2, 1.0), ("logit-normal(1, 0.5)", 1.0, 0.5)):
        logits = torch.logit(drawn[text].double())
        assert float(logits.mean()) == pytest.approx(mean, abs=0.03)
        assert float(logits.std()) == pytest.approx(deviation, rel=0.03)
    assert float(drawn["uniform"].mean()) == pytest.approx(0.5, abs=0.02)
    assert float(drawn["mine:early"].mean()) == pytest.approx(0.2, abs=0.02)


def test_other_times_train_another_student(code: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", "nfm", 0)
    options = [{}, {"times": "uniform"}, {"times": "mine:early"}]
    losses = {trained(tmp_path / f"{number}", store, **SIT, **more)["loss"] for number, more in enumerate(options)}
    assert len(losses) == 3


def test_an_objective_of_ones_own_is_sampled_by_its_own_sampler_whose_calls_are_counted(
    code: Path, tmp_path: Path
) -> None:
    trained(tmp_path / "out", objective="mine:objective", sampler="mine:sampler", **SIT)
    sampler = sampling.own_sampler(tmp_path / "out", "cpu", "float32")
    noise, labels = torch.randn(3, *SHAPE), torch.tensor([0, 1, 2])
    with torch.no_grad():
        images = sampler.decode(noise, labels)
        assert torch.equal(images, student.load(tmp_path / "out")(noise, torch.ones(3), labels))
    assert (sampler.name, sampler.sampler, sampler.taken) == ("student-nfm-own", "own", [1])
    with pytest.raises(Unfit, match="a sampler of its own and no velocity"):
        sampling.student_sampler(tmp_path / "out", 3, "cpu", "float32")
    with pytest.raises(Unfit, match="which has no guidance"):
        sampling.own_sampler(tmp_path / "out", "cpu", "float32", guidance=1.0)


def test_a_student_begins_with_anothers_weights(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", "nfm", 0)
    trained(tmp_path / "first", store, **SIT)
    still = {"learning_rate": 1e-6, "weight_decay": 0.0, "seed": 1}  # what comes out is what went in
    trained(tmp_path / "second", store, tmp_path / "first", **SIT, **still)
    trained(tmp_path / "third", store, **SIT, **still)
    first, second, third = (student.load(tmp_path / name).state_dict() for name in ("first", "second", "third"))
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
    assert not all(torch.allclose(first[name], third[name], atol=1e-4) for name in first)
    other = StudentConfig(**TINY, **SIT | {"width": 32}, init="student/ab")
    with pytest.raises(Unfit, match=r"student\.init = .*: it has width 16 there and 32 here; name a student of the"):
        student.fits_init(other, tmp_path / "first")
    student.fits_init(StudentConfig(**TINY, **SIT, init="student/ab"), tmp_path / "first")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mine:nothing"}, r"teacher\.model = 'mine:nothing': .*mine\.py has no function 'nothing'"),
        ({"model": "mine:net"}, r"teacher\.model = 'mine:net': its network, called as encode\(x, label\) .*'encode'"),
        ({"model": "mine:flow", "options": {"shift": 0.2}}, "decode is not the inverse of encode: .* an error of 0.2"),
        ({"model": "mine:hidden"}, "its parameters moved by 0.02: decode is not the inverse of encode"),
        ({"model": "mine:sums"}, r"log-determinant of encode: gave torch.float32 one value for two records; .*2"),
    ],
)
def test_a_flow_that_is_none_is_wrong_use_told_before_training(
    options: dict[str, Any], message: str, code: Path
) -> None:
    config = TeacherConfig(**options)
    with pytest.raises(Unfit, match=message):
        teacher.tries(config, {"image_shape": list(SHAPE), "classes": 3})
    teacher.tries(TeacherConfig(model="mine:flow"), {"image_shape": list(SHAPE), "classes": 3})


def test_a_teachers_old_fingerprint_stands_and_a_flow_of_ones_own_is_in_it(code: Path) -> None:
    assert not {"model", "options", "artifact"} & TeacherConfig(artifact="teacher/ab").semantic().keys()
    config = TeacherConfig(model="mine:flow")
    assert config.semantic()["model"] == "mine:flow"
    assert teacher.external(config) == {"model": atomic.hash_file(code)[0]}
    assert str(teacher.cost(config, {"image_shape": list(SHAPE)}, None)).startswith("360,064 images, no time or FLOPs")
    with pytest.raises(ValidationError, match=r"options are the keywords of teacher\.model, and there is none"):
        TeacherConfig(options={"shift": 1.0})


@pytest.mark.parametrize("section", [StudentConfig, TeacherConfig])
def test_labels_are_not_all_dropped(section: Any) -> None:
    """A model that has never seen a label would know no class, and nothing would say so."""
    with pytest.raises(ValidationError, match="less than 1"):
        section(label_drop=1.0)


@pytest.mark.parametrize("section", [StudentConfig, TeacherConfig])
def test_keywords_of_a_model_may_be_true_and_false_and_numbers_may_not(section: Any) -> None:
    options = {"causal": True, "sizes": [1, False]}
    assert section(model="mine:flow", options=options).options == options
    with pytest.raises(ValidationError, match="true and false are no value of this field"):
        section(batch_size=True)
    for odd in (float("nan"), [1.0, float("inf")]):  # a manifest, which is JSON, could not hold them
        with pytest.raises(ValidationError, match="no finite numbers; put a text in quotation marks"):
            section(model="mine:flow", options={"mode": odd})
