"""The pairs stage: what decides a store's identity, what a store holds, and how it is sealed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nfm.stages.base import StageError
from nfm.stages.pairs import stage
from nfm.stages.stores import repair
from nfm.storage import DatasetWriter, ImageDataset, MissingShard, PairStore
from nfm.storage.files import atomic
from nfm.storage.format import philox
from nfm.storage.format.spec import StoreSpec, read_spec
from nfm.storage.ledger import commits

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_every_slot_holds_its_row_of_the_source_and_its_own_noise(made: Lab) -> None:
    store, source = PairStore.open(made.only("pairs").path), ImageDataset.open(made.only("data").path)
    rows = np.arange(len(source))
    for draw in range(store.draws):
        stored = store.gather(draw, rows)
        np.testing.assert_array_equal(stored["image"], source.images(rows))
        np.testing.assert_array_equal(stored["label"], source.labels(rows))
    first, second = (store.gather(draw, rows)["noise"].astype(np.float32) for draw in (0, 1))
    apart = np.sqrt(np.square(first - second).mean(axis=(1, 2, 3)))
    assert apart.min() > 0.01  # the draws' noises are of the same images under other eps'
    assert np.isfinite(store.index(["nll"])["nll"].to_numpy()).all()


def test_independent_noise_is_philox_noise_of_the_slot_alone(made: Lab) -> None:
    store = PairStore.open(made.only("pairs", "independent").path)
    slots = np.arange(40)
    expected = philox.normals(0, 1, slots, 64).reshape(-1, 1, 8, 8).astype(np.float16)
    np.testing.assert_array_equal(store.gather(1, slots)["noise"], expected)
    assert np.isnan(store.index(["nll"])["nll"].to_numpy()).all()


def test_stores_of_one_data_set_share_the_order_in_which_students_see_them(made: Lab) -> None:
    nfm, independent = (PairStore.open(made.only("pairs", name).path) for name in ("nfm", "independent"))
    assert nfm.order_key == independent.order_key
    assert nfm.content_digest != independent.content_digest
    for ours, theirs in zip(nfm.batches(64, seed=2), independent.batches(64, seed=2)):
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.label, theirs.label)


def test_flips_are_drawn_a_record_and_encoded_not_applied_later(lab: Lab) -> None:
    unflipped = lab.only("pairs").path
    lab.run("pairs", "pairs.flips=true", "pairs.draws=1")
    folder = next(store.path for store in lab.all("pairs") if store.spec["store"]["flips"])
    store, source = PairStore.open(folder), ImageDataset.open(lab.only("data").path)
    rows = np.arange(len(source))
    flip = store.index(["flip"])["flip"].to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(flip, philox.flips(0, 0, rows))
    assert 0.3 < flip.mean() < 0.7
    images = source.images(rows)
    np.testing.assert_array_equal(
        store.gather(0, rows)["image"], np.where(flip[:, None, None, None], images[..., ::-1], images)
    )
    plain = PairStore.open(unflipped).gather(0, rows)["noise"]
    assert not np.array_equal(plain[flip][..., ::-1], store.gather(0, rows)["noise"][flip])
    np.testing.assert_array_equal(plain[~flip], store.gather(0, rows)["noise"][~flip])
    lab.nfm("audit", folder, "--deep")


def test_the_noise_has_the_marginal_that_students_sample_from(made: Lab) -> None:
    moments = made.only("pairs").manifest()["moments"]
    assert abs(moments["mean"]) < 0.1
    assert abs(moments["var"] - 1) < 0.05


def test_the_noise_of_a_better_pairing_is_nearer_to_its_image(made: Lab) -> None:
    """A student on nfm pairs sees straighter targets: |z - x| is smaller than for independent noise."""

    def distance(coupling: str) -> float:
        store = PairStore.open(made.only("pairs", coupling).path)
        stored = store.gather(0, np.arange(len(store)))
        return float(np.square(stored["noise"].astype(np.float32) - (stored["image"] / 127.5 - 1)).mean())

    assert distance("nfm") < 0.7 * distance("independent")


def test_sealing_wants_every_shard_and_names_the_missing(lab: Lab) -> None:
    store = lab.only("pairs").path
    assert repair.complete_draws(store) == 2
    next(store.glob("commits/d001-s00002.json")).unlink()
    assert repair.complete_draws(store) == 1
    with pytest.raises(MissingShard, match="1 of 8 shards are not committed: d001-s00002"):
        stage.seal(store, 2)
    next(store.glob("commits/d000-s00000.json")).unlink()
    with pytest.raises(StageError, match="no draw is complete yet"):
        repair.complete_draws(store)


def test_a_seal_over_a_missing_payload_is_refused(lab: Lab) -> None:
    store = lab.only("pairs").path
    shard = next(store.glob("shards/d001-s00001.*"))
    shard.unlink()
    with pytest.raises(MissingShard, match=r"missing, though .*d001-s00001\.json says it was committed"):
        stage.seal(store, 2)


def test_the_recipe_names_teacher_source_eta_and_sigma(made: Lab) -> None:
    spec = read_spec(made.only("pairs").path)
    facts = made.only("teacher").manifest()["metrics"]
    assert spec.eta == 0.15
    assert spec.sigma_f == facts["sigma_f"]
    assert spec.teacher == made.only("teacher").manifest()["content_digest"]
    assert spec.source == made.only("data").manifest()["content_digest"]
    independent = read_spec(made.only("pairs", "independent").path)
    assert (independent.eta, independent.sigma_f, independent.teacher) == (None, None, None)


def test_a_default_section_has_the_fingerprint_that_it_always_had() -> None:
    assert stage.PairsConfig().semantic() == {
        "coupling": "nfm", "codec": "float16", "rows_per_shard": 4096, "rows_per_block": 256, "flips": False,
        "seed": 0, "batch_size": 256, "precision": "float32",
    }  # fmt: skip
    assert stage.PairsConfig(layout="zarr").semantic()["layout"] == "zarr"


def test_the_recipe_of_a_default_store_is_what_it_always_was(made: Lab) -> None:
    assert set(made.only("pairs").spec["store"]) == {
        "rows", "rows_per_shard", "fields", "coupling", "source", "rows_per_block", "codec", "value_range", "flips",
        "seed", "eta", "sigma_f", "teacher", "classes", "layout", "format",
    }  # fmt: skip


def test_an_old_recipe_without_the_later_keys_is_still_its_inputs_own(made: Lab) -> None:
    store = made.only("pairs")
    inputs = {role: made.only(role).path for role in ("data", "teacher")}
    found = read_spec(store.path)
    old = StoreSpec.from_dict({key: value for key, value in store.spec["store"].items() if key != "layout"})
    assert stage.recipe(store.manifest(), inputs, old) == old == found


def test_latents_are_not_flipped_and_pixels_have_no_scale(tmp_path: Path) -> None:
    latents = np.zeros((3, 4, 8, 8), np.float16)
    writer = DatasetWriter(tmp_path, "latents", (4, 8, 8), [], dtype="float16", image_scale=0.5, image_decoder="vae")
    writer.write_split("train", 3, [(latents, np.full(3, -1), ["a", "b", "c"])])
    writer.close()
    atomic.write_json(tmp_path / "manifest.json", {"content_digest": "ab" * 32})
    inputs = {"data": tmp_path}
    spec = StoreSpec.from_dict(stage.describe(stage.PairsConfig(coupling="independent", codec="int8"), inputs)["store"])
    assert (spec.field("image").dtype, spec.image_scale, spec.image_decoder) == ("float16", 0.5, "vae")
    assert (spec.codec, spec.noise_step, spec.classes, spec.has("label")) == ("int8", 0.05, None, False)
    with pytest.raises(StageError, match=r"pairs\.flips = true: these images are latents"):
        stage.describe(stage.PairsConfig(coupling="independent", flips=True), inputs)


@pytest.mark.parametrize("layout", ["samples", "zarr"])
def test_pairs_are_the_same_in_every_layout(lab: Lab, layout: str) -> None:
    blocks = PairStore.open(lab.only("pairs", "independent").path)
    lab.run("pairs", "pairs.coupling=independent", f"pairs.layout={layout}")
    folder = next(store.path for store in lab.all("pairs") if store.spec["store"]["layout"] == layout)
    found = PairStore.open(folder)
    assert found.order_key == blocks.order_key
    slots = np.random.default_rng(0).permutation(len(found))
    for draw in range(2):
        ours, theirs = found.gather(draw, slots), blocks.gather(draw, slots)
        for name in ("image", "noise", "label"):
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_an_auto_batch_is_probed_once_and_stands_in_the_spec_from_then_on(lab: Lab) -> None:
    lab.run("pairs", 'pairs.batch_size="auto"', "pairs.draws=1")
    store = next(found for found in lab.all("pairs") if found.spec["config"]["batch_size"] == "auto")
    encoding = store.spec["encoding"]
    assert encoding["batch_size"] in map(int, encoding["probe"])
    assert encoding["batch_size"] <= 64  # a shard's rows
    lab.run("pairs", 'pairs.batch_size="auto"', "pairs.draws=2")
    assert store.spec["encoding"] == encoding
    used = {commit.batch_size for commit in commits.committed(store.path, 2).values()}
    assert used == {encoding["batch_size"]}
    info = lab.nfm("pairs", "info", store.path).stdout
    assert f"batch sizes        [{encoding['batch_size']}]" in info
    assert "noise error" in info
