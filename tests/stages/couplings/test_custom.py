"""A coupling that is a function of your own: recorded by its digest, checked on workers, refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from nfm.stages.base import StageError, Unfit
from nfm.stages.couplings import custom
from nfm.stages.encoding.encoder import Encoder
from nfm.stages.executors.jobs import Job
from nfm.stages.pairs import stage
from nfm.stages.stores import audit
from nfm.storage.files import atomic
from tests.stages.pairs.shop import CUSTOM, ROWS, Shop, all_of


def test_a_custom_coupling_is_recorded_with_the_digest_of_its_file(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:noise")
    store = shop.make(config)
    sha256 = atomic.hash_file(shop.root / "own_couplings.py")[0]
    assert store.spec.coupling_options == {"function": "own_couplings:noise", "sha256": sha256}
    assert stage.external(config) == {"custom": sha256}
    assert stage.external(shop.config(coupling="independent", custom="own_couplings:noise")) == {}


def test_another_file_on_a_worker_is_refused(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:noise")
    store = shop.make(config)
    setup = stage.setup(config, shop.of(config), Path(store.root))
    (shop.root / "own_couplings.py").write_text(CUSTOM.replace("0.2", "0.3"))
    with pytest.raises(StageError, match="not the file that was recorded"):
        Encoder(setup)
    assert shop.audit(store, "default") == []  # the pairs are as they were
    assert "its pairs cannot be made again" in shop.audit(store)[0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("short", "returned noise of 63x1x6x6 for images of 64x1x6x6"),
        ("whole", "returned noise of dtype int64; return float32"),
        ("endless", "returned 2304 values that are not finite"),
        ("listed", "returned a list; return a numpy array"),
    ],
)
def test_a_result_that_is_not_noise_is_refused_with_the_functions_name(shop: Shop, function: str, said: str) -> None:
    config = shop.config(coupling="custom", custom=f"own_couplings:{function}")
    encoder = Encoder(stage.setup(config, shop.of(config), shop.begin(config)))
    with pytest.raises(ValueError, match=f"own_couplings:{function}.*{said}"):
        encoder.encode_shard(Job("d000-s00000", "a1"))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", "own_couplings:broken.*raised AttributeError"),
        ("leaves", "own_couplings:leaves.*raised SystemExit"),
        ("forgetful", r"gave other noise: 2,304 of 2,304 values differ.*from the generator that it is given"),
    ],
)
def test_a_function_that_fails_is_named_and_so_is_one_that_gives_other_noise_when_called_again(
    shop: Shop, function: str, said: str
) -> None:
    config = shop.config(coupling="custom", custom=f"own_couplings:{function}")
    encoder = Encoder(stage.setup(config, shop.of(config), shop.begin(config)))
    with pytest.raises(StageError, match=said):
        encoder.encode_shard(Job("d000-s00000", "a1"))


def test_why_all_shards_failed_is_said_once_and_once_at_the_end(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:broken")
    with pytest.raises(StageError) as failed:
        stage.run(config, shop.of(config), shop.begin(config), shop.heard)
    why = "pairs.custom = 'own_couplings:broken': the function raised AttributeError"
    assert sum(why in said for said in shop.heard.said) == 1
    assert str(failed.value).count(why) == 1
    assert "d000-s00000, d000-s00001, d000-s00002, d000-s00003, d001-s00000 and 3 more (pairs.custom" in str(
        failed.value
    )


def test_a_module_that_runs_no_longer_is_a_finding_of_a_deep_audit(shop: Shop) -> None:
    beside = shop.root / "beside_own_couplings.py"
    beside.write_text("ZERO = 0.0\n")
    store = shop.make(shop.config(coupling="custom", custom="own_couplings:late"))
    assert shop.audit(store) == [], "what is imported inside of the function is found, too"
    beside.write_text("raise KeyError('no')\n")
    sys.modules.pop("beside_own_couplings", None)
    assert "its pairs cannot be made again: pairs.custom = 'own_couplings:late'" in shop.audit(store)[0]


def test_a_recipe_with_another_custom_digest_than_the_fingerprints_is_found(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:noise")
    store = shop.make(config)
    path = Path(store.root) / "spec.json"
    spec = {**atomic.read_json(path), "external": stage.external(config)}
    atomic.write_json(path, spec)
    assert shop.audit(store, "default") == []
    spec["store"]["coupling_options"]["sha256"] = "ab" * 32
    atomic.write_json(path, spec)
    assert "its recipe is not the one that its inputs give" in shop.audit(store, "default")[0]


def test_a_function_that_writes_into_its_arguments_harms_nothing(shop: Shop) -> None:
    store = shop.make(shop.config(coupling="custom", custom="own_couplings:mischief"))
    records = all_of(store)
    np.testing.assert_array_equal(records["label"], shop.source.labels(np.arange(ROWS)))
    np.testing.assert_array_equal(records["image"], shop.source.images(np.arange(ROWS)))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (None, r"name one"),
        ("own_couplings", r"name one"),
        ("own_couplings:", r"name one"),
        ("no_such_module:noise", "there is no module no_such_module"),
        ("no_such.module:noise", r"there is no module no_such\.module"),
        ("os:system", "os is a part of Python itself"),
        ("sys:exit", "sys is a part of Python itself"),
    ],
)
def test_a_module_that_is_not_there_is_told_before_anything_begins(shop: Shop, named: str | None, said: str) -> None:
    with pytest.raises(StageError, match=rf"pairs\.custom = .*{said}"):
        stage.describe(shop.config(coupling="custom", custom=named), shop.inputs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def noise(images, labels, rng):", "is no Python"),
        ("def nois(images, labels, rng): ...", r"has no function 'noise' \(did you mean 'nois'\?\)"),
        ("import numpy\nrng = numpy.random.default_rng(0)", "has no function 'noise'; define it"),
        ("def other():\n    def noise(images, labels, rng): ...", "has no function 'noise'"),
        ("noise = 5", "noise in .* is 5, no function"),
        ("noise: list = [1, 2]\nnoise = 'text'", "is 'text', no function"),
        ("def noise(images): ...", r"takes \(images\); it is called with \(images, labels, rng\)"),
        ("def noise(images, labels, rng, more): ...", r"takes \(images, labels, rng, more\)"),
        ("def noise(images, labels, rng, *, more): ...", "it is called with"),
    ],
)
def test_a_function_that_cannot_be_called_is_told_before_anything_begins_and_nothing_is_run(
    shop: Shop, text: str, said: str
) -> None:
    (shop.root / "own_other.py").write_text(f"raise SystemExit('run')\n{text}\n", encoding="utf-8")
    with pytest.raises(Unfit, match=rf"pairs\.custom = 'own_other:noise': .*{said}"):
        stage.fits(shop.config(coupling="custom", custom="own_other:noise"), {})


@pytest.mark.parametrize(
    "text",
    [
        "def noise(images, labels, rng): ...",
        "def noise(*arguments): ...",
        "def noise(images, labels, rng, more=1, *, one=2): ...",
        "import functools\nnoise = functools.partial(print)",
        "from elsewhere import noise",
        "from elsewhere import *",
        "from elsewhere import other as noise",
        "try:\n    from elsewhere import noise\nexcept ImportError:\n    noise = None",
        "class noise: ...",
        "noise = None\nif True:\n    from elsewhere import noise",
        "if True:\n    def noise(images, labels, rng): ...",
        "globals()['noise'] = print",
    ],
)
def test_a_function_that_may_be_there_is_left_to_be_loaded(shop: Shop, text: str) -> None:
    (shop.root / "own_other.py").write_text(text, encoding="utf-8")
    stage.fits(shop.config(coupling="custom", custom="own_other:noise"), {})


def test_a_function_that_is_not_there_after_all_is_told(shop: Shop) -> None:
    (shop.root / "own_other.py").write_text("from own_couplings import *", encoding="utf-8")
    config = shop.config(coupling="custom", custom="own_other:nothing")
    with pytest.raises(Unfit, match="has no function 'nothing'"):
        Encoder(stage.setup(config, shop.of(config), shop.begin(config)))


def test_a_module_is_found_through_packages_of_every_kind_and_nothing_of_them_is_run(shop: Shop) -> None:
    plain, spaces = shop.root / "own_couplings_package", shop.root / "own_couplings_spaces"
    for package in (plain, plain / "inner"):
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('run')\n")
    (plain / "inner" / "ours.py").write_text("raise SystemExit('run')\n")
    (spaces / "inner").mkdir(parents=True)  # no __init__.py
    (spaces / "inner" / "ours.py").write_text("raise SystemExit('run')\n")
    for package in (plain, spaces):
        named = f"{package.name}.inner.ours:noise"
        assert custom.source_file(named) == (package / "inner" / "ours.py").resolve()
    assert custom.source_file("own_couplings_package.inner:noise") == (plain / "inner" / "__init__.py").resolve()
    assert not [name for name in sys.modules if name.startswith("own_couplings_")]


def test_whose_code_runs_is_said_once_before_it_runs(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:noise")
    file = (shop.root / "own_couplings.py").resolve()
    told = custom.announced(str(file), "own_couplings:noise", custom.digest(file))
    assert str(file) in told
    assert custom.digest(file) in told
    store = shop.make(config)
    assert shop.heard.said.count(told) == 1
    assert shop.audit(store) == []
    assert shop.heard.said.count(told) == 2
    shop.make(shop.config(coupling="independent"), "other")
    assert sum("runs the code" in said for said in shop.heard.said) == 2


def test_an_audit_runs_no_function_that_it_was_not_told_to_run(shop: Shop) -> None:
    store = shop.make(shop.config(coupling="custom", custom="own_couplings:noise"))
    (shop.root / "own_couplings.py").write_text("raise SystemExit('run')\n")
    for allowed in (custom.NOBODYS, custom.Allowed(frozenset({"ab" * 32}))):
        found, said = audit.audit(shop.inputs, Path(store.root), "deep", 60, allowed)
        assert found == []
        assert "were not encoded again" in said[0]
        assert "--run-custom" in said[0]
        assert str((store.spec.coupling_options or {})["sha256"]) in said[0]


def test_a_store_that_records_no_digest_of_its_function_is_refused_by_name(shop: Shop) -> None:
    store = shop.make(shop.config(coupling="custom", custom="own_couplings:noise"))
    path = Path(store.root) / "spec.json"
    spec = atomic.read_json(path)
    del spec["store"]["coupling_options"]["sha256"]
    atomic.write_json(path, spec)
    with pytest.raises(StageError, match=r"own_couplings:noise' has no digest recorded"):
        shop.audit(store, "default")


def test_a_custom_coupling_of_a_package_imports_its_neighbours(shop: Shop) -> None:
    package = shop.root / "own_couplings_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scale.py").write_text("HALF = 0.05\n")
    code = "def noise(images, labels, rng):\n    return HALF + rng.standard_normal(images.shape)"
    (package / "ours.py").write_text(f"from .scale import HALF\n\n{code}\n")
    store = shop.make(shop.config(coupling="custom", custom="own_couplings_package.ours:noise"))
    assert abs(store.manifest["moments"]["mean"] - 0.05) < 0.02


def test_a_search_leaves_pythons_path_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder may stand first there already, and must not come behind others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = list(sys.path)
    (tmp_path / "own_here.py").write_text("def noise(images, labels, rng): ...", encoding="utf-8")
    assert custom.source_file("own_here:noise") == tmp_path / "own_here.py"
    assert sys.path == before
