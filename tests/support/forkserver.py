"""The one server that forks the tests' processes: the standard library starts one for each process of the tests.

It has imported what the children need, so that a child costs no seconds, and four at once do not starve a small
machine. Nothing of the tests themselves: where the server starts, `tests` may be another package.
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
