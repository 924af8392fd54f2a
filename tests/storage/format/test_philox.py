"""Random numbers of a record: published vectors, our own vectors, and independence from batch and order."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfm.storage.format import philox

# philox4x64-10 lines of kat_vectors in Random123 (counter, key, result)
KNOWN_ANSWERS = [
    (
        [0, 0, 0, 0],
        [0, 0],
        [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
    ),
    (
        [2**64 - 1] * 4,
        [2**64 - 1] * 2,
        [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
    ),
    (
        [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
        [0x452821E638D01377, 0xBE5466CF34E90C6C],
        [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
    ),
]


def philox4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. (2011), section 4.3, in plain integers."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second & mask, first >> 64 ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_the_reference_gives_the_published_answers(counter, key, result):
    assert philox4x64_10(counter, key) == result


def test_bits_are_philox_keyed_by_seed_and_purpose_and_counted_by_slot_and_draw():
    purpose = int.from_bytes(hashlib.sha256(b"eps").digest()[:8], "little")
    bits = philox.words(7, 3, np.array([5, 2**40]), 10, "eps")
    for row, slot in zip(bits, (5, 2**40)):
        blocks = [philox4x64_10([block, slot, 3, 0], [7, purpose]) for block in (1, 2, 3)]
        assert row.tolist() == [word for block in blocks for word in block][:10]


def test_normals_and_flips_never_change():
    assert philox.normals(0, 0, np.array([0, 1]), 3).tolist() == NORMALS_AT_0
    assert philox.normals(2**63, 5, np.array([59999]), 3, "other").tolist() == NORMALS_AT_59999
    digest = hashlib.sha256(philox.normals(11, 2, np.arange(100), 784).astype("<f4").tobytes())
    assert digest.hexdigest() == DIGEST_OF_100
    assert "".join("01"[int(flip)] for flip in philox.flips(0, 0, np.arange(32))) == FLIPS


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=60), st.integers(0, 2**64 - 1), st.integers(1, 9))
def test_a_record_depends_on_its_own_seed_draw_and_slot_alone(slots, seed, size):
    together = philox.normals(seed, 1, np.array(slots), size)
    for row, slot in zip(together[:3], slots):
        assert np.array_equal(row, philox.normals(seed, 1, np.array([slot]), size)[0])
        assert not np.array_equal(row, philox.normals(seed, 2, np.array([slot]), size)[0])


def test_the_chunks_of_a_long_call_do_not_show():
    slots = np.arange(500)
    whole = philox.normals(1, 0, slots, 784)
    assert np.array_equal(whole, np.concatenate([philox.normals(1, 0, part, 784) for part in np.split(slots, 4)]))


def test_normals_are_standard_and_independent():
    values = philox.normals(3, 0, np.arange(2000), 784).astype(np.float64)
    count = values.size
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert abs((values[:, ::2] * values[:, 1::2]).mean()) < 4 / math.sqrt(count / 2)
    assert abs((values[:-1] * values[1:]).mean()) < 4 / math.sqrt(count)
    assert np.abs(values).max() > 4.5
    edges = np.linspace(-3, 3, 61)
    cumulative = np.array([(1 + math.erf(edge / math.sqrt(2))) / 2 for edge in edges])
    observed = np.searchsorted(np.sort(values, axis=None), edges) / count
    assert np.abs(observed - cumulative).max() < 2 / math.sqrt(count)


def test_our_series_are_the_functions_they_stand_for():
    bits = np.random.default_rng(0).integers(0, 2**64, (64, 784), dtype=np.uint64)
    bits[0, :4] = [0, 0, 2**64 - 1, 2**64 - 1]
    radius = np.sqrt(-2 * np.log(((bits[:, 0::2] >> np.uint64(11)) + 1.0) * 2.0**-53))
    angle = (((bits[:, 1::2] & np.uint64(2**53 - 1)) + 0.5) * 2.0**-53 - 0.5) * np.pi
    sign = np.where(bits[:, 1::2] >> np.uint64(63), -1.0, 1.0)
    ours = philox.box_muller(bits)
    assert np.abs(ours[:, 0::2] - sign * radius * np.cos(angle)).max() < 1e-14
    assert np.abs(ours[:, 1::2] - radius * np.sin(angle)).max() < 1e-14


def test_flips_are_fair_and_differ_between_draws():
    first, second = (philox.flips(0, draw, np.arange(20000)) for draw in (0, 1))
    assert abs(first.mean() - 0.5) < 0.015
    assert abs((first == second).mean() - 0.5) < 0.015


@pytest.mark.parametrize(("seed", "draw", "slot"), [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_numbers_outside_the_counter_are_refused(seed, draw, slot):
    with pytest.raises(ValueError, match=r"-1|outside"):
        philox.normals(seed, draw, np.array([slot]), 4)


NORMALS_AT_0 = [
    [-0.3472078740596771, -0.6271413564682007, -1.9143401384353638],
    [-0.7191534638404846, 0.5574836730957031, 1.6267300844192505],
]
NORMALS_AT_59999 = [[0.4613070487976074, -0.6238332986831665, 0.6454559564590454]]
DIGEST_OF_100 = "bb5165dab5874e2888045f792573142ae77ea27772d1073c4a4bec193817edd7"
FLIPS = "11000110101100000001001100101111"
