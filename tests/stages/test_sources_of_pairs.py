"""Every source of pairs: what it promises of labels, images and noise, and that its store can be made again."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.stages import costs, pairs, pairs_audit, pairs_plan, pairs_recipe, potential, sealing_report, student
from nfm.stages.encoder import Encoder
from nfm.stages.executors import ShardJob, new_attempt
from nfm.stages.stage import StageError
from nfm.stages.teacher import TeacherConfig
from nfm.storage import DatasetWriter, ImageDataset, PairStore, StorageError, atomic, generations, philox
from nfm.storage.row_fields import write_row_field
from nfm.storage.schema import StoreSpec, pair_fields, read_spec, write_spec
from nfm.trainers import solvers
from nfm.trainers.couplings import Pairs
from nfm.trainers.minibatch_ot import groups
from tests.stages.recorder import Recorder

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

    def __init__(self, root: Path, dtype: str = "uint8", classes: int = CLASSES) -> None:
        self.root = root
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
        if config.coupling in pairs_recipe.MAKERS and pairs_recipe.MAKERS[config.coupling] not in self.inputs:
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
        """The potential or the student that a coupling is made with."""
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
        files = [{"path": path, "sha256": atomic.hash_file(out / path)[0]} for path in [*result.payload, *result.files]]
        content = atomic.digest("".join(file["sha256"] for file in files).encode())
        manifest = {"content_digest": content, "files": files, "metrics": result.metrics}
        atomic.write_json(out / "manifest.json", manifest | {"config": section.model_dump(mode="json")})

    def finish(self, config: pairs.PairsConfig, out: Path) -> None:
        pairs.run(config, self.of(config), out, self.heard)
        generations.seal(out, config.draws, config=config.model_dump(mode="json"))

    def audit(self, store: PairStore, level: Any = "deep") -> list[str]:
        found, said = pairs_audit.audit(self.inputs, Path(store.root), level, 60)
        assert found or level != "deep" or "0 of 60 pairs bad" in said[0]
        return [finding.problem for finding in found]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """In a folder with a module of custom couplings."""
    (tmp_path / "own_couplings.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    yield Shop(tmp_path)
    for name in [name for name in sys.modules if name.startswith("own_couplings_package")]:
        del sys.modules[name]


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


PLAIN = StoreSpec(rows=10, rows_per_shard=5, fields=pair_fields(SHAPE), coupling="independent", source="ab" * 32)
OF_A_SLOT = ("independent", "minibatch-ot", "custom")
EVERY = (*OF_A_SLOT, "semidiscrete-ot", "reflow")
OPTIONS: dict[str, dict[str, Any]] = {
    "independent": {},
    "minibatch-ot": {"group_size": 16},
    "custom": {"custom": "own_couplings:noise"},
    "semidiscrete-ot": {},
    "reflow": {"reflow_nfe": 7},
}


@pytest.mark.parametrize("coupling", OF_A_SLOT)
def test_slot_s_has_the_label_and_the_image_of_row_s(shop: Shop, coupling: str) -> None:
    store = shop.make(shop.config(coupling=coupling, flips=True, **OPTIONS[coupling]))
    rows = np.arange(ROWS)
    for draw in range(2):
        records = all_of(store, draw)
        flip = philox.flips(0, draw, rows)
        images = shop.source.images(rows)
        np.testing.assert_array_equal(records["image"], np.where(flip[:, None, None, None], images[..., ::-1], images))
        np.testing.assert_array_equal(records["label"], shop.source.labels(rows))
        np.testing.assert_array_equal(records["row"], rows)
        np.testing.assert_array_equal(records["flip"], flip)
        np.testing.assert_array_equal(store.image_rows(draw, rows), rows)
    assert shop.audit(store) == []


@pytest.mark.parametrize("coupling", EVERY)
def test_any_slots_encoded_again_are_what_was_stored(shop: Shop, coupling: str) -> None:
    config = shop.config(coupling=coupling, **OPTIONS[coupling])
    store = shop.make(config)
    encoder = Encoder(pickle.loads(pickle.dumps(pairs.setup(config, shop.of(config), Path(store.root)))))
    for slots in (np.array([5]), np.array([130, 3, 64, 209]), np.arange(60, 76)):
        again, stored = encoder.encode_slots(1, slots), store.gather(1, slots)
        for name in ("image", "noise", "label"):
            np.testing.assert_array_equal(again[name], stored[name])
        np.testing.assert_array_equal(again["row"], store.image_rows(1, slots))


@pytest.mark.parametrize("coupling", EVERY)
def test_pairs_do_not_depend_on_the_batch_or_on_who_encodes_which_shard(shop: Shop, coupling: str) -> None:
    config = shop.config(coupling=coupling, **OPTIONS[coupling])
    first = shop.make(config, "first")
    # A student's last bits depend on the batch, as a teacher's do.
    other = shop.config(coupling=coupling, batch_size=16 if coupling == "reflow" else 5, **OPTIONS[coupling])
    out = shop.begin(other, "other")
    workers = [Encoder(pairs.setup(other, shop.of(other), out)) for _ in range(2)]
    for number, name in enumerate(reversed(generations.names_of(read_spec(out), 2))):
        draw, shard = int(name[1:4]), int(name[6:])
        workers[number % 2].encode_shard(ShardJob(draw, shard, new_attempt()))
    generations.seal(out, 2)
    second = PairStore.open(out)
    for draw in range(2):
        ours, theirs = all_of(first, draw), all_of(second, draw)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("coupling", EVERY)
def test_a_store_that_was_killed_half_way_ends_with_the_same_bytes(shop: Shop, coupling: str) -> None:
    config = shop.config(coupling=coupling, **OPTIONS[coupling])
    whole = shop.make(config, "whole")
    out = shop.begin(config, "killed")
    pairs.run(config, shop.of(config), out, shop.heard)
    for commit in sorted((out / "commits").glob("*.json"))[::2]:
        commit.unlink()
    shop.finish(config, out)
    again = PairStore.open(out)
    assert again.content_digest == whole.content_digest
    assert shop.audit(again, "default") == []


@pytest.mark.parametrize("coupling", ["minibatch-ot", "semidiscrete-ot"])
def test_nothing_is_published_of_a_shard_that_is_stopped(shop: Shop, coupling: str) -> None:
    config = shop.config(coupling=coupling, **OPTIONS[coupling])
    out = shop.begin(config)
    looks = iter([False, True, True, True, True])
    with pytest.raises(InterruptedError):
        Encoder(pairs.setup(config, shop.of(config), out)).encode_shard(ShardJob(0, 0, "a1"), lambda: next(looks))
    assert not [path for folder in ("shards", "index", "commits") for path in out.glob(f"{folder}/*")]


def test_a_sealed_generation_has_a_coupling_report_where_its_inputs_are_there(shop: Shop) -> None:
    config = shop.config(coupling="minibatch-ot", group_size=16)
    out = shop.begin(config)
    result = pairs.run(config, shop.of(config), out, shop.heard)
    assert {"auc", "transport_cost", "exact", "approximate"} <= set(result.extra["coupling_report"])
    without = pairs.seal(out, 2)
    assert "coupling_report" not in without.extra
    assert without.content_digest == result.content_digest


class Interrupted(Heard):
    """Interrupted for good at the first look, as by a second Ctrl-C."""

    @property
    def stopping(self) -> bool:
        raise KeyboardInterrupt


@pytest.fixture
def encoded(shop: Shop) -> Path:
    """A store with all commits and no manifest."""
    out = shop.begin(config := shop.config(coupling="independent"))
    pairs.run(config, shop.of(config), out, shop.heard)
    return out


def sealed(shop: Shop, out: Path, heard: Heard, device: str = "auto") -> tuple[bool, str]:
    """(whether there is a coupling report, what was said) of a sealing."""
    result = pairs.seal(out, 2, {}, shop.inputs, heard, device)
    assert result.content_digest == pairs.seal(out, 2).content_digest
    return "coupling_report" in result.extra, " ".join(heard.said)


def test_a_report_that_was_stopped_is_told_and_the_generation_is_sealed_without(shop: Shop, encoded: Path) -> None:
    heard = Heard()
    heard.patience = 3
    reported, said = sealed(shop, encoded, heard)
    assert not reported
    assert "the coupling report was stopped; `nfm pairs report`" in said


def test_a_report_that_was_killed_is_not_made_again_so_that_the_manifest_comes(shop: Shop, encoded: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sealed(shop, encoded, Interrupted())
    reported, said = sealed(shop, encoded, Heard())
    assert not reported
    assert "one was begun before and did not come to its end; `nfm pairs report`" in said
    (encoded / sealing_report.BEGUN).unlink()
    assert sealed(shop, encoded, Heard())[0]
    assert not (encoded / sealing_report.BEGUN).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device that is not there is a CUDA one")
def test_a_report_that_fails_is_told_with_the_reason_and_is_made_on_the_configs_device(
    shop: Shop, encoded: Path
) -> None:
    reported, said = sealed(shop, encoded, Heard(), "cuda")
    assert not reported
    assert "which failed: StageError: device = 'cuda': torch sees no CUDA device" in said


def test_a_node_without_torch_seals_and_says_so(shop: Shop, encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    reported, said = sealed(shop, encoded, Heard())
    assert not reported
    assert "without a coupling report: torch is not installed here" in said


def test_a_store_may_be_made_without_a_report(shop: Shop) -> None:
    config = shop.config(coupling="independent", report=False)
    assert config.semantic() == shop.config(coupling="independent").semantic()
    assert "coupling_report" not in pairs.run(config, shop.inputs, shop.begin(config), shop.heard).extra


@pytest.mark.parametrize(("coupling", "size"), [("minibatch-ot", 256), ("semidiscrete-ot", 64)])
def test_an_auto_batch_of_no_teacher_is_not_probed(shop: Shop, coupling: str, size: int) -> None:
    config = shop.config(coupling=coupling, batch_size="auto")
    out = shop.begin(config)
    assert atomic.read_json(out / "spec.json")["encoding"] == {"batch_size": size}
    assert pairs.setup(config, shop.of(config), out).batch_size == size


def test_the_noises_of_a_group_are_its_own_eps_dealt_out_again(shop: Shop) -> None:
    store = shop.make(shop.config(coupling="minibatch-ot", group_size=16))
    for draw in range(2):
        records, eps = all_of(store, draw), eps_of(0, draw)
        for group in np.unique(records["group"]):
            members = np.flatnonzero(records["group"] == group)
            assert members[0] == group
            assert len(set(records["label"][members])) == 1
            assert len({slot // 64 for slot in members}) == 1, "a group straddles shards"
            drawn, dealt = (sorted(each.tobytes() for each in noise[members]) for noise in (eps, records["noise"]))
            assert dealt == drawn
        first, sizes = np.unique(records["group"], return_counts=True)
        for kind in {(slot // 64, records["label"][slot]) for slot in first.tolist()}:
            alike = [size for slot, size in zip(first, sizes) if (slot // 64, records["label"][slot]) == kind]
            assert max(alike) - min(alike) <= 1
            assert max(alike) <= 16
    assert not np.array_equal(all_of(store)["noise"], eps_of(0, 0))


def test_dealing_out_lowers_the_transport_cost_and_larger_groups_lower_it_more(shop: Shop) -> None:
    independent = shop.make(shop.config(coupling="independent"), "independent")
    costs = [cost_of(independent)]
    for size in (4, 16):
        config = shop.config(coupling="minibatch-ot", group_size=size)
        costs.append(cost_of(shop.make(config, f"of-{size}")))
    assert costs[0] > 1.02 * costs[1] > 1.02**2 * costs[2]


def test_data_without_classes_is_one_class(tmp_path: Path) -> None:
    shop = Shop(tmp_path, dtype="float32", classes=0)
    store = shop.make(shop.config(coupling="minibatch-ot", group_size=32))
    sizes = np.unique(all_of(store)["group"], return_counts=True)[1]
    assert sizes.tolist() == [32] * 6 + [18]
    assert shop.audit(store) == []


def test_groups_that_are_smaller_than_asked_for_are_told_with_the_remedy(shop: Shop) -> None:
    shop.make(shop.config(coupling="minibatch-ot", group_size=16), "right")
    assert not [line for line in shop.heard.said if "group_size" in line]
    shop.make(shop.config(coupling="minibatch-ot", group_size=512), "small")
    (said,) = (line for line in shop.heard.said if "group_size" in line)
    assert "not pairs.group_size = 512" in said
    assert "set pairs.rows_per_shard to about 210" in said


def spoiled(shop: Shop, config: pairs.PairsConfig, field: str, change: Callable[[np.ndarray], np.ndarray]) -> PairStore:
    """A store whose encoder was wrong about a field: whole, sealed, and not what its recipe says."""
    out = shop.begin(config)
    encoder = Encoder(pairs.setup(config, shop.of(config), out))
    right = encoder._records
    encoder._records = lambda draw, source: (found := right(draw, source)) | {field: change(found[field])}  # type: ignore[method-assign]
    for name in generations.names_of(read_spec(out), 2):
        encoder.encode_shard(ShardJob(int(name[1:4]), int(name[6:]), new_attempt()))
    generations.seal(out, 2, config=config.model_dump(mode="json"))
    return PairStore.open(out)


@pytest.mark.parametrize(
    ("coupling", "field", "change", "problem"),
    [
        ("independent", "image", lambda image: image[::-1], "images are not those of its source"),
        ("independent", "noise", lambda z: np.roll(z, 1, axis=0), "are not those that were drawn for them"),
        ("independent", "noise", lambda z: z * 0 + z[:1], "are not those that were drawn for them"),
        ("semidiscrete-ot", "noise", lambda z: np.roll(z, 1, axis=0), "are not those that were drawn for them"),
        ("reflow", "noise", lambda z: np.roll(z, 1, axis=0), "are not those that were drawn for them"),
        ("reflow", "flip", lambda flip: ~flip, "flips are not those that its seed draws"),
        ("minibatch-ot", "row", lambda row: row[::-1], "rows are not those of its source"),
        ("minibatch-ot", "label", lambda label: (label + 1) % CLASSES, "labels are not those of its source"),
        ("minibatch-ot", "noise", lambda noise: noise[::-1], "are not those that were drawn for them, permuted"),
        ("minibatch-ot", "group", lambda group: group.max() - group * 0, "groups are not of one class"),
        ("semidiscrete-ot", "row", lambda row: (row + 1) % ROWS, "rows are not those of its source"),
        ("semidiscrete-ot", "image", lambda image: image[::-1], "images are not those of its source"),
        ("reflow", "label", lambda label: (label + 1) % CLASSES, "labels are not those of its source"),
    ],
)
def test_an_audit_finds_records_that_are_not_the_sources(
    shop: Shop, coupling: str, field: str, change: Callable[[np.ndarray], np.ndarray], problem: str
) -> None:
    found = shop.audit(spoiled(shop, shop.config(coupling=coupling, **OPTIONS[coupling]), field, change), "default")
    assert len(found) >= 8, "one a shard"
    assert any(problem in line for line in found)


@pytest.mark.parametrize(
    ("coupling", "field", "change"),
    [
        ("reflow", "image", lambda image: np.roll(image, 1, axis=0)),
        ("custom", "noise", lambda noise: np.roll(noise, 1, axis=0)),
        ("custom", "noise", lambda noise: np.nextafter(noise, np.float32(9))),
        ("custom", "group", lambda group: group + 1),
        ("independent", "nll", lambda nll: np.zeros_like(nll)),
    ],
)
def test_a_deep_audit_finds_pairs_that_their_coupling_does_not_make(
    shop: Shop, coupling: str, field: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    config = shop.config(coupling=coupling, **OPTIONS[coupling])
    store = spoiled(shop, config, field, change)
    assert shop.audit(store, "default") == []
    found = shop.audit(store)
    assert len(found) > 50
    assert "is not the pair that its coupling makes" in found[0]


class Undealt:
    """Has the groups of minibatch-ot, and gives each image its own noise, or its neighbour's in the group."""

    name, scope = "minibatch-ot", "shard"

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, eps: torch.Tensor) -> Pairs:
        noise, group = torch.empty_like(eps), torch.empty(len(eps), dtype=torch.int64)
        for members in map(torch.from_numpy, groups(labels.numpy(), 16)):
            noise[members], group[members] = eps[members].roll(self.shift, 0), members[0]
        return Pairs(noise, group=group)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_an_audit_finds_groups_whose_noises_were_not_assigned(shop: Shop, shift: int, codec: Any) -> None:
    config = shop.config(coupling="minibatch-ot", group_size=16, codec=codec)
    right = shop.make(config, "right")
    assert shop.audit(right, "default") == []
    out = shop.begin(config)
    encoder = Encoder(pairs.setup(config, shop.of(config), out))
    encoder.coupling = Undealt(shift)  # type: ignore[assignment]
    for name in generations.names_of(read_spec(out), 2):
        encoder.encode_shard(ShardJob(int(name[1:4]), int(name[6:]), new_attempt()))
    generations.seal(out, 2, config=config.model_dump(mode="json"))
    found = shop.audit(PairStore.open(out), "default")
    assert len(found) >= 8, "one a shard"
    assert all("are not assigned at the least cost" in line for line in found)


@pytest.mark.parametrize("flips", [False, True])
def test_semidiscrete_noise_is_eps_and_its_image_is_the_choice_of_its_class(shop: Shop, flips: bool) -> None:
    store = shop.make(shop.config(coupling="semidiscrete-ot", flips=flips))
    labels, rows = shop.source.labels(np.arange(ROWS)), np.arange(ROWS)
    choice = potential.load_coupling(shop.inputs["potential"], shop.source)
    for draw in range(2):
        records, eps = all_of(store, draw), eps_of(0, draw)
        np.testing.assert_array_equal(records["noise"], eps)
        np.testing.assert_array_equal(records["label"], labels)
        np.testing.assert_array_equal(labels[records["row"]], labels)
        np.testing.assert_array_equal(store.image_rows(draw, rows), records["row"])
        flip = records["flip"][:, None, None, None]
        assert flip.any() == flips
        images = shop.source.images(records["row"])
        np.testing.assert_array_equal(records["image"], np.where(flip, images[..., ::-1], images))
        # A flipped pair is a pair of the potential's, mirrored as a whole.
        seen = torch.from_numpy(np.where(flip, eps[..., ::-1], eps))
        chosen = choice(seen, torch.from_numpy(labels), seen).row
        assert chosen is not None
        np.testing.assert_array_equal(chosen.numpy(), records["row"])
    assert len(set(records["row"])) > ROWS / 2, "many images are chosen"
    assert shop.audit(store) == []


def test_semidiscrete_pairs_cost_less_than_independent_ones(shop: Shop) -> None:
    independent = shop.make(shop.config(coupling="independent"), "independent")
    chosen = shop.make(shop.config(coupling="semidiscrete-ot"), "chosen")
    assert cost_of(chosen) < 0.98 * cost_of(independent)


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_a_reflowed_image_is_what_the_student_makes_of_the_noise(tmp_path: Path, dtype: str) -> None:
    shop = Shop(tmp_path, dtype)
    config = shop.config(coupling="reflow", reflow_nfe=7)
    store = shop.make(config)
    assert store.spec.coupling_options == {"solver": "heun", "nfe": 7, "grid": "square", "guidance": 0.0}
    labels = shop.source.labels(np.arange(ROWS))
    model = student.load(shop.inputs["student"])

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return model(x, torch.full((ROWS,), float(t)), torch.from_numpy(labels))

    for draw in range(2):
        records, eps = all_of(store, draw), eps_of(0, draw)
        np.testing.assert_array_equal(records["noise"], eps)
        np.testing.assert_array_equal(records["label"], labels)
        np.testing.assert_array_equal(records["row"], np.arange(ROWS))
        with torch.no_grad():
            made = solvers.sample(velocity, torch.from_numpy(eps), 7, "heun").numpy()
        assert records["image"].dtype == dtype
        if dtype == "uint8":  # the nearest byte, which is half a step of 1 / 127.5 away at most
            made = made.clip(-1, 1)
        assert np.abs(store_images(store, records) - made).max() < (0.51 / 127.5 if dtype == "uint8" else 2e-3)
    assert shop.audit(store) == []


def test_reflow_with_guidance_and_flips_is_made_again_the_same(shop: Shop) -> None:
    plain = shop.make(shop.config(coupling="reflow", reflow_nfe=3), "plain")
    guided = shop.make(shop.config(coupling="reflow", reflow_nfe=3, reflow_guidance=2.0, flips=True), "guided")
    assert guided.spec.coupling_options == {"solver": "euler", "nfe": 3, "grid": "square", "guidance": 2.0}
    assert shop.audit(guided) == []
    flip = all_of(guided)["flip"].astype(bool)
    assert (all_of(plain)["image"] != all_of(guided)["image"])[~flip].any()
    np.testing.assert_array_equal(all_of(guided)["noise"], eps_of(0, 0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reflow_solver": "newton"}, "solver = 'newton' is unknown"),
        ({"reflow_nfe": 8}, "nfe = 8: heun takes 2N - 1 evaluations"),
        ({"reflow_grid": "cube"}, r"pairs\.reflow_grid = 'cube' is unknown; there are uniform, square"),
    ],
)
def test_a_solver_that_cannot_do_it_is_told_before_anything_begins(
    shop: Shop, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(StageError, match=said):
        shop.begin(shop.config(coupling="reflow", **options))


@pytest.mark.parametrize("coupling", ["semidiscrete-ot", "reflow"])
def test_another_maker_than_the_recipes_is_refused(shop: Shop, coupling: str) -> None:
    config = shop.config(coupling=coupling, **OPTIONS[coupling])
    out = shop.begin(config)
    setup, folder = pairs.setup(config, shop.of(config), out), shop.inputs[pairs_recipe.MAKERS[coupling]]
    Encoder(setup)
    payload = folder / (potential.VECTORS if coupling == "semidiscrete-ot" else "weights.safetensors")
    whole = payload.read_bytes()
    payload.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StageError, match="not the file that its manifest lists"):
        Encoder(setup)
    payload.write_bytes(whole)
    manifest = atomic.read_json(folder / "manifest.json")
    manifest.pop("digest", None)
    atomic.write_json(folder / "manifest.json", manifest | {"content_digest": "ef" * 32})
    with pytest.raises(StageError, match="is made with"):
        Encoder(setup)


def test_a_custom_coupling_is_recorded_with_the_digest_of_its_file(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:noise")
    store = shop.make(config)
    sha256 = atomic.hash_file(shop.root / "own_couplings.py")[0]
    assert store.spec.coupling_options == {"function": "own_couplings:noise", "sha256": sha256}
    assert pairs.external(config) == {"custom": sha256}
    assert pairs.external(shop.config(coupling="independent", custom="own_couplings:noise")) == {}


def test_another_file_on_a_worker_is_refused(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:noise")
    store = shop.make(config)
    setup = pairs.setup(config, shop.of(config), Path(store.root))
    (shop.root / "own_couplings.py").write_text(CUSTOM.replace("0.2", "0.3"))
    with pytest.raises(StageError, match="not the file that this store's pairs are made with"):
        Encoder(setup)
    assert shop.audit(store, "default") == []  # the pairs are as they were
    assert "its pairs cannot be made again" in shop.audit(store)[0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("short", r"returned noise of shape \(63, 1, 6, 6\) for images \(64, 1, 6, 6\)"),
        ("whole", "returned noise of dtype int64; return float32"),
        ("endless", "returned 2304 values that are not finite"),
        ("listed", "returned a list; return a numpy array"),
    ],
)
def test_what_is_no_noise_is_refused_by_name(shop: Shop, function: str, said: str) -> None:
    config = shop.config(coupling="custom", custom=f"own_couplings:{function}")
    encoder = Encoder(pairs.setup(config, shop.of(config), shop.begin(config)))
    with pytest.raises(ValueError, match=f"own_couplings:{function}.*{said}"):
        encoder.encode_shard(ShardJob(0, 0, "a1"))


def test_a_function_that_fails_is_named(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:broken")
    encoder = Encoder(pairs.setup(config, shop.of(config), shop.begin(config)))
    with pytest.raises(StageError, match=r"own_couplings:broken.*raised AttributeError"):
        encoder.encode_shard(ShardJob(0, 0, "a1"))


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
    spec = {**atomic.read_json(path), "external": pairs.external(config)}
    atomic.write_json(path, spec)
    assert shop.audit(store, "default") == []
    spec["store"]["coupling_options"]["sha256"] = "ab" * 32
    atomic.write_json(path, spec)
    assert "its recipe is not the one that its inputs give" in shop.audit(store, "default")[0]


def test_a_field_of_source_rows_is_refused_where_images_are_generated(tmp_path: Path) -> None:
    spec = dataclasses.replace(PLAIN, coupling="reflow")
    write_spec(tmp_path, spec)
    with pytest.raises(StorageError, match="coupling 'reflow' are generated"):
        write_row_field(tmp_path, "caption", [np.zeros((10, 2))], (2,), "float64")


def test_shards_are_not_advised_beyond_memory(shop: Shop) -> None:
    config = shop.config(coupling="minibatch-ot", group_size=512, rows_per_shard=64)
    told = pairs_recipe.small_groups(pairs_recipe.store_spec(config, shop.inputs), shop.inputs)
    assert told is not None
    assert "about 210; a worker holds its shard in memory, 0.1 MB then" in told
    spec = dataclasses.replace(
        pairs_recipe.store_spec(config, shop.inputs), fields=pair_fields((3, 2048, 2048), "float32")
    )
    told = pairs_recipe.small_groups(spec, shop.inputs)
    assert told is not None
    assert "larger shards, which a worker holds in memory, would take more than 4.3 GB" in told


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
        ("no_such.module:noise", "the package of no_such.module cannot be imported"),
    ],
)
def test_a_module_that_is_not_there_is_told_before_anything_begins(shop: Shop, named: str | None, said: str) -> None:
    with pytest.raises(StageError, match=rf"pairs\.custom = .*{said}"):
        pairs.describe(shop.config(coupling="custom", custom=named), shop.inputs)


def test_a_function_that_is_not_there_is_told(shop: Shop) -> None:
    config = shop.config(coupling="custom", custom="own_couplings:nothing")
    with pytest.raises(StageError, match="has no function 'nothing'"):
        Encoder(pairs.setup(config, shop.of(config), shop.begin(config)))


def test_a_custom_coupling_of_a_package_imports_its_neighbours(shop: Shop) -> None:
    package = shop.root / "own_couplings_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scale.py").write_text("HALF = 0.05\n")
    code = "def noise(images, labels, rng):\n    return HALF + rng.standard_normal(images.shape)"
    (package / "ours.py").write_text(f"from .scale import HALF\n\n{code}\n")
    store = shop.make(shop.config(coupling="custom", custom="own_couplings_package.ours:noise"))
    assert abs(store.manifest["moments"]["mean"] - 0.05) < 0.02


def test_options_of_other_couplings_leave_a_fingerprint_alone() -> None:
    config = pairs.PairsConfig(group_size=64, custom="a:b", reflow_nfe=7, reflow_guidance=1.0, reflow_of="nfm")
    assert pairs.for_coupling(config, "nfm").semantic() == pairs.PairsConfig().semantic()
    dealt = pairs.for_coupling(config, "minibatch-ot")
    assert dealt.semantic() == {**pairs.PairsConfig().semantic(), "coupling": "minibatch-ot", "group_size": 64}
    assert pairs.for_coupling(config, "reflow").reflow_nfe == 7
    assert pairs.for_coupling(config, "custom").custom == "a:b"


def test_each_coupling_says_what_it_is_made_from() -> None:
    roles = {
        name: pairs.input_roles(pairs.for_coupling(pairs.PairsConfig(), name))
        for name in ("nfm", "independent", "minibatch-ot", "custom", "semidiscrete-ot", "reflow")
    }
    plain = ("data",)
    assert roles == {
        "nfm": ("data", "teacher"), "independent": plain, "minibatch-ot": plain, "custom": plain,
        "semidiscrete-ot": ("data", "potential"), "reflow": ("data", "student"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([1], "must be an object with keys"),
        ({"a": [1]}, "coupling_options: a = a list of 1, it must be a finite number"),
        ({"a": float("nan")}, "must be a finite number"),
        ({"a": "x" * 2000}, "at most 1000 characters"),
        ({str(number): 1 for number in range(65)}, "65 of them, 64 at most"),
    ],
)
def test_a_hostile_recipe_is_refused(options: Any, said: str) -> None:
    recipe = {**PLAIN.to_dict(), "coupling_options": options}
    with pytest.raises(StorageError, match=said):
        StoreSpec.from_dict(recipe)


def test_a_recipe_says_what_its_pairs_were_made_with_and_nothing_else() -> None:
    assert set(PLAIN.to_dict()) == {
        "rows", "rows_per_shard", "fields", "coupling", "source", "rows_per_block", "codec", "value_range", "flips",
        "seed", "eta", "sigma_f", "teacher", "classes", "layout", "format",
    }  # fmt: skip
    more: dict[str, Any] = {
        "potential": "ab" * 32,
        "student": "cd" * 32,
        "coupling_options": {"nfe": 7, "grid": "square", "g": 0.5},
    }
    spec = dataclasses.replace(PLAIN, **more)
    assert spec.to_dict() == PLAIN.to_dict() | more
    assert StoreSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


FACTS: dict[str, Any] = {
    "images": 6000, "image_shape": [1, 8, 8], "classes": 10, "student": student.StudentConfig(patch=4, width=64),
    "teacher": TeacherConfig(patch=4, channels=64),
}  # fmt: skip


def test_the_arithmetic_of_pairs_is_told_of_each_coupling() -> None:
    def flops(coupling: str, **options: Any) -> float:
        return pairs_recipe.pair_flops(pairs.PairsConfig(coupling=coupling, **options), FACTS)

    assert flops("independent") == flops("custom", custom="a:b") == 0
    assert flops("nfm") == costs.teacher_flops([1, 8, 8], FACTS["teacher"])
    assert flops("minibatch-ot", group_size=100) == 2 * 64 * 100
    assert flops("minibatch-ot", group_size=1000) == 2 * 64 * 409, "4,096 records a shard, of 10 classes"
    assert flops("semidiscrete-ot") == 2 * 64 * 600
    assert flops("reflow", reflow_nfe=7) == 7 * costs.student_flops([1, 8, 8], FACTS["student"])
    assert flops("reflow", reflow_nfe=7, reflow_guidance=1.0) == 2 * flops("reflow", reflow_nfe=7)


@pytest.mark.parametrize("coupling", ["independent", "minibatch-ot", "semidiscrete-ot", "reflow"])
def test_a_plan_has_the_bytes_of_every_coupling_and_the_products_of_those_that_have_any(coupling: str) -> None:
    config = pairs.PairsConfig(coupling=coupling, draws=2)
    plan = pairs_plan.estimate(config, FACTS["teacher"], FACTS, [1], None)
    assert plan["pairs"] == 12_000
    assert "hours" not in plan
    text = pairs_plan.as_text(plan)
    assert ("none: this coupling runs no teacher" in text) == (coupling == "independent")
    assert pairs.cost(config, FACTS)["pairs"] == "12,000"
    assert ("FLOPs" in pairs.cost(config, FACTS)) == (coupling != "independent")


@pytest.mark.parametrize("fixture", sorted((Path(__file__).parents[1] / "fixtures").glob("*/**/spec.json")))
def test_a_recipe_of_before_is_written_as_it_was(fixture: Path) -> None:
    stored = atomic.read_json(fixture)["store"]
    assert read_spec(fixture.parent).to_dict() == stored
