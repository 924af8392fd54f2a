"""Audits of stores against their source find records and pairs that their coupling cannot make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nfm.stages.encoding.encoder import Encoder
from nfm.stages.executors.jobs import Job, new_attempt
from nfm.stages.pairs import stage
from nfm.storage import PairStore
from nfm.storage.export import export
from nfm.storage.format.spec import read_spec
from nfm.storage.ledger import seal
from nfm.trainers.couplings.coupling import Pairs
from nfm.trainers.couplings.minibatch_ot import groups
from tests.stages.pairs.shop import CLASSES, OPTIONS, ROWS, Shop


def spoiled(shop: Shop, config: stage.PairsConfig, field: str, change: Callable[[np.ndarray], np.ndarray]) -> PairStore:
    """A store whose encoder was wrong about a field: whole, sealed, and not what its recipe says."""
    out = shop.begin(config)
    encoder = Encoder(stage.setup(config, shop.of(config), out))
    right = encoder._records
    encoder._records = lambda draw, source: (found := right(draw, source)) | {field: change(found[field])}  # type: ignore[method-assign]
    for name in seal.names_of(read_spec(out), 2):
        encoder.encode_shard(Job(name, new_attempt()))
    seal.seal(out, 2, config=config.model_dump(mode="json"))
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


@pytest.mark.parametrize("coupling", ["independent", "reflow"])
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_deep_audit_takes_an_export_for_what_its_source_was(shop: Shop, coupling: str, codec: Any) -> None:
    """Its noise is rounded twice: as the source's, and as its own."""
    store = shop.make(shop.config(coupling=coupling, **{**OPTIONS[coupling], "codec": "float16"}))
    export(store, shop.root / "exported", codec=codec)
    assert shop.audit(PairStore.open(shop.root / "exported")) == []


def test_a_finding_of_quality_alone_does_not_hold_up_the_encoding_again(shop: Shop) -> None:
    config = shop.config(coupling="custom", **OPTIONS["custom"])
    store = spoiled(shop, config, "noise", lambda noise: noise + 1)
    (found,) = shop.audit(store, "default")
    assert "a student samples from 0 and 1" in found
    quality, *others = shop.audit(store)
    assert quality == found
    assert len(others) > 50
    assert "is not the pair that its coupling makes" in others[0]


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
    encoder = Encoder(stage.setup(config, shop.of(config), out))
    encoder.coupling = Undealt(shift)  # type: ignore[assignment]
    for name in seal.names_of(read_spec(out), 2):
        encoder.encode_shard(Job(name, new_attempt()))
    seal.seal(out, 2, config=config.model_dump(mode="json"))
    found = shop.audit(PairStore.open(out), "default")
    assert len(found) >= 8, "one a shard"
    assert all("are not assigned at the least cost" in line for line in found)
