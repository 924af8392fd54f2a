"""The single server that forks the processes of the tests. The standard library starts one for each test process.

It has already imported what the children need. So a child starts fast, and four at once do not slow down a small
machine. It imports nothing of the tests themselves, because where the server starts, `tests` may be another package.
"""

from __future__ import annotations

import multiprocessing

_IMPORTED = [
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor"),
    "torch._dynamo",  # which DistributedDataParallel imports late
    *("torchdata.stateful_dataloader", "accelerate", "pyarrow.dataset", "scipy.optimize", "pytest"),
    *("nfm.storage", "nfm.pipeline.upkeep.audit", "nfm.pipeline.cli", "nfm.pipeline.graph", "nfm.pipeline.runner"),
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(_IMPORTED)
