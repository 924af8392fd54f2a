"""Running out of memory: how to tell, and what to give back before trying something smaller."""

from __future__ import annotations

import gc

# Of torch's allocator on a CPU; of cuBLAS, and of CUDA itself below torch's allocator.
_WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on this machine."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def free_memory(device: str) -> None:
    """What a failed batch left goes back to the device."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
