"""A store begun by one executor, with so many workers, is completed by any other with any number."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import Making, check_whole

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.faults.conftest import Uninterrupted

DRAWS = 8  # long enough to be stopped twice
ORDERS = [("serial", "ray", "slurm"), ("slurm", "ray", "serial"), ("ray", "slurm", "ray")]


@pytest.mark.faults
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_store_goes_from_executor_to_executor(
    bare: Lab, order: tuple[str, ...], uninterrupted: Uninterrupted
) -> None:
    making, dropped = Making(bare, order[0], DRAWS, workers=1), 0
    for executor, workers in zip(order[:-1], (1, 2)):
        making = making.by(executor, workers=workers)
        before, processes = making.committed(), making.start()
        making.until(before + 5, processes)
        making.stop(processes, signal.SIGTERM)
        dropped += making.dropped
        assert before < making.committed() < making.shards
    making = making.by(order[-1], workers=3)
    making.resume()
    check_whole(making, uninterrupted(DRAWS), orphans=dropped)


@pytest.mark.faults
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_records_are_byte_identical_whatever_the_number_of_workers(
    bare: Lab, workers: int, uninterrupted: Uninterrupted
) -> None:
    making = Making(bare, "ray", workers=workers)
    making.resume()
    check_whole(making, uninterrupted(4))
