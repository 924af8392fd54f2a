"""Compares the records of a shard with their source: rows, images, labels, and groups of dealt noises."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nfm.stages.couplings.facts import facts_of
from nfm.stages.encoding.slots import drawn_eps, drawn_flips, mirrored
from nfm.storage import ImageDataset, layouts
from nfm.storage.files.copies.cache import default_cache
from nfm.storage.format import codecs
from nfm.storage.format.index import read_index
from nfm.storage.format.spec import StoreSpec
from nfm.storage.ledger.shard_list import Entry

CHUNK, CHUNK_BYTES = 1024, 8 << 20  # records in memory at a time, and bytes of their values as float32
REDONE = 1024  # records of a minibatch-ot group that is assigned again, at most
Array = np.ndarray


def problems(root: Path, spec: StoreSpec, source: ImageDataset, entry: Entry, exported: bool) -> list[str]:
    """What is wrong with a shard, given its entry in a generation; empty if it fits its source.

    For every coupling, slot s has the label of row s. It also has the image of row s, except that semidiscrete-ot chose
    a row of the same class, which the index names, and reflow generated an image. If the noise is eps, it is that of
    the slot. The noises of a minibatch-ot group are the group's eps, each used once, so that z has exactly the
    distribution of eps; one seeded group is assigned again. (This is not checked in an export, which rounds noises
    again.)
    """
    draw, number, records = entry.draw, entry.shard, entry.records
    files = layouts.files(spec, entry)
    shard = default_cache().opened(root, files, lambda paths: layouts.open_shard(spec, paths, records))
    index = read_index(root / entry.index.path, ["slot", "row", "flip", "group"], records)
    slots, rows, group = (index[name].to_numpy() for name in ("slot", "row", "group"))
    flips = index["flip"].to_numpy(zero_copy_only=False)
    facts = facts_of(spec.coupling)
    chosen = facts.image == "chosen"
    if chosen and not (rows.min() >= 0 and rows.max() < len(source)):
        return ["rows are not those of its source"]
    wrong = [] if chosen or np.array_equal(rows, slots) else ["rows"]
    other = 0
    for part in _parts(spec, records):
        labels = source.labels(slots[part])
        if chosen and not np.array_equal(source.labels(rows[part]), labels):
            wrong.append("rows")
        if facts.image != "generated":
            images = mirrored(source.images(rows[part]), flips[part])
            if not np.array_equal(shard.read("image", part.start, part.stop), images):
                wrong.append("images")
        if spec.has("label") and not np.array_equal(shard.read("label", part.start, part.stop), labels):
            wrong.append("labels")
        if facts.noise == "eps" and not exported:
            other += int(
                (shard.read("noise", part.start, part.stop) != _eps(spec, draw, slots[part])).any((1, 2, 3)).sum()
            )
    found = [f"{what} are not those of its source" for what in dict.fromkeys(wrong)]
    if not np.array_equal(flips, drawn_flips(spec, draw, slots)):
        found.append("flips are not those that its seed draws")
    if other:
        found.append(f"the noises of {other} of {records} records are not those that were drawn for them")
    if facts.noise == "dealt" and not exported:
        found += _groups(spec, source, shard, (draw, number), slots, group)
    return found


def _groups(
    spec: StoreSpec, source: ImageDataset, shard: layouts.Shard, place: tuple[int, int], slots: Array, group: Array
) -> list[str]:
    """What is wrong with the groups of a shard, (draw, number).

    They may differ from those of `minibatch_ot.groups`, have other noises than their eps, or not be assigned.
    """
    from nfm.trainers.couplings.minibatch_ot import groups

    found, most = [], int((spec.coupling_options or {})["group_size"])
    members = groups(source.labels(slots), most)
    of = np.empty(len(slots), np.int64)  # the number of each record's group
    for at, own in enumerate(members):
        of[own] = at
    if not np.array_equal(group, np.array([slots[own[0]] for own in members])[of]):
        found.append(f"groups are not of one class and at most {most} records each, of a class alike")
    # The sum of digests of the noises in a group is the same for every order.
    stored, drawn = np.zeros(len(members), np.uint64), np.zeros(len(members), np.uint64)
    several = [at for at, own in enumerate(members) if len(own) > 1]
    looked = int(np.random.default_rng(place).choice(several)) if several else -1
    kept: list[tuple[Array, ...]] = []  # of the group that is checked: image, noise, eps
    for part in _parts(spec, len(slots)):
        noise, eps = shard.read("noise", part.start, part.stop), _eps(spec, place[0], slots[part])
        np.add.at(stored, of[part], _digests(noise))
        np.add.at(drawn, of[part], _digests(eps))
        if (here := of[part] == looked).any():
            image = shard.read("image", part.start, part.stop)[here]
            kept.append((source.to_float(image), *(codecs.unpack(z[here], spec.noise_step) for z in (noise, eps))))
    if bad := int((stored != drawn).sum()):
        found.append(f"the noises of {bad} of {len(members)} groups are not those that were drawn for them, permuted")
    elif kept and not _assigned(spec, place[0], slots[members[looked]], *map(np.concatenate, zip(*kept))):
        found.append(f"the noises of group {slots[members[looked][0]]} are not assigned at the least cost")
    return found


def _assigned(spec: StoreSpec, draw: int, slots: Array, images: Array, noise: Array, eps: Array) -> bool:
    """Whether the noises of a group, as stored, cost no more than the assignment of the drawn noises.

    For a group too large for that: whether they cost less than in the order in which they were drawn.
    """
    import torch

    from nfm.trainers.couplings.minibatch_ot import assignment

    flat = images.reshape(len(images), -1).astype(np.float64)
    products = [float((flat * z.reshape(flat.shape)).sum()) for z in (noise, eps)]
    if len(slots) > REDONE:
        return products[0] > products[1]
    chosen = assignment(torch.from_numpy(images), torch.from_numpy(drawn_eps(spec, draw, slots)))
    # Equal images may have swapped noises, which changes the rounding of the sum.
    best = float((flat * eps[chosen].reshape(flat.shape)).sum())
    return products[0] >= best - 1e-9 * float(np.abs(flat).sum())


def _eps(spec: StoreSpec, draw: int, slots: Array) -> Array:
    """The noises drawn for these slots, as the codec stores them."""
    return codecs.pack(drawn_eps(spec, draw, slots), spec.codec, spec.noise_step)[0]


def _digests(noise: Array) -> Array:
    """64 bits of each record's stored noise: uint64 [n]."""
    rows = np.ascontiguousarray(noise.reshape(len(noise), -1))
    found = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(found), np.uint64)


def _parts(spec: StoreSpec, records: int) -> Iterator[slice]:
    step = max(1, min(CHUNK, CHUNK_BYTES // (4 * math.prod(spec.image_shape))))
    for start in range(0, records, step):
        yield slice(start, min(start + step, records))
