"""The config file: defaults, overrides, and errors that name the field and suggest the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfm.pipeline.config import ConfigError, RunConfig, load
from nfm.stages.pairs import PairsConfig

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))


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


def test_every_problem_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "[data]\nsede = 1\n[pairs]\ndraws = 0\n[student]\nwidht = 3")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert all(part in str(caught.value) for part in ("data.seed?", "pairs.draws = 0", "student.width?"))


@pytest.mark.parametrize("override", ["pairs.draws", "draws=3", "=3", "pairs.=3", ".draws=3", "a.b.c=3"])
def test_an_override_of_another_form_is_shown_the_right_one(tmp_path: Path, override: str) -> None:
    path = written(tmp_path, "[data]")
    with pytest.raises(ConfigError, match=r"write section.key=value, for instance pairs.draws=4"):
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
