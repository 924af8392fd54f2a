"""Every source of pairs: what it promises of labels, images and noise, and that its store can be made again."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.stages.base import StageError
from nfm.stages.couplings.facts import facts_of
from nfm.stages.encoding.encoder import Encoder
from nfm.stages.executors.jobs import Job, new_attempt
from nfm.stages.pairs import recipe, stage
from nfm.stages.trained import potential, student
from nfm.storage import PairStore
from nfm.storage.files import atomic
from nfm.storage.format import philox
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import read_spec, shard_name
from nfm.storage.ledger import seal
from nfm.trainers import solvers
from tests.stages.pairs.shop import EVERY, OF_A_SLOT, OPTIONS, ROWS, Shop, all_of, cost_of, eps_of, store_images


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
    encoder = Encoder(pickle.loads(pickle.dumps(stage.setup(config, shop.of(config), Path(store.root)))))
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
    workers = [Encoder(stage.setup(other, shop.of(other), out)) for _ in range(2)]
    for number, name in enumerate(reversed(seal.names_of(read_spec(out), 2))):
        draw, shard = int(name[1:4]), int(name[6:])
        workers[number % 2].encode_shard(Job(shard_name(draw, shard), new_attempt()))
    seal.seal(out, 2)
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
    stage.run(config, shop.of(config), out, shop.heard)
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
        Encoder(stage.setup(config, shop.of(config), out)).encode_shard(Job("d000-s00000", "a1"), lambda: next(looks))
    assert not [path for folder in ("shards", "index", "commits") for path in out.glob(f"{folder}/*")]


@pytest.mark.parametrize(("coupling", "size"), [("minibatch-ot", 256), ("semidiscrete-ot", 64)])
def test_an_auto_batch_of_no_teacher_is_not_probed(shop: Shop, coupling: str, size: int) -> None:
    config = shop.config(coupling=coupling, batch_size="auto")
    out = shop.begin(config)
    assert atomic.read_json(out / "spec.json")["encoding"] == {"batch_size": size}
    assert stage.setup(config, shop.of(config), out).batch_size == size


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


def test_data_without_classes_is_one_class(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shop = Shop(tmp_path, tmp_path_factory, dtype="float32", classes=0)
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
def test_a_reflowed_image_is_what_the_student_makes_of_the_noise(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, dtype: str
) -> None:
    shop = Shop(tmp_path, tmp_path_factory, dtype)
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
        ({"reflow_solver": "sde-heun"}, r"an image is no function of the noise that it began with; take euler, heun"),
        ({"reflow_nfe": 8}, "nfe = 8: heun takes 2N - 1 evaluations"),
        ({"reflow_grid": "cube"}, r"pairs\.reflow_grid = 'cube' is unknown; there are uniform, square"),
    ],
)
def test_a_solver_that_cannot_have_the_nfe_is_refused_before_anything_begins(
    shop: Shop, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(StageError, match=said):
        shop.begin(shop.config(coupling="reflow", **options))


@pytest.mark.parametrize("coupling", ["semidiscrete-ot", "reflow"])
def test_another_maker_than_the_recipes_is_refused(shop: Shop, coupling: str) -> None:
    config = shop.config(coupling=coupling, **OPTIONS[coupling])
    out = shop.begin(config)
    setup, folder = stage.setup(config, shop.of(config), out), shop.inputs[str(facts_of(coupling).made_with)]
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


def test_shards_are_not_advised_beyond_memory(shop: Shop) -> None:
    config = shop.config(coupling="minibatch-ot", group_size=512, rows_per_shard=64)
    told = recipe.small_groups(recipe.store_spec(config, shop.inputs), shop.inputs)
    assert told is not None
    assert "about 210; a worker holds its shard in memory, 0.1 MB then" in told
    spec = dataclasses.replace(recipe.store_spec(config, shop.inputs), fields=pair_fields((3, 2048, 2048), "float32"))
    told = recipe.small_groups(spec, shop.inputs)
    assert told is not None
    assert "larger shards, which a worker holds in memory, would take more than 4.3 GB" in told


@pytest.mark.parametrize("coupling", [name for name in EVERY if facts_of(name).gaussian])
def test_noise_that_is_drawn_need_not_be_stored(shop: Shop, coupling: str) -> None:
    options = {"coupling": coupling, "flips": True, **OPTIONS[coupling]}
    made = shop.make(shop.config(codec="seeded", **options), "seeded")
    stored = shop.make(shop.config(codec="float32", **options), "stored")
    for draw in range(2):
        assert all_of(made, draw)["noise"].tobytes() == all_of(stored, draw)["noise"].tobytes()
    assert made.sealed.bytes < stored.sealed.bytes
    assert shop.audit(made) == []
