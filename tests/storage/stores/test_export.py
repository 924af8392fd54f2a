"""An export holds the same pairs in another layout and codec, can be killed anywhere, and says where it is from."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nfm.storage import PairStore, PairWriter
from nfm.storage.errors import CorruptShard, NoPlace, StorageError
from nfm.storage.export import converted, export
from nfm.storage.files.atomic import read_json
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.row_fields import RowField, write_row_field
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import verify

LAYOUTS = ("blocks", "samples", "zarr")
CODECS = ("float32", "float16", "int8")
SAID = np.random.default_rng(5).normal(size=(50, 3)).astype(np.float32)


def everything(store: PairStore, draw: int) -> dict[str, np.ndarray]:
    stored = store.gather(draw, np.arange(len(store)))
    step = store.spec.noise_step
    return stored | {"noise": stored["noise"].astype(np.float32) * (step or 1.0)}


@pytest.fixture
def source(make_store, small_spec) -> PairStore:
    """Two draws of 50 pairs with noise in float32, and a row field."""
    spec = dataclasses.replace(small_spec, codec="float32", fields=pair_fields((1, 4, 4), "float32"))
    root = make_store(spec=spec)
    write_row_field(root, "said", [SAID], (3,), "float32")
    return PairStore.open(root)


@pytest.mark.parametrize(("layout", "codec"), [*itertools.product(LAYOUTS, CODECS)])
def test_every_layout_and_codec_holds_the_same_pairs(source, tmp_path, layout, codec):
    manifest = export(source, tmp_path / "out", layout, codec).body
    found = PairStore.open(tmp_path / "out")
    assert (found.spec.layout, found.spec.codec, found.draws) == (layout, codec, 2)
    assert found.order_key == source.order_key
    assert found.spec.rows_per_shard == source.spec.rows_per_shard
    assert not verify(tmp_path / "out", level="default")
    columns = ["key", "slot", "row", "draw", "flip", "label", "group"]
    assert found.index(columns).equals(source.index(columns))
    np.testing.assert_array_equal(found.index(["nll"])["nll"], source.index(["nll"])["nll"])
    np.testing.assert_array_equal(RowField.open(tmp_path / "out", "said").gather(np.arange(50)), SAID)
    error = {"float32": 0.0, "float16": 0.002, "int8": 0.0251}[codec]
    for draw in range(2):
        ours, theirs = everything(found, draw), everything(source, draw)
        for name in ("image", "label", "slot"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        assert np.abs(ours["noise"] - theirs["noise"]).max() <= error
    assert manifest["exported"].get("max_error", 0.0) <= error


@pytest.mark.parametrize(("layout", "codec"), [("zarr", "int8"), ("samples", "float16")])
def test_back_again_nothing_more_is_lost(source, tmp_path, layout, codec):
    export(source, tmp_path / "there", layout, codec)
    there = PairStore.open(tmp_path / "there")
    back = export(there, tmp_path / "back", "blocks", "float32").body
    assert "rms_error" not in back["exported"]
    export(PairStore.open(tmp_path / "back"), tmp_path / "again", layout, codec)
    again = PairStore.open(tmp_path / "again")
    assert again.content_digest == there.content_digest


def test_the_manifest_says_what_was_lost_and_where_it_is_from(source, tmp_path):
    noise = np.concatenate([everything(source, draw)["noise"] for draw in range(2)]).astype(np.float64)
    manifest = export(source, tmp_path / "out", "blocks", "int8").body
    exported = manifest["exported"]
    assert exported["content_digest"] == source.content_digest
    assert (exported["generation"], exported["layout"], exported["codec"]) == (1, "blocks", "float32")
    rounded = np.clip(np.rint(noise * 20), -127, 127) / 20
    assert exported["rms_error"] == pytest.approx(np.sqrt(np.square(rounded - noise).mean()), rel=1e-4)
    assert exported["measured"] == 100
    assert manifest["clipped"] == 0
    assert "path" not in str(manifest)
    assert str(tmp_path) not in (tmp_path / "out/spec.json").read_text() + str(manifest)


def test_what_the_pipeline_knew_travels_along(source, tmp_path, make_store, small_spec):
    root = make_store(name="made", sealed=False)
    seal.seal(root, 2, config={"codec": "float16"}, git_commit="abc")
    manifest = export(PairStore.open(root), tmp_path / "out", "blocks", "float32").body
    assert (manifest["config"], manifest["git_commit"]) == ({"codec": "float16"}, "abc")
    assert PairStore.open(tmp_path / "out").manifest["config"] == {"codec": "float16"}


def test_exporting_again_converts_nothing_and_a_third_draw_only_itself(source, tmp_path, make_store, add_draw):
    root, out = source.root, tmp_path / "out"
    seen = []

    def note(done: int, total: int, read: int) -> None:
        seen.append((done, total))

    first = export(source, out, "blocks", "float16", note).body
    assert seen[0] == (0, 100)
    assert seen[-1] == (100, 100)
    seen.clear()
    assert export(source, out, "blocks", "float16", note).body == first
    assert seen == [(100, 100)]
    add_draw(root, source.spec)
    seen.clear()
    grown = export(PairStore.open(root), out, "blocks", "float16", note).body
    assert seen[0] == (100, 150)
    assert (grown["generation"], grown["draws"]) == (2, 3)
    assert seal.numbers(out) == [1, 2]


def test_a_pinned_generation_is_what_is_exported(make_store, tmp_path, add_draw):
    root = make_store(draws=1)
    spec = PairStore.open(root).spec
    add_draw(root, spec)
    manifest = export(PairStore.open(root, generation=1), tmp_path / "out", "blocks", "float32").body
    assert (manifest["draws"], manifest["exported"]["generation"]) == (1, 1)


def test_a_manifest_that_is_named_is_of_no_other_generation(make_store, tmp_path):
    with pytest.raises(StorageError, match="the manifest of generation 1, not of 2"):
        PairStore.open(make_store() / "manifest.g0001.json", generation=2)


@pytest.mark.parametrize("below", [".", "sub", "shards/sub"])
def test_a_store_is_not_exported_into_itself(source, below):
    before = sorted(source.root.rglob("*"))
    with pytest.raises(StorageError, match="inside the store that is exported"):
        export(source, source.root / below)
    assert sorted(source.root.rglob("*")) == before


def test_a_target_that_is_another_store_is_refused(source, make_store, tmp_path):
    export(source, tmp_path / "out", "blocks", "float16")
    with pytest.raises(StorageError, match="another store is there: its codec is 'float16', here 'float32'"):
        export(source, tmp_path / "out", "blocks", "float32")
    other = dataclasses.replace(source.spec, seed=1)
    with pytest.raises(StorageError, match=r"another store is there: its seed is 0, here 1\. Export into"):
        export(PairStore.open(make_store(spec=other, name="other")), tmp_path / "out", "blocks", "float16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        export(source, tmp_path / "full", "blocks", "float16")


def test_pairs_of_another_making_are_not_mixed_in(source, make_store, tmp_path, records):
    """The same recipe, other bytes: a store that was encoded again on another device."""
    root = make_store(draws=1, spec=source.spec, name="again", sealed=False)
    one = commits.read(root, "d000-s00001")
    (root / "commits" / "d000-s00001.json").unlink()
    noisy = ({**chunk, "noise": chunk["noise"] + 0.001} for chunk in records(source.spec, 0, 1))
    commits.publish(root, write_shard(root, source.spec, 0, 1, "a2", noisy))
    assert one is not None
    seal.seal(root, 1)
    export(source, tmp_path / "out", "blocks", "float16")
    with pytest.raises(StorageError, match="d000-s00001 was exported from other pairs"):
        export(PairStore.open(root), tmp_path / "out", "blocks", "float16")


@pytest.mark.parametrize("folder", ["shards", "index"])
def test_a_flipped_bit_of_the_source_is_never_exported(source, tmp_path, folder):
    path = sorted((source.root / folder).iterdir())[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match=path.name):
        export(source, tmp_path / "out", "blocks", "float16")
    assert not seal.numbers(tmp_path / "out")
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    export(source, tmp_path / "out", "blocks", "float16")
    assert not verify(tmp_path / "out", level="default")


KILLED = """
import os, signal, sys
from nfm.storage import PairStore
from nfm.storage.files import atomic
from nfm.storage.ledger import commits, shard_writer
from nfm.storage.export import export
left, name = int(sys.argv[3]), sys.argv[4]
owner = {"create_json": commits, "write_index": shard_writer, "publish": commits}[name]
real = getattr(owner, name)
def counted(*arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(owner, name, counted)
export(PairStore.open(sys.argv[1]), sys.argv[2], sys.argv[5], "float16")
"""


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_an_export_killed_between_any_two_files_ends_as_if_nothing_had_happened(source, tmp_path, layout):
    out, whole = tmp_path / "out", tmp_path / "whole"
    for name, at in (("write_index", 1), ("create_json", 2), ("publish", 2)):
        command = [sys.executable, "-c", KILLED, source.root, out, str(at), name, layout]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not seal.numbers(out)
    export(source, out, layout, "float16")
    export(source, whole, layout, "float16")
    assert PairStore.open(out).content_digest == PairStore.open(whole).content_digest
    assert not verify(out, level="default")
    left = {path.parent.name for path in out.rglob("*") if path.is_file() and path.name.startswith("d00")}
    assert len(list((out / "index").glob("d*"))) == len(list((out / "commits").glob("d*"))) == 6, left


def test_what_was_lost_is_said_also_when_only_the_seal_was_missing(source, tmp_path):
    export(source, tmp_path / "out", "blocks", "int8")
    seal.manifest_path(tmp_path / "out", 1).unlink()
    exported = export(source, tmp_path / "out", "blocks", "int8").body["exported"]
    assert exported["rms_error"] == pytest.approx(0.05 / 12**0.5, rel=0.1)
    assert exported["measured"] == 20  # a shard


def test_an_error_in_one_shard_stops_the_others_and_says_which(source, tmp_path):
    (source.root / "shards/d001-s00002.a1.tar").unlink()
    with pytest.raises(StorageError, match=r"d001-s00002\.a1\.tar"):
        export(source, tmp_path / "out", "blocks", "float16", threads=2)


def test_zarr_takes_blocks_that_divide_its_shards(small_spec):
    spec = converted(small_spec, "zarr", "float16")
    assert (small_spec.rows_per_shard, small_spec.rows_per_block, spec.rows_per_block) == (20, 8, 5)
    assert converted(spec, "zarr", "int8").rows_per_block == 5
    with pytest.raises(StorageError, match="float8"):
        converted(small_spec, "blocks", "float8")
    assert isinstance(spec, StoreSpec)


def test_latents_without_labels_travel_too(make_store, small_spec, tmp_path, records):
    fields = pair_fields((4, 2, 2), "float16", "float16", label=False)
    spec = dataclasses.replace(small_spec, fields=fields, classes=None, image_scale=0.18215, image_decoder="vae")
    root = tmp_path / "latents"
    with PairWriter(root, spec) as writer:
        for shard in range(spec.shards_per_draw):
            for part in records(spec, 0, shard):
                del part["slot"]
                writer.write(**part | {"image": part["image"].astype(np.float16) / 100})
    export(PairStore.open(root), tmp_path / "out", "samples", "int8")
    found, source = PairStore.open(tmp_path / "out"), PairStore.open(root)
    np.testing.assert_array_equal(everything(found, 0)["image"], everything(source, 0)["image"])
    assert (found.spec.image_scale, found.spec.image_decoder) == (0.18215, "vae")
    assert "label" not in everything(found, 0)
    assert read_json(tmp_path / "out/spec.json")["exported"]


def test_urls_are_sources_and_targets(source, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(source.root), "/h4-export/store", recursive=True)
    remote = PairStore.open("memory://h4-export/store")
    export(remote, "memory://h4-export/out", "zarr", "float16")
    export(PairStore.open("memory://h4-export/out"), Path(tmp_path / "back"), "blocks", "float32")
    back = PairStore.open(tmp_path / "back")
    np.testing.assert_allclose(everything(back, 1)["noise"], everything(source, 1)["noise"], atol=0.002)
    np.testing.assert_array_equal(RowField.open(tmp_path / "back", "said").gather([7]), SAID[[7]])
    assert not verify(tmp_path / "back", level="default")


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_asked_of_it(source: PairStore) -> None:
    with pytest.raises(NoPlace, match="http is read and not written; export into a folder or a bucket"):
        export(source, "http://127.0.0.1:9/x")
