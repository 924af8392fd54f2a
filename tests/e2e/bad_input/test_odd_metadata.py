"""Whatever stands in the place of a file of metadata, every command that reads ends soon, and in little memory.

A pipe, a device without an end, a link to a file elsewhere, a folder, more bytes than such a file may have: the
command names it, or does without it. The commands run in forked children (tests/storage/fuzz/sandbox.py), which may not
hang, grow, or open a file outside of the folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click import ClickException

from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError
from nfm.pipeline.artifacts.lock import Held, Lock
from nfm.pipeline.cli import cli
from nfm.pipeline.console.progress import figures
from nfm.stages.base import StageError
from nfm.stages.executors.outcomes import reasons
from nfm.stages.report import sections
from nfm.stages.report.evaluation import Evaluation
from nfm.stages.trained.weights import read_weights
from nfm.storage import ImageDataset, PairStore
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.small_files import MOST_STATE_BYTES
from nfm.storage.ledger import seal, shard_list
from nfm.storage.ledger.row_fields import write_row_field
from nfm.trainers import checkpoint  # noqa: F401  imported once, before the children are forked
from tests.storage.fuzz import sandbox
from tests.support.sizes import FULL

if TYPE_CHECKING:
    from tests.conftest import Lab

SECONDS = 60.0  # of a busy machine; one that waits for a pipe, or reads a device, never ends
SLOW = ("audit -c", "status", "pairs export", "repair")
FILES = (
    "data/*/spec.json",
    "data/*/manifest.json",
    "data/*/dataset.json",
    "data/*/train.parquet",
    "teacher/*/spec.json",
    "teacher/*/manifest.json",
    "teacher/*/teacher.json",
    "teacher/*/weights.safetensors",
    "teacher/*/metrics.jsonl",
    "pairs/*/spec.json",
    "pairs/*/manifest.g0001.json",
    "pairs/*/manifest.g0002.json",
    "pairs/*/manifest.g0002.*.parquet",
    "pairs/*/commits/d000-s00000.json",
    "pairs/*/index/d000-s00000.*.parquet",
    "pairs/*/fields/caption/field.json",
    "pairs/*/fields/caption/s00000.*.npy",
    "pairs/*/failed/d000-s00000.txt",
    "pairs/*/audits/*.json",
    "pairs/*/events/*.jsonl",
    "pairs/*/lock.json",
    "evaluate/*/evaluation.json",
    "evaluate/*/samples/*.npz",
    "submissions/one/worklist.json",
    ".sources/*.json",
)


def pipe(path: Path, elsewhere: Path) -> None:
    os.mkfifo(path)


def endless(path: Path, elsewhere: Path) -> None:
    path.symlink_to("/dev/zero")


def outside(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def folder(path: Path, elsewhere: Path) -> None:
    path.mkdir()


def huge(path: Path, elsewhere: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(MOST_STATE_BYTES + 1)


KINDS = (pipe, endless, outside, folder, huge)
# Every file as one of them in turn; each as each in full.
CASES = [
    pytest.param(pattern, kind, id=f"{pattern}-{kind.__name__}")
    for number, pattern in enumerate(FILES)
    for kind in (KINDS if FULL else (KINDS[number % len(KINDS)],))
]


def command(*arguments: str) -> Callable[[], str]:
    """A target of the sandbox: how the command ends, as `main` would tell it."""

    def target() -> str:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                cli(list(arguments), standalone_mode=False)
        except SystemExit as ended:
            return "findings" if ended.code == 1 else "data"
        except (StageError, ArtifactError, Held, ClickException, OSError) as error:
            raise StorageError(str(error)) from error
        return "data"

    return target


def reads(root: Path) -> dict[str, Callable[[], str]]:
    """All that reads an artifact, by name."""
    (teacher,), (evaluation,) = (list((root / stage).iterdir()) for stage in ("teacher", "evaluate"))
    store = str(next(root.glob("pairs/*/fields")).parent)
    commands = (
        ("ls",),
        ("status", "-c", "tiny.toml"),
        ("plan", "report", "-c", "tiny.toml"),
        ("lineage", str(evaluation)),
        ("pairs", "info", store),
        ("pairs", "verify", store),
        ("audit", store, "--quick"),
        ("audit", "-c", "tiny.toml"),
        ("gc", "--dry-run", "-c", "tiny.toml"),
        ("pairs", "export", store, "exported"),
        ("repair", store),
    )

    def called(function: Callable[[], object]) -> Callable[[], str]:
        def target() -> str:
            try:
                function()
            except (StageError, OSError) as error:
                raise StorageError(str(error)) from error
            return "data"

        return target

    functions: dict[str, Callable[[], object]] = {
        "weights": lambda: read_weights(teacher),
        "training log": lambda: sections.read_lines(teacher / "metrics.jsonl"),
        "tracebacks": lambda: reasons(Path(store), ["d000-s00000"]),
        "progress": lambda: figures(Artifact(Path(store)), 2),
        "records": lambda: list(PairStore.open(store).batches(64, epochs=1, last="keep", fields=("caption",))),
        "keys": lambda: ImageDataset.open(next(root.glob("data/*"))).keys(np.arange(3)),
        "pictures": lambda: [
            grid for model in ("student", "teacher") for grid in Evaluation(evaluation, 4).grids(model)
        ],
    }
    return {
        **{name: called(function) for name, function in functions.items()},
        **{" ".join(words): command(*words) for words in commands},
    }


@pytest.fixture(scope="module")
def complete(made: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with one of every file that there may be beside it."""
    root = tmp_path_factory.mktemp("complete") / "lab"
    shutil.copytree(made.folder, root)
    (store,) = (
        spec.parent
        for spec in root.glob("artifacts/pairs/*/spec.json")
        if atomic.read_json(spec)["store"]["coupling"] == "nfm"
    )
    rows = len(PairStore.open(store))
    write_row_field(store, "caption", [np.zeros((rows, 2), np.float32)], (2,), "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_list, "INLINE", 0)
        first = PairStore.open(store).manifest
        told = ("stage", "version", "fingerprint", "inputs", "config", "files", "metrics", "git_commit", "finished")
        seal.seal(store, 1, **{key: first[key] for key in (*told, "seconds")})
    atomic.write_bytes(store / "failed" / "d000-s00000.txt", b"Error: no\n")
    atomic.write_json(store / "audits" / "20200101T000000Z-quick.json", {"level": "quick"})
    lock = Lock(store)
    atomic.write_json(store / "lock.json", {**lock._body, "born": "1"})  # its holder is dead
    atomic.write_json(root / "artifacts/submissions/one/worklist.json", {"store": str(store)})
    return root


@pytest.fixture
def lab(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NFM_ARTIFACTS", str(tmp_path / "lab" / "artifacts"))
    shutil.copytree(complete, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    return tmp_path / "lab"


def outcomes(lab: Path, tmp_path: Path, slow: bool = True) -> list[sandbox.Outcome]:
    targets = reads(lab / "artifacts")
    if not slow:  # what hashes everything, and what follows from the other commands' way of reading
        targets = {name: target for name, target in targets.items() if not name.startswith(SLOW)}
    found = sandbox.run(targets, [lab], tmp_path / "trace.txt", SECONDS)
    assert len(found) == len(targets), found[-1]
    return found


def test_an_artifact_that_is_as_it_was_made_is_read_by_all(lab: Path, tmp_path: Path) -> None:
    for outcome in outcomes(lab, tmp_path):
        assert outcome.kind == "data", outcome


@pytest.mark.parametrize(("pattern", "kind"), CASES)
def test_anything_in_place_of_a_metadata_file_is_reported_or_ignored(
    lab: Path, tmp_path: Path, pattern: str, kind: Callable[[Path, Path], None]
) -> None:
    file = sorted((lab / "artifacts").glob(pattern))[0]
    shutil.move(file, tmp_path / "elsewhere")
    kind(file, tmp_path / "elsewhere")
    found = outcomes(lab, tmp_path, slow=kind in (pipe, outside))
    wrong = [outcome for outcome in found if outcome.defect]
    assert not wrong, "\n".join(f"{outcome.target}: {outcome.kind}: {outcome.detail}" for outcome in wrong)
    for outcome in found:
        if outcome.kind == "refused":
            assert file.name in outcome.detail or file.parent.name in outcome.detail, outcome
