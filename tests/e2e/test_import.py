"""A teacher that its authors' code saved: imported, encoded with, audited deep; wrong files leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.stages.trained import teacher
from nfm.storage import ImageDataset
from nfm.storage.files import atomic
from tests.support.authors_tarflow import Model, random
from tests.support.lab import Lab

NAME = "digits_model_2_64_2_1_0.15.pth"


@pytest.fixture
def published(empty: Lab) -> Lab:
    """The data, and a checkpoint of random weights whose noise is moved to a mean of 0, as training does."""
    empty.run("data")
    torch.manual_seed(0)
    flow = random(Model(1, 8, 2, 64, 2, 1, classes=10))
    source = ImageDataset.open(empty.only("data").path, "train")
    x = torch.from_numpy(source.to_float(source.images(np.arange(200))))
    with torch.no_grad():
        for _ in range(8):
            z, _ = flow(x, torch.from_numpy(source.labels(np.arange(200))))
            flow.blocks[1].proj_out.bias[4:] += z.mean((0, 1))  # the second half: shifts
    torch.save(flow.state_dict(), empty.folder / NAME)
    return empty


def test_an_imported_teacher_encodes_and_its_pairs_are_audited_deep(published: Lab) -> None:
    lab = published
    said = lab.nfm("teacher", "import", NAME, "-c", "tiny.toml")
    artifact = lab.only("teacher")
    assert Path(said.stdout.strip()) == artifact.path
    assert f'section [teacher]: artifact = "{lab.name("teacher")}"' in said.stderr
    assert "the file's classes must be in the data's order: 0 = 0, 1 = 1, 2 = 2, ... to 9 = 9" in said.stderr

    model, facts = teacher.load(artifact.path)
    theirs = Model(1, 8, 2, 64, 2, 1, classes=10)
    theirs.load_state_dict(torch.load(lab.folder / NAME, weights_only=True))
    source = ImageDataset.open(lab.only("data").path, "train")
    x = torch.from_numpy(source.to_float(source.images(np.arange(32)))).double()
    y = torch.from_numpy(source.labels(np.arange(32)))
    with torch.no_grad():
        (z, logdet), (own, own_logdet) = theirs.double()(x, y), model.double().encode(x, y)
    assert (theirs.image(z) - own).abs().max() < 1e-12
    assert (logdet - own_logdet).abs().max() < 1e-12
    assert facts["eta"] == 0.15
    assert facts["sigma_f"] == pytest.approx(float(own.square().mean().sqrt()), rel=0.2)

    body = artifact.manifest()
    assert body["imported"] == {
        "file": NAME,
        "sha256": atomic.hash_file(lab.folder / NAME)[0],
        "bytes": (lab.folder / NAME).stat().st_size,
    }
    assert f"imported from {NAME}, SHA-256" in lab.nfm("lineage", lab.name("teacher")).stdout
    again = lab.nfm("teacher", "import", NAME, "-c", "tiny.toml")
    assert "is up to date" in again.stderr

    own_teacher = f"teacher.artifact={lab.name('teacher')}"
    (lab.folder / NAME).unlink()  # what was imported needs its file no more
    lab.run("pairs", own_teacher, "pairs.draws=1")
    assert len(lab.all("teacher")) == 1, "nothing was trained"
    assert lab.only("pairs").spec["inputs"]["teacher"]["artifact"] == lab.name("teacher")
    assert lab.only("pairs").spec["store"]["eta"] == 0.15
    report = lab.nfm("audit", lab.name("pairs"), "--deep", "--sample", 40)
    assert "0 of 40 pairs bad" in report.stdout
    plan = lab.nfm("plan", "student", "-c", "tiny.toml", "--set", own_teacher, "--set", "pairs.draws=1")
    assert "teacher" in plan.stdout
    lab.nfm("sample", lab.name("teacher"), "-n", 2, "-o", "grid.png", "--guidance", 1)


def test_a_teacher_of_other_data_is_refused(published: Lab) -> None:
    published.nfm("teacher", "import", NAME, "-c", "tiny.toml")
    name = published.name("teacher")
    data = published.name("data")
    said = published.run("pairs", f"teacher.artifact={name}", "data.limit=200", exits=2)
    assert f"teacher.artifact = {name}: it was made with the data of {data}" in said.stderr
    said = published.run("pairs", f"teacher.artifact={data}", exits=2)
    assert "no finished teacher; `nfm ls` lists what there is" in said.stderr


def flow(**changes: Any) -> Model:
    return Model(**{"image_channels": 1, "side": 8, "patch": 2, "channels": 64, "blocks": 2, "layers": 1} | changes)


WRONG: dict[str, tuple[str, Any, list[str], str]] = {
    "missing": ("none.pth", None, [], "no such file; name a checkpoint of a TarFlow"),
    "folder": (".", None, ["--eta", "0.1"], "a folder; name the checkpoint in it"),
    "text": (NAME, b"hello", [], "no file of torch.save; name the checkpoint of the model"),
    "no eta": ("flow.pth", flow(), [], "its name does not tell the noise that it was trained with"),
    "other name": ("x_model_4_64_2_1_0.15.pth", flow(), [], "its name says patch, channels, blocks and layers 4, 64"),
    "uniform": ("x_model_2_64_2_1_uniform.pth", flow(), [], "by its name it was trained with noise uniform"),
    "optimizer": (NAME, {"optimizer": {}, "step": 3}, [], "holds more than named tensors"),
    "another model": (NAME, torch.nn.Linear(2, 2), [], "it has no tensor blocks.0.proj_in.weight"),
    "classes": ("f.pth", flow(classes=3), ["--eta", "0.1"], "a flow of 3 classes; the data has 10"),
    "images": ("f.pth", flow(side=16), ["--eta", "0.1"], "for instance images 1x16x16; the data's images are 1x8x8"),
    "heads": ("f.pth", flow(), ["--eta", "0.1", "--head-size", "48"], "channels = 64 is not a multiple of head_size"),
}


def test_wrong_files_are_refused_in_a_line_and_leave_nothing_behind(empty: Lab) -> None:
    empty.run("data")
    before = sorted(path for path in empty.artifacts.rglob("*") if path.is_file())
    for name, content, options, message in WRONG.values():
        path: Path = empty.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content.state_dict() if isinstance(content, torch.nn.Module) else content, path)
        said = empty.nfm("teacher", "import", name, "-c", "tiny.toml", *options, exits=2)
        assert message in said.stderr
        assert len(said.stderr.splitlines()) == 1
    assert sorted(path for path in empty.artifacts.rglob("*") if path.is_file()) == before
    assert not (empty.artifacts / "teacher").exists()
