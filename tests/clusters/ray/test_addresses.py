"""Addresses of Ray clusters that do not answer."""

from __future__ import annotations

import time

import pytest

from nfm.stages.base import StageError
from nfm.stages.executors import ray_cluster
from tests.support.patience import allowed


def test_an_address_where_no_cluster_answers_is_refused_at_once_in_one_line() -> None:
    began = time.monotonic()
    with (
        pytest.raises(StageError, match=r"no Ray cluster answers at '127.0.0.1:1'.*ray_address") as caught,
        ray_cluster.cluster("127.0.0.1:1", workers=1, threads=1, device="cpu"),
    ):
        pass
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - began < allowed(10)


def test_the_secret_of_an_address_is_not_shown() -> None:
    with (
        pytest.raises(StageError, match=r"no Ray cluster answers at 'ray://\*\*\*@127.0.0.1:1'") as caught,
        ray_cluster.cluster("ray://user:secret@127.0.0.1:1", workers=1, threads=1, device="cpu"),
    ):
        pass
    assert "secret" not in repr(caught.value)
