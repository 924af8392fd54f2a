"""Codec `seeded`: shards keep no noise, and readers get the noise of a float32 store, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.storage import Mixture, PairStore
from nfm.storage.errors import CorruptShard, StorageError
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.export import export
from nfm.storage.format import philox
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec, read_spec, write_spec
from nfm.storage.layouts import LAYOUTS
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import verify

SHAPE = (1, 4, 4)
OTHERS = [name for name in LAYOUTS if name != "blocks"]
Make = Callable[..., PairStore]


def drawn(spec: StoreSpec, draw: int, shard: int, dealt: bool = True) -> dict[str, np.ndarray]:
    """The records of a shard; their noises are those that the seed draws for its slots, in another order if `dealt`."""
    slots = np.array(spec.slots_of(shard))
    noise = philox.normals(spec.seed, draw, slots, int(np.prod(SHAPE))).reshape(-1, *SHAPE)
    order = np.random.default_rng((draw, shard)).permutation(len(slots)) if dealt else slice(None)
    images = np.stack([np.full(SHAPE, slot, np.uint8) for slot in slots])
    return {"image": images, "noise": noise[order], "label": slots % 10, "slot": slots}


@pytest.fixture
def make(tmp_path: Path, spec_of: Any) -> Make:
    """make("zarr", "seeded", seed=1): a sealed store of two draws, its noises dealt within each shard."""
    made = iter(range(99))

    def build(layout: str = "blocks", codec: str = "seeded", root: Any = None, **other: Any) -> PairStore:
        spec = spec_of(layout, codec, **({"classes": 10} | other))
        root = tmp_path / f"store{next(made)}" if root is None else root
        write_spec(root, spec)
        for draw in range(2):
            for shard in range(spec.shards_per_draw):
                records = [drawn(spec, draw, shard)]
                commits.publish(root, write_shard(root, spec, draw, shard, "a", records))
        seal.seal(root, 2)
        return PairStore.open(root)

    return build


def altered(store: PairStore) -> Path:
    """The file of draw 0's first origins, with the slot of record 0 raised by one."""
    sealed = store.sealed.of(0)[0]
    path = Path(store.root) / ("d000/noise_origin/c/0/0" if store.spec.layout == "zarr" else sealed.payload.path)
    data = path.read_bytes()
    origin = store.shard(0, 0).read("noise_origin", 0, 1).astype("<i8")
    at = data.index(origin.tobytes())
    path.write_bytes(data[:at] + (origin + np.array([0, 1, 0])).astype("<i8").tobytes() + data[at + origin.nbytes :])
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_made_again_is_that_of_a_float32_store_bit_for_bit(make: Make, layout: str) -> None:
    made, stored = make(layout), make(layout, "float32")
    assert made.order_key == stored.order_key
    assert made.manifest["moments"] == stored.manifest["moments"]
    slots = np.random.default_rng(0).permutation(50)
    for draw in range(2):
        ours, theirs = made.gather(draw, slots), stored.gather(draw, slots)
        assert ours["noise"].tobytes() == theirs["noise"].tobytes()
        assert list(ours) == list(theirs)
        assert made.shard(draw, 1).read("noise", 3, 9).tobytes() == stored.shard(draw, 1).read("noise", 3, 9).tobytes()
    assert verify(made.root, level="deep") == []


@pytest.mark.parametrize(
    "how", [{}, {"prefetch": False}, {"soften": 0.3}, {"raw": True}, {"filter": [("label", "<", 5)]}]
)
def test_batches_are_those_of_a_float32_store(make: Make, how: dict[str, Any]) -> None:
    made, stored = make(), make(codec="float32")
    for ours, theirs in zip(made.batches(8, 3, 2, **how), stored.batches(8, 3, 2, **how), strict=True):
        for name in ("noise", "image", "label", "slot", "draw"):
            assert getattr(ours, name).tobytes() == getattr(theirs, name).tobytes()


def test_workers_of_a_data_loader_make_the_noise(make: Make) -> None:
    from torch.utils.data import DataLoader

    made, stored = make(), make(codec="float32")
    ours = DataLoader(made.as_torch_dataset(10), batch_size=None, num_workers=2)
    theirs = DataLoader(stored.as_torch_dataset(10), batch_size=None)
    for one, other in zip(ours, theirs, strict=True):
        assert one["noise"].numpy().tobytes() == other["noise"].numpy().tobytes()


def test_a_mixture_joins_it_with_stored_noise(make: Make) -> None:
    made, stored, half = make(), make(codec="float32"), make(codec="float16", seed=1)
    ours, theirs = (Mixture([(store, 0.5), (half, 0.5)]).batches(10) for store in (made, stored))
    for one, other in zip(ours, theirs, strict=True):
        assert one.noise.tobytes() == other.noise.tobytes()


@pytest.mark.parametrize("layout", ["blocks", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_it_is_read_from_an_object_store(make: Make, bucket: str, layout: str) -> None:
    made, stored = make(layout, root=f"{bucket}/made"), make(layout, "float32")
    slots = np.arange(49, -1, -1)
    assert made.gather(1, slots)["noise"].tobytes() == stored.gather(1, slots)["noise"].tobytes()
    assert verify(made.root, level="default") == []


def test_a_pair_of_64_px_takes_a_third_of_the_bytes_of_float16() -> None:
    sizes = {}
    for codec in ("seeded", "float16", "float32"):
        spec = StoreSpec(
            rows=512, rows_per_shard=512, fields=pair_fields((3, 64, 64), codec), coupling="independent",
            source="ab" * 32, codec=codec,
        )  # fmt: skip
        sizes[codec] = LAYOUTS["blocks"].shard_bytes(spec, 512) / 512
    assert sizes["seeded"] < 0.34 * sizes["float16"]
    assert sizes["seeded"] < 0.21 * sizes["float32"]


def test_stores_of_two_seeds_have_different_contents(make: Make) -> None:
    assert make(seed=1).content_digest != make(seed=2).content_digest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_origin_that_was_altered_is_found_and_never_read_as_other_noise(make: Make, layout: str) -> None:
    store = make(layout)
    path = altered(store)
    store = PairStore.open(store.root)
    said = rf"^{path}: record 0 \(from 0\) says that its noise is of draw 0, slot \d+, and .* has not the check sum"
    with pytest.raises(CorruptShard, match=said):
        store.gather(0, np.array([5, 0]))
    with pytest.raises(CorruptShard, match=said):
        store.shard(0, 0).read("noise", 0, 3)
    assert any(str(path) == finding.file for finding in verify(store.root, level="default"))


def test_numbers_that_no_record_has_are_refused(make: Make) -> None:
    store = make()
    made = store.shard(0, 0).made
    for origin in ([0, 50, 0], [0, -1, 0], [-1, 0, 0], [1000, 0, 0]):
        with pytest.raises(CorruptShard, match=rf"a.tar: record 7 .* draw {origin[0]}, slot {origin[1]}, which no"):
            made(np.array([origin]), [Path("a.tar")], np.array([7]))


def test_noise_that_the_seed_does_not_draw_is_refused_and_nothing_is_left(tmp_path: Path, spec_of: Any) -> None:
    spec = spec_of(codec="seeded", classes=10)
    write_spec(tmp_path, spec)
    records = drawn(spec, 0, 0)
    records["noise"][7, 0, 0, 0] = np.nextafter(records["noise"][7, 0, 0, 0], np.float32(9))
    with pytest.raises(
        StorageError, match=r"noise of draw 0, slot 7 is not, bit for bit, what seed 0 draws.*use codec float16"
    ):
        write_shard(tmp_path, spec, 0, 0, "a", [records])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "spec.json"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports_store_the_noise_and_make_it_again(make: Make, tmp_path: Path, layout: str) -> None:
    made = make()
    export(made, tmp_path / "there", layout, "float32")
    there = PairStore.open(tmp_path / "there")
    assert there.content_digest == make(layout, "float32").content_digest
    exported = export(there, tmp_path / "back", "blocks", "seeded").body["exported"]
    assert "rms_error" not in exported
    back, slots = PairStore.open(tmp_path / "back"), np.arange(50)
    assert back.gather(1, slots)["noise"].tobytes() == made.gather(1, slots)["noise"].tobytes()
    export(made, tmp_path / "half", layout, "float16")
    assert PairStore.open(tmp_path / "half").content_digest == make(layout, "float16").content_digest


def test_an_export_that_would_have_to_keep_noise_writes_nothing(make: Make, tmp_path: Path) -> None:
    with pytest.raises(WrongArgument, match=r"codec seeded does not fit .* slot 0 is not, bit for bit, what seed"):
        export(make(codec="float16"), tmp_path / "out", "blocks", "seeded")
    assert not (tmp_path / "out").exists()


def test_pairs_made_elsewhere_have_noise_of_their_own() -> None:
    with pytest.raises(StorageError, match=r"codec seeded.*take float32, float16, int8"):
        StoreSpec.external(rows=5, image_shape=SHAPE, origin="a test", codec="seeded")


def test_the_recipe_is_the_same_after_its_way_through_a_file(make: Make) -> None:
    store = make()
    assert read_spec(store.root) == store.spec
    assert store.spec.field("noise").dtype == "float32"
    assert dataclasses.replace(store.spec, seed=3) != store.spec
