"""Batches on a device are equal to those on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nfm.storage import PairStore
from nfm.storage.format.fields import pair_fields
from nfm.storage.reading.device import Upload


class Elsewhere(Upload):
    """The path of a device with memory of its own, on the CPU."""

    @property
    def on_host(self) -> bool:
        return False


@pytest.mark.parametrize("image_dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_a_device_converts_as_the_host_does(make_store, small_spec, monkeypatch, image_dtype, codec):
    fields = pair_fields((1, 4, 4), codec, image_dtype)
    store = PairStore.open(make_store(spec=replace(small_spec, fields=fields, codec=codec)))
    host = [batch.image.copy() for batch in store.batches(10)], [batch.noise.copy() for batch in store.batches(10)]
    monkeypatch.setattr("nfm.storage.reading.reader.Upload", Elsewhere)
    there = [(batch.image.numpy(), batch.noise.numpy()) for batch in store.batches(10, device="cpu")]
    for image, noise, (image_there, noise_there) in zip(*host, there, strict=True):
        np.testing.assert_array_equal(image, image_there)
        np.testing.assert_array_equal(noise, noise_there)
