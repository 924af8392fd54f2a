"""PairWriter makes a store from a user's own pairs, in batches of any size, and continues after any interruption."""

from __future__ import annotations

import dataclasses
import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.storage import Mixture, PairStore, PairWriter, StorageError, StoreSpec
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.export import export
from nfm.storage.files import atomic
from nfm.storage.ledger import commits, pair_writer, seal, shard_writer
from nfm.storage.verify import verify
from tests.support.forkserver import context

ROWS = 50
ORIGIN = "EDM teacher of run 12, seed 3"


def spec_of(**other: Any) -> StoreSpec:
    """50 rows in shards of 20: the last shard is short."""
    sizes = {"rows": ROWS, "image_shape": (1, 4, 4), "classes": 10, "rows_per_shard": 20, "rows_per_block": 5}
    return StoreSpec.external(**(sizes | {"origin": ORIGIN} | other))


def pairs(draw: int = 0, dtype: str = "uint8") -> dict[str, np.ndarray]:
    rng, slots = np.random.default_rng(draw), np.arange(ROWS)
    image = np.broadcast_to(slots[:, None, None, None] / (1 if dtype == "uint8" else 50), (ROWS, 1, 4, 4)).astype(dtype)
    return {"image": image, "noise": rng.standard_normal((ROWS, 1, 4, 4)), "label": slots % 10}


def part(batch: dict[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: array[start:stop] for name, array in batch.items()}


def write(root: str | Path, spec: StoreSpec, size: int = 7, draws: int = 1) -> PairStore:
    dtype = spec.field("image").dtype
    with PairWriter(root, spec, draws) as writer:
        for draw in range(draws):
            for start in range(writer.next_slot(draw), ROWS, size):
                writer.write(draw=draw, **part(pairs(draw, dtype), start, start + size))
    return PairStore.open(root)


def stopped(root: str | Path, spec: StoreSpec, records: int) -> None:
    """Writes some records of draw 0, and then an error leaves the block."""
    with PairWriter(root, spec) as writer:
        writer.write(**part(pairs(), 0, records))
        raise ZeroDivisionError


def test_batches_of_any_size_of_numpy_or_torch_make_the_same_store(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", spec_of(), size=ROWS)
    assert write(tmp_path / "sevens", spec_of(), size=7).content_digest == whole.content_digest
    batch = pairs()
    with PairWriter(tmp_path / "single", spec_of()) as writer:
        for slot in range(ROWS):
            tensor = torch.tensor(batch["noise"][slot], requires_grad=True)
            writer.write(image=batch["image"][slot], noise=tensor,
                         label=torch.tensor(slot % 10) if slot % 2 else slot % 10)  # fmt: skip
    single = PairStore.open(tmp_path / "single")
    assert (single.content_digest, single.order_key) == (whole.content_digest, whole.order_key)
    assert single.spec.coupling_options == {"origin": ORIGIN}
    stored = single.gather(0, np.arange(ROWS))
    np.testing.assert_array_equal(stored["image"], batch["image"])
    np.testing.assert_array_equal(stored["noise"], batch["noise"].astype("f4").astype("f2"))
    assert not verify(tmp_path / "single", level="deep")


def test_a_row_is_one_image_in_a_batch_between_batches_and_mirrored(tmp_path: Path) -> None:
    batch = part(pairs(), 0, 4)
    twice = {name: np.concatenate([values, values]) for name, values in batch.items()}
    rows, flip = np.tile(np.arange(4), 2), np.arange(8) >= 4
    twice["image"][4:] = twice["image"][4:, ..., ::-1]
    writer = PairWriter(tmp_path, spec_of(flips=True))
    writer.write(**twice, row=rows, flip=flip)
    for wrong in (rows % 2, np.roll(rows, 1)):
        with pytest.raises(StorageError, match=r"slot 8: row: \d in record \d of the batch was given before"):
            writer.write(**twice, row=wrong, flip=flip)
    with pytest.raises(StorageError, match="another image or label"):
        writer.write(**batch | {"label": (batch["label"] + 1) % 10}, row=rows[:4])
    writer.write(**batch, row=rows[:4])
    assert writer.next_slot() == 12


def test_a_draw_is_taken_by_value(tmp_path: Path) -> None:
    with PairWriter(tmp_path, spec_of(), draws=2.0) as writer:
        for draw in (0.0, np.float64(1)):
            writer.write(**pairs(), draw=draw)
    assert PairStore.open(tmp_path).draws == 2


def test_columns_of_the_index_may_be_given(tmp_path: Path) -> None:
    rows = np.arange(ROWS)[::-1]
    with PairWriter(tmp_path, spec_of(flips=True)) as writer:
        writer.write(**pairs(), row=rows, flip=rows % 2 == 0, nll=rows / 100)
    index = PairStore.open(tmp_path).index(["row", "flip", "nll"])
    assert index["row"].to_pylist() == rows.tolist()
    assert index["flip"].to_pylist() == (rows % 2 == 0).tolist()
    np.testing.assert_allclose(index["nll"].to_numpy(), rows / 100, rtol=1e-6)


NAN = np.where(np.arange(16).reshape(1, 4, 4) == 3, np.nan, 0.0)
WRONG: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({}, {"image": np.zeros((5, 1, 4, 5), np.uint8)}, ("image: is 5x1x4x5", "1x4x4 a record")),
    ({}, {"image": np.zeros((5, 1, 4, 4))}, ("image: float64", "uint8", "image_dtype='float32'")),
    ({}, {"noise": np.zeros((5, 1, 4, 4), np.int64)}, ("noise: int64", "give floats")),
    ({}, {"noise": np.zeros((4, 1, 4, 4))}, ("noise: 4 records, image has 5",)),
    ({}, {"noise": np.zeros((1, 4, 4))}, ("noise: is 1x4x4", "batch")),
    ({}, {"noise": np.stack([np.zeros((1, 4, 4))] * 2 + [NAN] * 3)}, ("noise: nan in record 2",)),
    ({}, {"noise": np.full((5, 1, 4, 4), 1e5)}, ("noise: 100000.0 in record 0", "float16", "float32 takes more")),
    ({"codec": "float32"}, {"noise": np.full((5, 1, 4, 4), 1e39)}, ("noise: 1e+39", "too large for float32")),
    ({"codec": "int8"}, {"noise": np.full((5, 1, 4, 4), np.inf)}, ("noise: inf in record 0", "not finite")),
    ({}, {"label": np.array([0, 1, 2, 10, 3])}, ("label: 10 in record 3", "0 to 9")),
    ({}, {"label": np.array([0, 1, 2, -1, 3])}, ("label: -1 in record 3",)),
    ({}, {"label": np.zeros(5)}, ("label: float64", "whole numbers")),
    ({}, {"label": None}, ("label: not given",)),
    ({}, {"label": "cat"}, ("label: is one value",)),
    ({"classes": None}, {}, ("label: the spec of the store has no such field", "give classes")),
    ({}, {"caption": np.zeros(5)}, ("caption: the spec of the store has no such field", "row, flip, nll")),
    ({}, {"row": np.full(5, 50)}, ("row: 50 in record 0", "0 to 49")),
    ({}, {"flip": np.ones(5)}, ("flip: float64", "booleans")),
    ({}, {"flip": np.arange(5) > 2}, ("flip: True in record 3", "the spec has flips=False; set it True")),
    ({}, {"nll": np.full(5, 1e300)}, ("nll: 1e+300 in record 0", "too large for float32")),
    ({}, {"nll": np.full(5, np.inf)}, ("nll: inf in record 0", "leave nll out")),
    ({}, {"nll": np.array([1, 1, np.nan, 1, 1])}, ("nll: nan in record 2", "leave nll out")),
    ({"image_dtype": "float32"}, {"image": np.full((5, 1, 4, 4), 3.0)}, ("image: 3.0", "value_range [-1, 1]")),
    ({"image_dtype": "float32"}, {"image": np.stack([NAN] * 5)}, ("image: nan in record 0", "not finite")),
    ({"image_dtype": "float16", "value_range": (-1e6, 1e6)}, {"image": np.full((5, 1, 4, 4), 1e5)}, ("float16",)),
    (
        {},
        {"noise": torch.zeros(5, 1, 4, 4, dtype=torch.bfloat16)},
        ("noise: no array", "Tensor", ".float() of a tensor"),
    ),
    ({}, {"noise": torch.empty(5, 1, 4, 4, device="meta")}, ("noise: no array", "meta tensor")),
    ({}, {"noise": [[1.0], [1.0, 2.0]]}, ("noise: no array", "list")),
    ({}, {"noise": np.full((5, 1, 4, 4), None)}, ("noise: object",)),
    ({}, {"draw": 1}, ("draw 1", "draws 0 to 0")),
]


@pytest.mark.parametrize(("options", "change", "said"), WRONG)
def test_a_wrong_batch_is_refused_by_field_and_record_and_none_of_it_is_kept(
    options: dict[str, Any], change: dict[str, Any], said: tuple[str, ...], tmp_path: Path
) -> None:
    writer = PairWriter(tmp_path, spec_of(**options))
    with pytest.raises(StorageError) as error:
        writer.write(**({"draw": 0} | part(pairs(), 0, 5) | change))
    for words in (str(tmp_path), *said):
        assert words in str(error.value)
    assert writer.next_slot() == 0


def test_what_the_caller_does_with_her_array_afterwards_changes_nothing(tmp_path: Path) -> None:
    image, noise = np.zeros((1, 1, 4, 4), np.uint8), np.zeros((1, 1, 4, 4), np.float32)
    with PairWriter(tmp_path, spec_of()) as writer:
        for slot in range(ROWS):
            image[:], noise[:] = slot, slot / 50
            writer.write(image=image, noise=noise, label=[slot % 10])
    np.testing.assert_array_equal(PairStore.open(tmp_path).gather(0, np.arange(ROWS))["image"], pairs()["image"])


def test_the_same_images_and_labels_have_the_same_order_key_whatever_else_differs(tmp_path: Path) -> None:
    one = write(tmp_path / "one", spec_of())
    other = write(tmp_path / "other", spec_of(origin="else", codec="int8", layout="zarr", rows_per_shard=10), size=3)
    assert one.order_key == other.order_key
    assert next(iter(Mixture([(one, 0.5), (other, 0.5)]).batches(ROWS))).slot.tolist() != list(range(ROWS))
    assert write(tmp_path / "range", spec_of(value_range=(0, 1))).order_key != one.order_key
    with PairWriter(tmp_path / "labels", spec_of()) as writer:
        writer.write(**(pairs() | {"label": pairs()["label"][::-1]}))
    assert PairStore.open(tmp_path / "labels").order_key != one.order_key


def test_draws_are_written_side_by_side_and_have_the_same_images(tmp_path: Path) -> None:
    with PairWriter(tmp_path / "side", spec_of(), draws=2) as writer:
        for start in range(0, ROWS, 9):
            for draw in (0, 1):
                writer.write(draw=draw, **part(pairs(draw), start, start + 9))
    side = PairStore.open(tmp_path / "side")
    assert side.content_digest == write(tmp_path / "after", spec_of(), draws=2).content_digest
    with PairWriter(tmp_path / "other", spec_of(), draws=2) as writer:
        writer.write(**pairs())
        wrong = pairs(1)
        wrong["image"] = wrong["image"].copy()
        wrong["image"][33] = 0
        with pytest.raises(StorageError, match="slot 33 of draw 1 has another image than in draw 0"):
            writer.write(draw=1, **wrong)
        assert (writer.written(1), writer.next_slot(1)) == (20, 20)
        writer.write(draw=1, **part(pairs(1), 20, ROWS))
    with PairWriter(tmp_path / "given", spec_of(source="ab" * 32), draws=2) as writer:
        writer.write(**pairs())
        writer.write(draw=1, **wrong)
    assert PairStore.open(tmp_path / "given").draws == 2


@pytest.mark.parametrize("layout", ["blocks", "samples", "zarr"])
def test_after_an_error_the_same_code_goes_on_to_the_same_store(layout: str, tmp_path: Path) -> None:
    spec = spec_of(layout=layout)
    with pytest.raises(ZeroDivisionError):
        stopped(tmp_path / "store", spec, 45)
    with pytest.raises(StorageError, match="begun and not sealed; run the code"):
        PairStore.open(tmp_path / "store")
    writer = PairWriter(tmp_path / "store", spec)
    assert (writer.written(), writer.next_slot()) == (40, 40)
    store = write(tmp_path / "store", spec, draws=2)
    whole = write(tmp_path / "whole", spec, draws=2)
    assert (store.content_digest, store.order_key) == (whole.content_digest, whole.order_key)
    assert not verify(tmp_path / "store", level="deep")


def test_missing_rows_are_named_and_more_rows_than_the_spec_has_are_refused(tmp_path: Path) -> None:
    said = r"draw 1 lacks its rows from slot 20 to 39 \(5 of them were written.*and 1 more shards.*next_slot\(1\) = 20"
    writer = PairWriter(tmp_path, spec_of(), draws=2)
    writer.write(**pairs())
    writer.write(draw=1, **part(pairs(1), 0, 25))
    with pytest.raises(StorageError, match=said), writer:
        pass
    assert not seal.numbers(tmp_path)
    with PairWriter(tmp_path, spec_of(), draws=2) as writer:
        writer.write(draw=1, **part(pairs(1), 20, 45))
        with pytest.raises(StorageError, match="50 rows, and this batch ends at 51"):
            writer.write(draw=1, **part(pairs(1), 0, 6))
        writer.write(draw=1, **part(pairs(1), 45, ROWS))
    with pytest.raises(StorageError, match="closed"):
        writer.write(**pairs())


def killed(root: str, name: str, at: int) -> None:
    owner = {"remove": pair_writer, "write_index": shard_writer, "create_json": commits}.get(name, seal)
    name = "create_json" if name == "sealing" else name
    real, calls = getattr(owner, name), iter(range(at))

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(owner, name, dies)
    write(root, spec_of(), draws=2)


def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    moments = (("write_index", 1), ("create_json", 2), ("remove", 0), ("sealing", 0))
    for name, at in moments:
        child = context.Process(target=killed, args=(str(tmp_path / "store"), name, at))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, name
        assert not seal.numbers(tmp_path / "store")
    store, whole = write(tmp_path / "store", spec_of(), draws=2), write(tmp_path / "whole", spec_of(), draws=2)
    assert (store.content_digest, store.order_key) == (whole.content_digest, whole.order_key)
    assert not verify(tmp_path / "store", level="deep")
    files = sorted(path.suffix for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert files == sorted(path.suffix for path in (tmp_path / "whole").rglob("*") if path.is_file())


def test_one_of_two_simultaneous_writers_gets_an_error_and_the_store_is_intact(tmp_path: Path) -> None:
    one, other = PairWriter(tmp_path / "both", spec_of()), PairWriter(tmp_path / "both", spec_of())
    one.write(**part(pairs(), 0, 20))
    with pytest.raises(StorageError, match="d000-s00000 was committed by another writer"):
        other.write(**part(pairs(), 0, 20))
    one.write(**part(pairs(), 20, ROWS))
    one.close()
    alone = write(tmp_path / "alone", spec_of())
    assert write(tmp_path / "both", spec_of()).content_digest == alone.content_digest
    assert not verify(tmp_path / "both", level="deep")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"codec": "float32"}, "its codec is 'float16', here 'float32'"), ({"rows": 51}, "its rows is 50, here 51"),
     ({"origin": "other"}, "its origin is .*, here 'other'"), ({"source": "ab" * 32}, "source")],
)  # fmt: skip
def test_another_spec_is_refused_by_the_name_of_what_differs(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    PairWriter(tmp_path, spec_of())
    with pytest.raises(StorageError, match=said):
        PairWriter(tmp_path, spec_of(**change))
    write(tmp_path, spec_of())
    with pytest.raises(StorageError, match=f"another store is there.*{said}"):
        PairWriter(tmp_path, spec_of(**change))


def test_a_folder_of_other_things_and_fewer_draws_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"something else already \(notes.txt\)"):
        PairWriter(tmp_path, spec_of())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write(tmp_path / "store", spec_of(), draws=2)
    with pytest.raises(StorageError, match="has 2 draws already"):
        PairWriter(tmp_path / "store", spec_of())
    with pytest.raises(StorageError, match="origin"):
        spec_of(origin=" ")


def test_a_store_of_a_stage_or_an_export_takes_no_pairs_of_ones_own(tmp_path: Path) -> None:
    """They became a generation of it, and a later run trained on them."""
    export(write(tmp_path / "mine", spec_of()), tmp_path / "exported")
    write(tmp_path / "staged", spec_of())
    body = atomic.read_json(tmp_path / "staged/spec.json")
    atomic.write_json(tmp_path / "staged/spec.json", {**body, "stage": "pairs"})
    for name, maker in {"exported": "`nfm pairs export` made", "staged": "the pairs stage made"}.items():
        spec = PairStore.open(tmp_path / name).spec
        with pytest.raises(StorageError, match=f"{name}: {maker} this store.* to another folder"):
            PairWriter(tmp_path / name, spec, draws=2)


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_a_sealed_store_grows_by_a_draw(layout: str, tmp_path: Path) -> None:
    one = write(tmp_path / "store", spec_of(layout=layout))
    two = write(tmp_path / "store", spec_of(layout=layout), draws=2)
    assert (two.generation, two.draws, one.draws) == (2, 2, 1)
    assert two.content_digest == write(tmp_path / "whole", spec_of(layout=layout), draws=2).content_digest
    assert write(tmp_path / "store", spec_of(layout=layout), draws=2).generation == 2


def test_a_shard_that_was_set_aside_is_written_again_and_the_others_are_passed_over(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", spec_of())
    with pytest.raises(ZeroDivisionError):
        stopped(tmp_path / "store", spec_of(), ROWS)
    commits.commit_path(tmp_path / "store", "d000-s00001").unlink()
    writer = PairWriter(tmp_path / "store", spec_of())
    assert (writer.next_slot(), writer.written()) == (20, 30)
    store = write(tmp_path / "store", spec_of())
    assert (store.content_digest, store.order_key) == (whole.content_digest, whole.order_key)


def test_no_more_than_a_shard_is_in_memory(tmp_path: Path) -> None:
    spec = dataclasses.replace(spec_of(image_shape=(1, 64, 64), rows_per_shard=50), rows=1000)
    image, noise = np.zeros((50, 1, 64, 64), np.uint8), np.zeros((50, 1, 64, 64), np.float32)
    shard = image.nbytes + noise.nbytes
    tracemalloc.start()
    with PairWriter(tmp_path, spec) as writer:
        for start in range(0, 1000, 25):
            writer.write(image=image[:25], noise=noise[:25], label=np.full(25, start % 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * shard  # of 20: the shard, its copies while it is packed, and pyarrow's


def test_an_object_store_is_written_and_resumed(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/mine"
    with pytest.raises(ZeroDivisionError):
        stopped(url, spec_of(), 45)
    assert PairWriter(url, spec_of()).next_slot() == 40
    store = write(url, spec_of(), draws=2)
    assert store.content_digest == write(tmp_path / "here", spec_of(), draws=2).content_digest
    assert not verify(url, level="default")


def test_noise_that_the_codec_would_clip_is_refused(tmp_path: Path) -> None:
    """Noise of another scale keeps nothing of itself in int8."""
    spec = StoreSpec.external(rows=8, image_shape=(1, 4, 4), origin="a test", codec="int8")
    noise = np.random.default_rng(0).standard_normal((8, 1, 4, 4))
    with PairWriter(tmp_path / "wild", spec) as writer:
        with pytest.raises(StorageError, match=r"codec int8 would clip \d+\.\d% of the values; noise has unit"):
            writer.write(image=np.zeros((8, 1, 4, 4), np.uint8), noise=100 * noise)
        writer.write(image=np.zeros((8, 1, 4, 4), np.uint8), noise=noise)


@pytest.mark.parametrize("scale", [80.0, 0.01])
def test_noise_of_another_scale_is_told_once_with_its_figure(tmp_path: Path, scale: float) -> None:
    """EDM's noise, for instance, has up to 80 times unit deviation: students would begin elsewhere."""
    batch = pairs()
    batch["noise"] = scale * batch["noise"]
    said = "d000-s00000: the noise has a mean square of .* divide it by"
    with pytest.warns(UserWarning, match=said) as told, PairWriter(tmp_path, spec_of()) as writer:
        writer.write(**batch)
    (warned,) = told
    assert float(str(warned.message).split("divide it by ")[1].split(",")[0]) == pytest.approx(scale, rel=0.2)
    assert warned.filename == __file__


def test_noise_that_float16_would_make_nothing_of_is_refused(tmp_path: Path) -> None:
    batch = pairs()
    batch["noise"] = 1e-8 * batch["noise"]
    with PairWriter(tmp_path / "lost", spec_of()) as writer:
        with pytest.raises(StorageError, match=r"codec float16 would make \d+\.\d% of the values 0; noise has unit"):
            writer.write(**batch)
        writer.write(**pairs())


@pytest.mark.parametrize("draw", [True, 0.5, "0", None, -1])
def test_a_draw_that_is_no_number_is_refused_and_not_taken_for_one(tmp_path: Path, draw: Any) -> None:
    writer = PairWriter(tmp_path, spec_of(), draws=2)
    with pytest.raises(WrongArgument, match="draw"):
        writer.write(**pairs(), draw=draw)
    assert writer.next_slot(0) == writer.next_slot(1) == 0


def test_an_empty_batch_adds_nothing(tmp_path: Path) -> None:
    writer, batch = PairWriter(tmp_path, spec_of()), pairs()
    writer.write(image=batch["image"][:0], noise=batch["noise"][:0], label=[])
    assert writer.next_slot() == 0
