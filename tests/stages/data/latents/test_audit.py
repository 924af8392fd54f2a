"""An audit compares latents with their data row by row, encodes some again, and runs nobody's code unasked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nfm.stages.couplings.custom import Allowed
from nfm.stages.data.latents import shards
from nfm.stages.data.latents.audit import audit
from nfm.stages.trained.foreign import vae
from nfm.storage.dataset.writer import DatasetWriter
from nfm.storage.files import atomic
from tests.stages.data.latents.small import ROWS, make, write_data


@pytest.fixture
def out(place: Path, data: Path) -> Path:
    make(place / "out", data, options={"std": 0.1}, mirrors=True)
    (place / "ran.txt").unlink()
    return place / "out"


def allowed(place: Path, said: list[str]) -> Allowed:
    return Allowed(frozenset({atomic.hash_file(place / "mine_vae.py")[0]}), said.append)


def test_its_latents_are_encoded_again_where_their_code_may_run(place: Path, data: Path, out: Path) -> None:
    assert audit({"data": data}, out, "default", 300) == ([], [])
    findings, (statement,) = audit({"data": data}, out, "deep", 300)
    assert not findings
    assert "give --run-custom with it" in statement
    assert not (place / "ran.txt").exists(), "nobody's code runs unasked"

    said: list[str] = []
    findings, (statement,) = audit({"data": data}, out, "deep", 300, allowed(place, said))
    assert not findings
    assert statement.startswith(f"0 of {2 * ROWS} latents bad: at most {3 / (2 * ROWS):.2%} with 95 % confidence")
    assert said[0].startswith("latents.vae = 'mine_vae:vae' runs the code of")


def rewrite(out: Path, data: Path, change: str) -> None:
    """The artifact's rows written anew, with something changed that its digests would not tell."""
    facts = vae.read_facts(out)
    images = shards.Images(data, facts)
    (out / "dataset.json").unlink()
    writer = DatasetWriter(out, "small latents", facts.latent_shape, ["even", "odd"], 5, shards.DTYPE)
    encoder = shards.LatentEncoder(out, data, "cpu")
    for split in shards.SPLITS:
        rows = np.arange(images.rows(split))
        parts = [encoder.latents(split, rows[start : start + 3]) for start in range(0, len(rows), 3)]
        latents, labels, keys = np.concatenate(parts).astype(shards.DTYPE), images.labels(split, rows), rows
        names, captions = images.keys(split, keys), images.captions(split, rows)
        if change == "latent" and split == "train":
            latents[[0, 1]] = latents[[1, 0]]
        if change == "labels":
            labels = 1 - labels
        if change == "keys":
            names = names[::-1]
        if change == "captions":
            captions = None
        if change == "rows":
            latents, labels, names, captions = latents[1:], labels[1:], names[1:], captions[1:]  # type: ignore[index]
        writer.write_split(split, len(names), [(latents, labels, names)], captions)
    writer.close()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("latent", "row 0 is not the latent that its VAE makes of its image"),
        ("labels", "its labels are not those of the data"),
        ("keys", "its keys are not those of the data"),
        ("captions", "its captions are not those of the data"),
        ("rows", f"train has {2 * ROWS - 1} rows, the data gives {2 * ROWS}"),
    ],
)
def test_rows_that_are_not_of_their_data_are_found(
    place: Path, data: Path, out: Path, change: str, problem: str
) -> None:
    rewrite(out, data, change)
    findings, _ = audit({"data": data}, out, "deep", 300, allowed(place, []))
    assert findings[0].problem == problem
    assert "run the latents stage again" in findings[0].remedy
    assert len(findings) == 2


def test_latents_that_depend_on_the_images_beside_them_are_found_also_where_all_rows_are_looked_at(
    place: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ("class V:", " encode = staticmethod(lambda x: x - x.mean())", " decode = staticmethod(lambda x: x)",
            "def vae(shape): return V()")  # fmt: skip
    (place / "mine_vae.py").write_text("\n".join(code))
    monkeypatch.setattr(vae, "check", lambda made, images, _: tuple(made.encode(images).shape[1:]))  # as if it passed
    make(place / "out", data, batch_size=5)
    findings, _ = audit({"data": data}, place / "out", "deep", 300, allowed(place, []))
    assert findings
    assert "a latent depends on the images that are encoded beside it: mend the VAE" in findings[0].remedy


def test_other_weights_of_the_same_code_are_told(place: Path, data: Path, out: Path) -> None:
    facts = vae.read_facts(out).model_dump(mode="json")
    atomic.write_json(out / vae.FACTS, facts | {"state": "0" * 64})
    (finding,), _ = audit({"data": data}, out, "deep", 300, allowed(place, []))
    assert "the weights that it loads are not those that made the latents" in finding.problem
    atomic.write_json(out / vae.FACTS, facts)
    (place / "mine_vae.py").write_text((place / "mine_vae.py").read_text() + "\n")
    old = Allowed(frozenset({facts["sha256"]}))
    (finding,), _ = audit({"data": data}, out, "deep", 300, old)
    assert (
        f"not the file that was recorded: latents.vae = 'mine_vae:vae' was of SHA-256 {facts['sha256']}"
        in finding.problem
    )
    assert f"this one is of {atomic.hash_file(place / 'mine_vae.py')[0]}" in finding.problem


def test_data_that_is_not_there_is_told_by_the_lineage_alone(out: Path) -> None:
    assert audit({}, out, "deep", 300) == ([], [])


def test_data_with_other_captions_is_found(place: Path, out: Path) -> None:
    other = write_data(place / "other", captions=False)
    findings, _ = audit({"data": other}, out, "default", 300)
    assert [finding.problem for finding in findings] == ["its captions are not those of the data"] * 2
