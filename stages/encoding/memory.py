"""Recognises that memory ran out, and frees memory before a smaller attempt."""

from __future__ import annotations

import gc

# Messages of torch's CPU allocator, of cuBLAS, and of CUDA below torch's allocator.
_WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in main memory."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def free_memory(device: str) -> None:
    """Returns the memory of a failed batch to the device."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
