"""A small data set, and stores of every coupling that are made of it in this process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.stages.couplings.custom import Allowed
from nfm.stages.couplings.facts import facts_of
from nfm.stages.pairs import stage as pairs
from nfm.stages.stores import audit as pairs_audit
from nfm.stages.trained import potential, student
from nfm.storage import DatasetWriter, ImageDataset, PairStore
from nfm.storage.files import atomic
from nfm.storage.format import philox
from nfm.storage.ledger import seal
from tests.support.once import once
from tests.support.recorder import Recorder

ROWS, CLASSES, SHAPE = 210, 3, (1, 6, 6)
CUSTOM = '''
import numpy as np

def noise(images, labels, rng):
    """Noise of the sign of the image's mean, a little."""
    eps = rng.standard_normal(images.shape, dtype=np.float32)
    return 0.2 * images.mean(axis=(1, 2, 3), keepdims=True) + eps

def short(images, labels, rng):
    return np.zeros((len(images) - 1, *images.shape[1:]), np.float32)

def whole(images, labels, rng):
    return np.zeros(images.shape, np.int64)

def endless(images, labels, rng):
    return np.full(images.shape, np.nan, np.float32)

def listed(images, labels, rng):
    return images.tolist()

def late(images, labels, rng):
    import beside_own_couplings
    return rng.standard_normal(images.shape) + beside_own_couplings.ZERO

def broken(images, labels, rng):
    return labels.nothing

def leaves(images, labels, rng):
    raise SystemExit(0)

def forgetful(images, labels, rng):
    return np.random.standard_normal(images.shape)

def mischief(images, labels, rng):
    labels[:] = 0
    images[:] = 0
    return rng.standard_normal(images.shape)
'''


class Heard(Recorder):
    """Remembers what was said, too."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class Shop:
    """A small data set of bright and dark images, and stores that are made of it in this process."""

    def __init__(
        self, root: Path, factory: pytest.TempPathFactory, dtype: str = "uint8", classes: int = CLASSES
    ) -> None:
        self.root, self.factory, self.dtype, self.classes = root, factory, dtype, classes
        self.inputs = {"data": root / "data"}
        self.heard = Heard()
        numbers = np.random.default_rng(5)
        labels = numbers.integers(0, classes, ROWS) if classes else np.full(ROWS, -1)
        bright = numbers.normal(0, 60, (ROWS, 1, 1, 1)) + 40 * labels[:, None, None, None] + 60
        images = np.clip(bright + numbers.normal(0, 25, (ROWS, *SHAPE)), 0, 255).astype(np.uint8)
        if dtype != "uint8":
            images = (images / 127.5 - 1).astype(dtype)
        names = [f"class {label}" for label in range(classes)]
        writer = DatasetWriter(self.inputs["data"], "toy", SHAPE, names, rows_per_shard=100, dtype=dtype)
        writer.write_split("train", ROWS, [(images, labels, [str(row) for row in range(ROWS)])])
        writer.close()
        atomic.write_json(self.inputs["data"] / "manifest.json", {"content_digest": "ab" * 32, "files": []})
        self.source = ImageDataset.open(self.inputs["data"])

    def config(self, **options: Any) -> pairs.PairsConfig:
        plain = {"rows_per_shard": 64, "rows_per_block": 16, "batch_size": 16, "executor": "serial", "draws": 2}
        return pairs.PairsConfig(**{**plain, "codec": "float32", **options})

    def of(self, config: pairs.PairsConfig) -> dict[str, Path]:
        """The inputs of that coupling, by role."""
        return {role: self.inputs[role] for role in pairs.input_roles(config)}

    def begin(self, config: pairs.PairsConfig, name: str = "store") -> Path:
        """A store whose recipe stands."""
        if facts_of(config.coupling).made_with not in (None, *self.inputs):
            self.makers(config.coupling)
        out = self.root / name
        out.mkdir()
        described = pairs.describe(config, self.of(config))
        atomic.write_json(out / "spec.json", {"fingerprint": "cd" * 32, **described})
        return out

    def make(self, config: pairs.PairsConfig, name: str = "store") -> PairStore:
        """A finished store."""
        out = self.begin(config, name)
        self.finish(config, out)
        return PairStore.open(out)

    def makers(self, coupling: str) -> None:
        """The potential or the student that a coupling is made with, trained once for all tests."""
        role = str(facts_of(coupling).made_with)
        name = f"{role}-{self.dtype}-{self.classes}"
        trained = once(
            self.factory, name, lambda folder: Shop(folder, self.factory, self.dtype, self.classes)._train(coupling)
        )
        self.inputs[role] = Path(shutil.copytree(trained / role, self.root / role))

    def _train(self, coupling: str) -> None:
        if coupling == "semidiscrete-ot":
            section = potential.PotentialConfig(samples=20_000, batch_size=256, check_every=5_000)
            self.stage(potential, section, {"data": self.inputs["data"]})
        if coupling == "reflow":
            store = self.make(self.config(coupling="independent"), "first-round")
            sizes = {"patch": 2, "width": 32, "depth": 1, "head_size": 16, "batch_size": 32, "label_drop": 0.2}
            self.stage(student, student.StudentConfig(pairs=3_000, **sizes), {"pairs": Path(store.root)})

    def stage(self, stage: Any, section: Any, inputs: dict[str, Path]) -> None:
        """Run a stage and publish it as the pipeline would."""
        out = self.inputs[stage.NAME] = self.root / stage.NAME
        out.mkdir()
        result = stage.run(section, inputs, out, self.heard)
        files = [
            {"path": path, "sha256": atomic.hash_file(out / path)[0], "payload": path in result.payload}
            for path in [*result.payload, *result.files]
        ]
        content = atomic.digest("".join(file["sha256"] for file in files).encode())
        manifest = {"content_digest": content, "files": files, "metrics": result.metrics}
        atomic.write_json(out / "manifest.json", manifest | {"config": section.model_dump(mode="json")})

    def finish(self, config: pairs.PairsConfig, out: Path) -> None:
        pairs.run(config, self.of(config), out, self.heard)
        seal.seal(out, config.draws, config=config.model_dump(mode="json"))

    def audit(self, store: PairStore, level: Any = "deep") -> list[str]:
        """What an audit finds that may run the store's own custom function."""
        options = store.spec.coupling_options or {}
        allowed = Allowed(frozenset({str(options.get("sha256"))}), self.heard.say)
        found, said = pairs_audit.audit(self.inputs, Path(store.root), level, 60, allowed)
        assert found or level != "deep" or "0 of 60 pairs bad" in said[0]
        return [finding.problem for finding in found]


def all_of(store: PairStore, draw: int = 0) -> dict[str, np.ndarray]:
    """Every record of a draw, as stored, with its columns of the index."""
    index = store.index(["row", "flip", "group", "nll"], draw=draw)
    columns = {name: index[name].to_numpy(zero_copy_only=False) for name in index.column_names}
    return {**store.gather(draw, np.arange(len(store))), **columns}


def eps_of(seed: int, draw: int) -> np.ndarray:
    return philox.normals(seed, draw, np.arange(ROWS), int(np.prod(SHAPE))).reshape(ROWS, *SHAPE)


def cost_of(store: PairStore, draw: int = 0) -> float:
    records = all_of(store, draw)
    return float(np.square(records["noise"] - store_images(store, records)).sum())


def store_images(store: PairStore, records: dict[str, np.ndarray]) -> np.ndarray:
    image = records["image"]
    return image / np.float32(127.5) - 1 if image.dtype == np.uint8 else image.astype(np.float32)


OF_A_SLOT = ("independent", "minibatch-ot", "custom")
EVERY = (*OF_A_SLOT, "semidiscrete-ot", "reflow")
OPTIONS: dict[str, dict[str, Any]] = {
    "independent": {},
    "minibatch-ot": {"group_size": 16},
    "custom": {"custom": "own_couplings:noise"},
    "semidiscrete-ot": {},
    "reflow": {"reflow_nfe": 7},
}
