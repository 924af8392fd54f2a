"""A store from somebody else may come with code. Looking, auditing, planning, listing and exporting never run it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nfm.pipeline.cli import cli
from nfm.stages.couplings import custom
from nfm.storage.files import atomic

CONFIG = """
[data]
source = "digits"
limit = 80
heldout = 0.2
rows_per_shard = 64

[pairs]
coupling = "custom"
custom = "evilpkg.deep.mod:f"
rows_per_shard = 32
rows_per_block = 16
batch_size = 32
codec = "float32"
executor = "serial"
report = false

[compare]
couplings = ["independent", "custom"]
"""
PLANT = """
import os, pathlib
if "PLANTED" in os.environ:
    with open(os.environ["PLANTED"], "a") as file:
        file.write(__file__ + "\\n")
"""
FUNCTION = """
def f(images, labels, rng):
    return rng.standard_normal(images.shape, dtype="float32")
"""


def plant(folder: Path) -> None:
    """A package with code at its top, its parent, the module itself, and a sibling."""
    (folder / "evilpkg" / "deep").mkdir(parents=True)
    for name in ("evilpkg/__init__.py", "evilpkg/deep/__init__.py", "evilpkg/deep/sibling.py"):
        (folder / name).write_text(PLANT)
    (folder / "evilpkg/deep/mod.py").write_text(PLANT + FUNCTION)


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "evilpkg"]:
        del sys.modules[name]


class Visitor:
    """Somebody who was sent a folder with artifacts, and packages beside and in them, and stands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marks = folder / "planted.txt"
        (self.store,) = (folder / "artifacts/pairs").iterdir()

    def nfm(self, *arguments: object) -> str:
        forget()
        result = CliRunner().invoke(cli, list(map(str, arguments)))
        forget()
        return result.output + str(result.exception or "")

    def ran(self) -> list[str]:
        return self.marks.read_text().splitlines() if self.marks.exists() else []


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a custom coupling, made by the commands."""
    folder = tmp_path_factory.mktemp("sent")
    plant(folder)
    (folder / "run.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NFM_ARTIFACTS", str(folder / "artifacts"))
        result = CliRunner().invoke(cli, ["run", "pairs", "-c", "run.toml"])
        assert result.exit_code == 0, (result.output, result.exception)
        file, sha256 = folder / "evilpkg/deep/mod.py", custom.digest(folder / "evilpkg/deep/mod.py")
        assert f"runs the code of {file.resolve()}, SHA-256 {sha256}" in result.output
        forget()
    return folder


@pytest.fixture(params=["with its digest", "without a digest", "another module"])
def visitor(
    request: pytest.FixtureRequest, sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Visitor]:
    """What was sent, as it was made; with the digests taken out; and under the name of another module."""
    import shutil

    shutil.copytree(sent, tmp_path / "here")
    found = Visitor(tmp_path / "here")
    spec = atomic.read_json(found.store / "spec.json")
    manifest = atomic.read_json(found.store / "manifest.g0001.json")
    if request.param != "with its digest":
        spec["external"] = {}
        spec["store"]["coupling_options"].pop("sha256")
    if request.param == "another module":
        spec["config"]["custom"] = manifest["config"]["custom"] = "evilpkg.deep.sibling:f"
        spec["store"]["coupling_options"]["function"] = "evilpkg.deep.sibling:f"
    atomic.write_json(found.store / "spec.json", spec)
    atomic.write_json(found.store / "manifest.g0001.json", manifest)
    plant(found.store / "failed")  # where the store's own check passes over it, and an audit goes on
    plant(tmp_path / "on-the-path")
    monkeypatch.syspath_prepend(str(tmp_path / "on-the-path"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "on-the-path"))
    monkeypatch.setenv("NFM_ARTIFACTS", str(found.folder / "artifacts"))
    monkeypatch.setenv("PLANTED", str(found.marks))
    monkeypatch.chdir(found.folder)
    yield found
    forget()


def test_no_command_that_only_looks_runs_code_that_was_sent(visitor: Visitor) -> None:
    store, config = visitor.store, ("-c", "run.toml")
    for command in (
        ("plan", "pairs", *config),
        ("plan", "compare", *config),
        ("status", *config),
        ("ls",),
        ("lineage", store),
        ("audit", store, "--quick"),
        ("audit", store),
        ("audit", store, "--deep"),
        ("audit", "--quick", *config),
        ("audit", *config),
        ("pairs", "info", store),
        ("pairs", "head", store, "-n", 1),
        ("pairs", "verify", store),
        ("pairs", "verify", store, "--deep"),
        ("pairs", "export", store, visitor.folder / "exported"),
        ("gc", "--dry-run", *config),
        ("repair", store),
    ):
        said = visitor.nfm(*command)
        assert not visitor.ran(), (command, said)
    assert (visitor.folder / "exported" / "manifest.g0001.json").exists()  # they did their work
    digest = atomic.read_json(visitor.store / "spec.json")["store"]["coupling_options"].get("sha256")
    said = visitor.nfm("audit", store, "--deep")
    assert ("were not encoded again" if digest else "has no digest recorded") in said


@pytest.mark.parametrize("visitor", ["with its digest"], indirect=True)
def test_a_report_on_pairs_runs_no_code_that_was_sent(visitor: Visitor) -> None:
    assert "transport" in visitor.nfm("pairs", "report", visitor.store)
    assert not visitor.ran()


@pytest.mark.parametrize("visitor", ["with its digest"], indirect=True)
def test_a_deep_audit_runs_the_function_when_it_is_told_its_digest_or_given_the_config(visitor: Visitor) -> None:
    sha256 = custom.digest(visitor.folder / "evilpkg/deep/mod.py")
    said = visitor.nfm("audit", visitor.store, "--deep")
    assert "were not encoded again" in said
    assert "--run-custom" in said
    assert not visitor.ran()
    said = visitor.nfm("audit", visitor.store, "--deep", "--run-custom", "ab" * 32)
    assert "were not encoded again" in said
    assert not visitor.ran()
    for command in (("audit", visitor.store, "--run-custom", sha256), ("audit", "-c", "run.toml")):
        said = visitor.nfm(*command, "--deep")
        assert f"SHA-256 {sha256}" in said
        assert "runs the code of" in said
        assert "pairs bad" in said
        assert visitor.ran(), "else this file proves nothing"
        visitor.marks.unlink()
