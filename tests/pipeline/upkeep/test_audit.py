"""What the audit proves, in this process: identity, files, lineage and the store against its source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nfm.pipeline.artifacts.artifact import Artifact
from nfm.pipeline.config import load
from nfm.pipeline.upkeep.audit import as_text, audit, finished
from nfm.stages.stores.audit import against_source
from nfm.storage.dataset.images import ImageDataset
from nfm.storage.dataset.writer import DatasetWriter
from nfm.storage.files import atomic
from nfm.storage.ledger import seal

if TYPE_CHECKING:
    from tests.conftest import Lab


def problems(*targets: Artifact) -> list[str]:
    return [f"{finding.file}: {finding.problem}" for result in audit(targets) for finding in result.findings]


def rewrite(path: Path, **changes: Any) -> None:
    """Change a JSON file and sign it anew, as one who wants to deceive would."""
    body = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.unlink()
    assert atomic.create_json(path, body)


def test_what_a_config_has_finished_is_audited_inputs_first(lab: Lab, root: Path) -> None:
    lab.drop("student", "evaluate", "report")
    results = audit(finished(load(lab.config)))
    assert [result.artifact.split("/")[0] for result in results] == ["data", "features", "teacher", "pairs", "pairs"]
    assert not [finding for result in results for finding in result.findings]
    assert all(result.files and result.bytes for result in results)
    assert as_text(results).count("clean") == 5


def test_a_spec_that_was_signed_anew_has_another_fingerprint(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher")
    rewrite(teacher.path / "spec.json", config={**teacher.spec["config"], "eta": 0.5})
    assert any("the fingerprint is not the one of its spec and folder" in text for text in problems(teacher))


def test_a_file_swapped_with_its_entry_in_the_manifest_has_another_content_digest(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher")
    body = teacher.manifest()
    entry = body["files"][0]
    (teacher.path / entry["path"]).write_bytes(b"other weights")
    entry.update(sha256=atomic.digest(b"other weights"), bytes=13)
    rewrite(teacher.path / "manifest.json", files=body["files"])
    assert any("the content digest is not the one of its payload files" in text for text in problems(teacher))


def test_a_moved_artifact_is_not_what_its_folder_says(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher")
    shutil.copytree(teacher.path, teacher.path.with_name("0123456789ab"))
    moved = Artifact(teacher.path.with_name("0123456789ab"))
    assert any("the fingerprint is not the one of its spec and folder" in text for text in problems(moved))


def test_a_missing_input_is_named_and_the_rest_is_still_checked(lab: Lab, root: Path) -> None:
    student, teacher = lab.only("student"), lab.name("teacher")
    lab.drop("teacher")
    weights = student.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = problems(student)
    assert any(f"input teacher, {teacher}/manifest.json, is missing" in text for text in found)
    assert any(str(weights) in text for text in found)


@pytest.mark.parametrize("what", ["images", "labels"])
def test_pairs_that_are_not_of_their_source_are_found(lab: Lab, root: Path, what: str) -> None:
    """The data is replaced by data that is sound in itself, under the old one's name and digests."""
    folder = lab.only("data").path
    splits = {name: ImageDataset.open(folder, name) for name in ("train", "heldout")}
    content: dict[str, list[Any]] = {
        name: [
            split.images(np.arange(len(split))),
            split.labels(np.arange(len(split))),
            split.keys(np.arange(len(split))),
        ]
        for name, split in splits.items()
    }
    classes = splits["train"].classes
    if what == "images":
        content["train"][0] = np.roll(content["train"][0], 1, axis=0)
    else:
        content["train"][1] = np.roll(content["train"][1], 1)
    for name in ("train", "heldout", "dataset.json", "train.parquet", "heldout.parquet", "rejected.parquet"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    writer = DatasetWriter(folder, "digits", (1, 8, 8), classes, 128)
    for name, (images, labels, keys) in content.items():
        writer.write_split(name, len(keys), [(images, labels, keys)])
    writer.close()
    store = lab.only("pairs").path
    found = against_source(seal.load(store, seal.numbers(store)[-1]), {"data": folder})
    assert any(f"{what} are not those of its source" in finding.problem for finding in found)


def test_the_state_of_a_finished_training_may_be_left_out_as_a_whole(lab: Lab, root: Path) -> None:
    student = lab.only("student")
    (*_, result) = audit([student])
    assert not result.findings
    state = next((student.path / "checkpoints").iterdir())
    (state / "state.json").unlink()
    (*_, result) = audit([student])
    assert [finding.file for finding in result.findings] == [str(state / "state.json")]
    shutil.rmtree(student.path / "checkpoints")
    (*_, result) = audit([student])
    assert not result.findings
    assert result.statements == ["its state of training was left out, which nothing that is finished needs"]


def test_a_receipt_tells_level_findings_and_when(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher")
    (teacher.path / "samples.png").unlink()
    audit([teacher], "quick")
    receipts = list((teacher.path / "audits").glob("*-quick.json"))
    assert len(receipts) == 1
    body = atomic.read_json(receipts[0])
    assert body["level"] == "quick"
    assert body["findings"][0]["file"] == str(teacher.path / "samples.png")
    assert body["findings"][0]["problem"] == "missing"


def test_an_unfinished_artifact_is_a_finding(lab: Lab, root: Path) -> None:
    student = lab.only("student")
    (student.path / "manifest.json").unlink()
    assert problems(student) == [f"{student.path}: not finished: it has no manifest.json"]


def test_a_file_that_cannot_be_read_is_named_once(lab: Lab, root: Path) -> None:
    manifest = lab.only("teacher").path / "manifest.json"
    manifest.write_text("{")
    (text,) = problems(lab.only("teacher"))
    assert text.count(str(manifest)) == 1
    assert text.startswith(f"{manifest}: not valid JSON")
