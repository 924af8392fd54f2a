"""What torchrun tells the processes that it starts, for those that are forked: two imports of torch are ten seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import TCPStore


@contextmanager
def group(size: int = 2) -> Iterator[list[dict[str, str]]]:
    """The environment of each process of a group. They meet at a store that this process holds, as torchrun's do."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    of_all = {**meeting, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    yield [{**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
