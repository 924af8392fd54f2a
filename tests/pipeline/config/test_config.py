"""The config file: defaults, overrides, and errors that name the field and suggest the nearest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nfm.pipeline.builder import build
from nfm.pipeline.config import ConfigError, Override, RunConfig, load
from nfm.pipeline.runner.side_by_side import handed_over
from nfm.stages.pairs.config import PairsConfig

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.toml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_is_valid(path: Path) -> None:
    assert isinstance(load(path), RunConfig)


def test_what_a_file_leaves_out_keeps_its_default_and_overrides_win(tmp_path: Path) -> None:
    path = written(tmp_path, '[data]\nsource = "digits"\n[pairs]\ndraws = 2\n')
    assert load(path).pairs == PairsConfig(draws=2)
    overrides = [
        "pairs.draws=3",
        "pairs.coupling=independent",
        'data.path="a b"',
        "evaluate.nfe=[7, 5]",
        "pairs.flips=true",
    ]
    config = load(path, overrides)
    assert (config.pairs.draws, config.pairs.coupling, config.pairs.flips) == (3, "independent", True)
    assert config.data.path == "a b"
    assert config.evaluate.nfe == (7, 5)
    assert load(path, ["pairs.draws=3", "pairs.draws=5"]).pairs.draws == 5
    assert load(path, ["student.width=64"]).student.width == 64  # a section that the file does not have


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[data]\n[pairs]\ndraw = 2", "pairs.draw: unknown key; did you mean pairs.draws?"),
        ("[data]\n[pears]\ndraws = 2", "pears: unknown key; did you mean pairs?"),
        ("[data]\ndraws = 2", "data.draws: unknown key; did you mean pairs.draws?"),
        ("[[data]]", "data = [{}]: is a section; write [data] and its keys below"),
        ("[data]\nxyzzy = 2", "data.xyzzy: unknown key; known are source, path"),
        ("[data]\n[pairs]\ndraws = 0", "pairs.draws = 0"),
        ("[data]\n[pairs]\ndraws = 'two'", "pairs.draws = 'two'"),
        ("[data]\nsource = 'zip'", "data.source = 'zip'"),
        ("data = 3", "data = 3"),
        ("[pairs]", "data: missing"),
        ("[data", "not valid TOML"),
    ],
)
def test_an_error_names_the_file_the_field_and_the_nearest_key(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"config {path}: ")
    assert says in str(caught.value)


def test_a_wrong_value_is_blamed_on_the_option_or_the_file_that_has_it(tmp_path: Path) -> None:
    path = written(tmp_path, "[data]\nlimit = 0\n[student]\nlabel_drop = 0.0")
    for options, says in (
        (["pairs.draws=0"], ["--set pairs.draws=0: pairs.draws = 0: ", f"config {path}: data.limit = 0: "]),
        (["pairs.draw=2", "data.limit=3"], ["--set pairs.draw=2: pairs.draw: unknown key; did you mean pairs.draws?"]),
        (["teachr.seed=3", "data.limit=3"], ["--set teachr.seed=3: teachr: unknown key; did you mean teacher?"]),
        (
            ["data.limit=3", "evaluate.student_guidance=1.5"],
            [f"config {path} with --set data.limit=3, --set evaluate.student_guidance=1.5: evaluate.student_guidance"],
        ),
        (
            [Override('compare.couplings=["nmf"]', "--couplings nmf"), "data.limit=3"],
            ["--couplings nmf: compare.couplings"],
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load(path, options)
        lines = str(caught.value).splitlines()
        assert len(lines) == len(says), lines
        for line, start in zip(sorted(lines), sorted(says)):
            assert line.startswith(start)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[data]\n[evaluate]\nfeatures = "none"', 'evaluate.features = "none" compares values directly'),
        (
            '[data]\nsource = "images"\nimage_size = 8\n[evaluate]\nfeatures = "none"',
            'images of data.source = "images" have 192',
        ),
        (
            '[data]\nsource = "gaussians"\npoints = 9\n[evaluate]\nfeatures = "inception"',
            'takes pictures, data.source = "gaussians" has points',
        ),
        ("[data]\n[student]\nlabel_drop = 0.0\n[evaluate]\nstudent_guidance = 1.5", "set student.label_drop = 0.1"),
        (
            '[data]\nsource = "checkerboard"\npoints = 9\n[evaluate]\nstudent_guidance = 1.5',
            "evaluate.student_guidance = 1.5: points of the plane have no classes",
        ),
    ],
)
def test_an_impossible_evaluation_is_refused_before_anything_is_trained(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"config {path}: evaluate.")
    assert says in str(caught.value)


def test_sections_that_fit_each_other_are_taken(tmp_path: Path) -> None:
    for text in (
        '[data]\nsource = "gaussians"\npoints = 9\n[evaluate]\nfeatures = "none"',
        '[data]\naverage = 4\n[evaluate]\nfeatures = "none"',
        '[data]\nsource = "npz"\n[evaluate]\nfeatures = "none"',  # what the arrays hold, the data stage finds out
        "[data]\n[evaluate]\nstudent_guidance = 1.5",
    ):
        assert isinstance(load(written(tmp_path, text)), RunConfig)


def test_weights_that_are_missing_stop_an_evaluation_before_its_students_are_trained(tmp_path: Path) -> None:
    path = written(tmp_path, '[data]\n[evaluate]\nfeatures = "inception"')
    weights = f"evaluate.inception_weights={tmp_path / 'weights.pth'}"
    for target in ("evaluate", "report", "compare"):
        with pytest.raises(ConfigError, match=r"needs evaluate\.inception_weights"):
            build(load(path), target=target)
        with pytest.raises(ConfigError, match="there is no such file"):
            build(load(path, [weights]), target=target)
    assert "student" in build(load(path), target="student"), "a machine that evaluates nothing needs no weights"
    (tmp_path / "weights.pth").write_bytes(b"some")
    nodes = build(load(path, [weights]), target="evaluate")
    assert "features" not in nodes, "distances are taken in Inception's features alone"
    assert set(nodes["evaluate"].inputs) == {"data", "student", "teacher"}


def test_a_config_is_checked_without_torch(tmp_path: Path) -> None:
    path = written(tmp_path, '[data]\n[evaluate]\nnfe = [8, 4]\nsolver = "rk4"\nbaselines = ["nfm:soften=0.5"]')
    code = (
        "import sys; from nfm.pipeline import builder, config; "
        f"builder.build(config.load({str(path)!r}), target='report'); "
        "print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_every_problem_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "[data]\nsede = 1\n[pairs]\ndraws = 0\n[student]\nwidht = 3")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert all(part in str(caught.value) for part in ("data.seed?", "pairs.draws = 0", "student.width?"))


@pytest.mark.parametrize("override", ["pairs.draws", "draws=3", "=3", "pairs.=3", ".draws=3", "a..c=3"])
def test_an_override_of_another_form_is_shown_the_right_one(tmp_path: Path, override: str) -> None:
    path = written(tmp_path, "[data]")
    with pytest.raises(ConfigError, match=r"write section.key=value, for instance pairs.draws=4"):
        load(path, [override])


def test_an_override_sets_one_word_of_a_table(tmp_path: Path) -> None:
    path = written(
        tmp_path, '[data]\nsource = "digits"\n[student]\nmodel = "mine:net"\noptions = {width = 2, depth = 3}'
    )
    config = load(path, ["student.options.width=4", "student.options.times.kind=uniform"])
    assert config.student.options == {"width": 4, "depth": 3, "times": {"kind": "uniform"}}
    for override, said in (
        ("data.source.x=1", "data.source is no table: the config says 'digits'"),
        ("pairs.draws.x=1", "--set pairs.draws.x=1: pairs.draws = .*valid integer"),
        ("teacher.options.x=1", r"teacher.options.x=1: teacher: .*there is none: name it as `module:function`"),
        ("a.b.c=3", "a: unknown key"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(path, [override])


def test_a_missing_file_suggests_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"config configs/digit.toml: no such file$"):
        load("configs/digit.toml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/digits.toml").write_text("[data]")
    with pytest.raises(ConfigError, match=r"did you mean configs/digits.toml\?"):
        load("configs/digit.toml")
    with pytest.raises(ConfigError, match=r"there are configs/digits.toml"):
        load("/elsewhere.json")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_that_is_handed_to_another_process_arrives_as_it_was(path: Path) -> None:
    config = load(path, ["student.ema=0.99", "compare.seeds=[0, 1]"])
    arrived = RunConfig.model_validate(json.loads(json.dumps(handed_over(config))))
    assert arrived == config
    for name in RunConfig.model_fields:
        assert getattr(arrived, name).model_fields_set == getattr(config, name).model_fields_set
