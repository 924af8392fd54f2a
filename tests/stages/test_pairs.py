"""The pairs stage: what decides a store's identity, what a store holds, and how it is sealed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from nfm.stages import pairs, pairs_upkeep
from nfm.stages.stage import StageError
from nfm.storage import ImageDataset, MissingShard, PairStore, philox
from nfm.storage.schema import read_spec

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
    for ours, theirs in zip(nfm.batches(64, seed=2, copy=True), independent.batches(64, seed=2, copy=True)):
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
    assert pairs_upkeep.complete_draws(store) == 2
    next(store.glob("commits/d001-s00002.json")).unlink()
    assert pairs_upkeep.complete_draws(store) == 1
    with pytest.raises(MissingShard, match="1 of 8 shards are not committed: d001-s00002"):
        pairs.seal(store, 2)
    next(store.glob("commits/d000-s00000.json")).unlink()
    with pytest.raises(StageError, match="no draw is complete yet"):
        pairs_upkeep.complete_draws(store)


def test_a_seal_over_a_missing_payload_is_refused(lab: Lab) -> None:
    store = lab.only("pairs").path
    shard = next(store.glob("shards/d001-s00001.*"))
    shard.unlink()
    with pytest.raises(StageError, match=r"missing, though .*d001-s00001\.json says it was committed"):
        pairs.seal(store, 2)


def test_the_recipe_names_teacher_source_eta_and_sigma(made: Lab) -> None:
    spec = read_spec(made.only("pairs").path)
    facts = made.only("teacher").manifest()["metrics"]
    assert spec.eta == 0.15
    assert spec.sigma_f == facts["sigma_f"]
    assert spec.teacher == made.only("teacher").manifest()["content_digest"]
    assert spec.source == made.only("data").manifest()["content_digest"]
    independent = read_spec(made.only("pairs", "independent").path)
    assert (independent.eta, independent.sigma_f, independent.teacher) == (None, None, None)
