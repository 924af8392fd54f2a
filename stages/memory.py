"""Running out of memory: how to tell, and what to give back before trying something smaller."""

from __future__ import annotations

import gc


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on this machine."""
    import torch

    words = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "not enough memory" in words)
    )


def free_memory(device: str) -> None:
    """What a failed batch left goes back to the device."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
