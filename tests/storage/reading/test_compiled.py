"""Compiled loops: the same bits as without them, made when they pay, and never in the way of reading."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from types import ModuleType

import numpy as np
import pytest

from nfm.storage import PairStore
from nfm.storage.format.convert import linear, to_float32
from nfm.storage.reading.gathering import compiled as compiled_file
from nfm.storage.reading.gathering import shards
from nfm.storage.reading.gathering.compiled import KINDS, Loops
from tests.support.patience import PATIENCE

UNIT = (-1.0, 1.0)
NUMBERS = {
    "uint8": np.arange(256, dtype=np.uint8),
    "int8": np.arange(-128, 128).astype(np.int8),
    "int16": np.arange(-(2**15), 2**15).astype(np.int16),
    "float16": np.arange(2**16, dtype=np.uint16).view(np.float16),
}


@pytest.fixture
def compiled() -> Loops:
    """Those of the process, so that they are compiled once."""
    for kind in KINDS:
        compiled_file.loops.make(kind)
    assert compiled_file.loops.on
    return compiled_file.loops


def run(loops: Loops, kind: str, stored: np.ndarray, out: np.ndarray, a: float = 1.0, b: float = 0.0) -> None:
    """One record."""
    loop = loops.loop(kind, out.nbytes)
    assert loop is not None
    loop(np.array([stored.ctypes.data]), out, a, b)


@pytest.mark.parametrize("value_range", [UNIT, (0.0, 1.0), (-0.3, 7.7)])
@pytest.mark.parametrize("kind", NUMBERS)
def test_every_number_becomes_the_float32_that_it_becomes_without_loops(compiled, kind, value_range):
    stored, step = NUMBERS[kind], None if kind == "float16" else 0.0137
    out = np.empty((1, len(stored)), np.float32)
    run(compiled, kind, stored, out, *linear(stored.dtype, value_range, step))
    expected = to_float32(stored, value_range, step=step)
    np.testing.assert_array_equal(out[0].view(np.uint32), expected.view(np.uint32))


def test_a_record_at_an_odd_address_is_read_too(compiled):
    memory = np.zeros(2 * 100 + 1, np.uint8)
    memory[1:] = np.linspace(-3, 3, 100).astype(np.float16).view(np.uint8)
    out = np.empty((1, 100), np.float32)
    run(compiled, "float16", memory[1:], out)
    np.testing.assert_array_equal(out[0], np.linspace(-3, 3, 100).astype(np.float16))


def batches(store: PairStore, **options: object) -> list[tuple[bytes, ...]]:
    found = store.batches(64, 0, epochs=3, **options)
    return [(batch.image.tobytes(), batch.noise.tobytes(), batch.slot.tobytes()) for batch in found]


@pytest.mark.parametrize("options", [{}, {"raw": True}, {"soften": 0.5}])
def test_batches_are_the_same_with_and_without_loops_one_and_two_at_a_time(large_store, compiled, monkeypatch, options):
    found = []
    for loops in (compiled, without := Loops()):
        without.on = False
        monkeypatch.setattr(shards, "loops", loops)
        found += [batches(large_store, prefetch=prefetch, **options) for prefetch in (True, False)]
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2] == found[3]


def test_a_loop_is_compiled_once_it_pays_and_meanwhile_there_is_none():
    loops = Loops(worth=1000)
    assert loops.loop("int8", 999) is None
    assert not loops._threads
    assert loops.loop("int8", 1) is None  # from here on a thread compiles
    assert loops.loop("uint8", 1) is None
    assert [*loops._threads] == ["int8"]
    deadline = time.monotonic() + PATIENCE
    while (loop := loops.loop("int8", 1)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert loops.loop("int8", 1) is loop
    assert loops.loop("float64", 10**9) is None


@pytest.mark.parametrize(("numba", "told"), [(ModuleType("numba"), "numba cannot compile"), (None, "")])
def test_without_numba_and_with_a_broken_one_reading_goes_on(large_store, monkeypatch, caplog, numba, told):
    expected = batches(large_store)
    monkeypatch.setattr(shards, "loops", loops := Loops(worth=1))
    monkeypatch.setitem(sys.modules, "numba", numba)
    assert batches(large_store) == expected
    for thread in loops._threads.values():
        thread.join()
    assert batches(large_store) == expected
    assert not loops.on
    assert bool(told) == bool(caplog.text)
    assert told in caplog.text


def test_a_loop_that_cannot_be_called_or_that_makes_other_numbers_is_not_used(monkeypatch, caplog):
    for wrong in (lambda starts, out, a, b: None, lambda starts, out, a, b: 1 / 0):
        monkeypatch.setattr(compiled_file, "_compiled", lambda kind, wrong=wrong: wrong)
        for kind in KINDS:
            loops = Loops()
            loops.make(kind)
            assert loops.loop(kind, 1) is None
            assert not loops.on
    assert "over int8 makes other numbers" in caplog.text


@pytest.mark.seconds(30)
def test_a_process_whose_numba_does_not_compile_reads_on():
    ended = told("""
        import os
        os.environ["NUMBA_DISABLE_JIT"] = "1"
        from nfm.storage.reading.gathering.compiled import Loops
        loops = Loops()
        loops.make("uint8")
        assert not loops.on
    """)
    assert ended.returncode == 0
    assert "numba cannot compile" in ended.stderr


@pytest.mark.seconds(30)
def test_a_child_that_is_forked_while_a_loop_is_compiled_compiles_its_own():
    """In a process of its own, which has not imported numba before."""
    ended = told("""
        import os, sys, threading
        from nfm.storage.reading.gathering.compiled import Loops
        loops = Loops(worth=1)
        loops.loop("uint8", 1)
        child = os.fork()
        if not child:
            loops.make("int8")
            os._exit(0 if loops.on and loops.loop("int8", 1) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.seconds(30)
def test_a_process_may_end_while_a_loop_is_compiled():
    ended = told("""
        from nfm.storage.reading.gathering.compiled import Loops
        loops = Loops(worth=1)
        loops.loop("float16", 1)
    """)
    assert (ended.returncode, ended.stderr) == (0, "")


def told(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=dict(os.environ))
