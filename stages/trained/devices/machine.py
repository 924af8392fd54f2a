"""The machine that this process runs on, its devices, and what to do when their memory is full."""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Messages of torch's CPU allocator, of cuBLAS, and of CUDA below torch's allocator.
_WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


def machine() -> dict[str, Any]:
    """A description of the machine, without anything that identifies it."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = shutil.disk_usage(tempfile.gettempdir()).total
    return {
        "cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1), "disk_gib": round(disk / 2**30),
        "system": f"{platform.system()} {platform.release().split('-')[0]}", "python": platform.python_version(),
    }  # fmt: skip


def check_device(name: str) -> str:
    """The name of a device. Raises ValueError for one that no machine has."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        raise ValueError("is none of auto, cpu, cuda and cuda:0, which run here; name one of these")
    return name


def pick_device(name: str) -> str:
    """`auto` is CUDA if this machine has it. Raises Unfit for an invalid or missing device.

    Whoever asks computes there: from now on float32 is float32, and TF32 only where a precision says so.
    """
    import torch

    from nfm.stages.base import Unfit  # here, for benchmarks that describe a machine without the library's config
    from nfm.trainers.training.products import forbid_tf32

    forbid_tf32()
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_device(name)
    except ValueError as error:
        raise Unfit(f"device = {name!r}: {error}") from None
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise Unfit(f"device = {name!r}: torch sees no CUDA device here; set device to 'auto' or 'cpu'")
        if int(name.partition(":")[2] or 0) >= count:
            raise Unfit(f"device = {name!r}: torch sees {count} CUDA devices here, counted from 0; name one of them")
    return name


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Computes with this many threads inside the block, and then with the number from before.

    Results depend on it, bit by bit.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in main memory."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def free_memory(device: str) -> None:
    """Returns the memory of a failed batch to the device. On the processor it went back with the tensors."""
    import torch

    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
