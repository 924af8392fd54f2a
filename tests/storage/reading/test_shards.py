"""One array over many shards: in any layout, what is gathered is what was written."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfm.storage import layouts
from nfm.storage.errors import CorruptShard, MissingShard
from nfm.storage.format.codecs import pack
from nfm.storage.format.commit import ShardFiles
from nfm.storage.format.convert import to_float32
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec, shard_name
from nfm.storage.layouts import LAYOUTS
from nfm.storage.reading.gathering.shards import ShardSequence

Arrays = dict[str, np.ndarray]


def _arrays(spec: StoreSpec, seed: int) -> Arrays:
    """Every record of a draw: random bits, so that nothing that is misplaced looks right."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for field in spec.fields:
        if field.role == "noise":
            arrays[field.name] = rng.normal(size=(spec.rows, *field.shape)).astype(np.float32)
        elif field.role == "image":
            arrays[field.name] = rng.integers(0, 256, (spec.rows, *field.shape)).astype(field.dtype)
        elif field.role == "label":
            arrays[field.name] = rng.integers(-(2**40), 2**40, spec.rows)
    return arrays | {"slot": np.arange(spec.rows)}


def _write(root: Path, spec: StoreSpec, arrays: Arrays, chunk: int) -> list[ShardFiles]:
    """The shards of draw 0."""
    stored = arrays | {"noise": pack(arrays["noise"], spec.codec)[0]}
    found = []
    for shard in range(spec.shards_per_draw):
        slots, name = spec.slots_of(shard), shard_name(0, shard)
        with layouts.writer(spec, root, name, "a") as writer:
            for start in range(slots.start, slots.stop, chunk):
                part = slice(start, min(start + chunk, slots.stop))
                writer.append({name: array[part] for name, array in stored.items()})
            payload, parts = layouts.closed(writer, layouts.payload_name(spec, name, "a"))
        found.append(ShardFiles(name=name, payload=payload, index=payload, records=len(slots), parts=parts))
    return found


def _sequence(root: Path, spec: StoreSpec, held: list[ShardFiles]) -> ShardSequence:
    def open_shard(number: int) -> Any:
        paths = [root / file.path for file in layouts.files(spec, held[number], sealed=False)]
        return layouts.open_shard(spec, paths, held[number].records)

    sizes = (spec.rows, spec.rows_per_shard, spec.rows_per_block)
    return ShardSequence(open_shard, spec.fields, *sizes, spec.layout, (0.0, 1.0), spec.noise_step)


@st.composite
def _specs(draw: Callable[..., Any]) -> StoreSpec:
    kind = draw(st.sampled_from([*LAYOUTS]))
    rows = draw(st.integers(1, 40))
    block = draw(st.integers(1, 12))
    shard = block * draw(st.integers(-(-5 // block), 5)) if kind == "zarr" else draw(st.integers(5, 40))
    shape = draw(st.sampled_from([(1, 2, 3), (5,), (3, 40, 40), (4, 32, 32)]))  # below and above 4096 bytes a record
    codec = draw(st.sampled_from(["float16", "float32", "int8"]))
    image_dtype = draw(st.sampled_from(["uint8", "float16", "float32"]))
    return StoreSpec(
        rows=rows,
        rows_per_shard=shard,
        rows_per_block=block,
        fields=pair_fields(shape, codec, image_dtype, label=draw(st.booleans())),
        coupling="independent",
        source="ab" * 32,
        codec=codec,
        layout=kind,
    )


@given(spec=_specs(), seed=st.integers(0, 99), chunk=st.integers(1, 50))
@settings(max_examples=60)
def test_what_is_gathered_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, spec: StoreSpec, seed: int, chunk: int
) -> None:
    root, arrays = tmp_path_factory.mktemp("s"), _arrays(spec, seed)
    held = _write(root, spec, arrays, chunk)
    arrays["noise"] = pack(arrays["noise"], spec.codec)[0]
    sequence = _sequence(root, spec, held)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, spec.rows, 25)
    gathered = sequence.gather([field.name for field in spec.fields], rows)
    for field in spec.fields:
        np.testing.assert_array_equal(gathered[field.name], arrays[field.name][rows])
        assert gathered[field.name].dtype == field.dtype
        number = int(rng.integers(spec.shards_per_draw))
        slots = spec.slots_of(number)
        start, stop = sorted(rng.integers(0, len(slots) + 1, 2).tolist())
        found = sequence.shard(number).read(field.name, start, stop)
        np.testing.assert_array_equal(found, arrays[field.name][slots.start + start : slots.start + stop])


@given(spec=_specs(), seed=st.integers(0, 99), count=st.integers(1, 60))
@settings(max_examples=40)
def test_what_is_gathered_as_float32_is_the_stored_numbers_converted(
    tmp_path_factory: pytest.TempPathFactory, spec: StoreSpec, seed: int, count: int
) -> None:
    root = tmp_path_factory.mktemp("s")
    sequence = _sequence(root, spec, _write(root, spec, _arrays(spec, seed), 16))
    rows = np.random.default_rng(seed).integers(0, spec.rows, count)
    stored = sequence.gather(["image", "noise"], rows)
    out = {name: np.empty(array.shape, np.float32) for name, array in stored.items()}
    sequence.gather(["image", "noise"], rows, out)
    np.testing.assert_array_equal(out["image"], to_float32(stored["image"], (0.0, 1.0)))
    np.testing.assert_array_equal(out["noise"], to_float32(stored["noise"], (0.0, 1.0), step=spec.noise_step))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_latents_of_float16_pass_unchanged_in_every_layout(tmp_path: Path, spec_of, kind: str) -> None:
    spec = spec_of(kind, "float16", "float16", label=False, image_shape=(4, 32, 32), image_scale=0.18215)
    latents = np.random.default_rng(0).normal(size=(50, 4, 32, 32)).astype(np.float16)
    arrays = {"image": latents, "noise": latents.astype(np.float32), "slot": np.arange(50)}
    sequence = _sequence(tmp_path, spec, _write(tmp_path, spec, arrays, 16))
    rows = np.random.default_rng(1).permutation(50)
    out = sequence.empty(["image", "noise"], 50)
    sequence.gather(["image", "noise"], rows, out)
    np.testing.assert_array_equal(out["image"], latents[rows])
    np.testing.assert_array_equal(out["noise"], latents[rows])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rows_outside_and_buffers_that_do_not_fit_are_refused(tmp_path: Path, spec_of, kind: str) -> None:
    spec = spec_of(kind)
    sequence = _sequence(tmp_path, spec, _write(tmp_path, spec, _arrays(spec, 0), 16))
    for rows in ([50], [-1]):
        with pytest.raises(IndexError, match=r"0\.\.49"):
            sequence.gather(["slot"], np.array(rows))
    for out in (np.empty(3, np.int32), np.empty(2, np.int64), np.empty(6, np.int64)[::2]):
        with pytest.raises(ValueError, match="contiguous, writable numpy array of int64"):
            sequence.gather(["slot"], np.arange(3), {"slot": out})
    assert sequence.gather(["image"], np.array([], int))["image"].shape == (0, 1, 4, 4)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_store_of_many_shards_keeps_to_the_limit_of_open_files(tmp_path: Path, spec_of, kind: str) -> None:
    spec = spec_of(kind, rows=100, rows_per_shard=1, rows_per_block=1)
    held = _write(tmp_path, spec, _arrays(spec, 0), 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 200  # of which a quarter holds 16 shards of 4 files less 14
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        sequence = _sequence(tmp_path, spec, held)
        for part in np.split(np.random.default_rng(0).permutation(100), 20):
            np.testing.assert_array_equal(sequence.gather(["slot"], part)["slot"], part)
        assert len(os.listdir("/proc/self/fd")) - before <= limit // 4 + 14
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_missing_or_altered_file_is_named_when_it_is_read(tmp_path: Path, spec_of, kind: str) -> None:
    spec = spec_of(kind)
    held = _write(tmp_path, spec, _arrays(spec, 0), 16)
    file = tmp_path / layouts.files(spec, held[1], sealed=False)[0].path
    file.write_bytes(file.read_bytes()[:-7])
    sequence = _sequence(tmp_path, spec, held)
    np.testing.assert_array_equal(sequence.gather(["slot"], np.array([3, 45]))["slot"], [3, 45])
    with pytest.raises(CorruptShard, match="d000-s00001"):
        sequence.gather(["slot"], np.array([3, 25]))
    file.unlink()
    with pytest.raises(MissingShard, match="d000-s00001"):
        sequence.gather(["slot"], np.array([3, 25]))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_shard_listed_with_other_records_than_its_rows_is_never_read(tmp_path: Path, spec_of, kind: str) -> None:
    spec = spec_of(kind)
    held = _write(tmp_path, spec, _arrays(spec, 0), 16)
    sequence = _sequence(tmp_path, spec, [held[2], held[1], held[2]])  # 10 records where 20 are
    with pytest.raises(CorruptShard, match="10 records, its rows are 20"):
        sequence.gather(["slot"], np.array([15]))


def test_a_label_that_is_no_number_is_corrupt(tmp_path: Path, spec_of) -> None:
    spec = spec_of("samples")
    held = _write(tmp_path, spec, _arrays(spec, 0), 16)
    file = tmp_path / held[0].payload.path
    data = bytearray(file.read_bytes())
    at = data.index(b".cls") - len("d000-000000000") + 512 + 19
    data[at] = ord("x")
    file.write_bytes(data)
    with pytest.raises(CorruptShard, match="label"):
        _sequence(tmp_path, spec, held).gather(["label"], np.array([0, 1]))
