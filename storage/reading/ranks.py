"""Which part of every batch this process reads."""

from __future__ import annotations

import os
import sys

from nfm.storage.errors import StorageError
from nfm.storage.errors.arguments import WrongArgument


def find_rank(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """(rank, world size): torch.distributed's when it is initialised, else the arguments, else (0, 1).

    Raises StorageError when they disagree, and when WORLD_SIZE in the environment is above 1 and nobody said
    which rank this is: every process would read the same records.
    """
    if (rank is None) != (world_size is None):
        raise WrongArgument("rank", f"is {rank} and world_size is {world_size}: pass both or neither")
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise WrongArgument("rank", f"is {rank}, which is outside 0..{world_size - 1}")
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        found = int(distributed.get_rank()), int(distributed.get_world_size())
        if rank is not None and found != (rank, world_size):
            raise StorageError(
                f"torch.distributed says rank {found[0]} of {found[1]}, the arguments rank {rank} of "
                f"{world_size}: leave the arguments out"
            )
        return found
    if rank is not None and world_size is not None:
        return rank, world_size
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise StorageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment and nobody said which rank this "
            "is: initialise torch.distributed first, or pass rank= and world_size="
        )
    return 0, 1
