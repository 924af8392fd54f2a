"""What encoding is made of: a layer's matrix products by themselves, and a profile of a whole batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nfm.stages.trained import costs
from nfm.stages.trained.devices.precision import Precision, autocast_dtype

if TYPE_CHECKING:
    from benchmarks.encode.rows import Case, Way

# A profile's kinds of work, by the names of torch's operators; the first that fits counts.
KINDS = {
    "matrix products": ("addmm", "aten::mm", "bmm", "mkldnn_linear", "linear_pointwise", "gemm"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "norms": ("layer_norm",),
    "gelu": ("gelu",),
    "copies and casts": ("copy_", "aten::cat", "flip", "constant_pad", "clone", "fill_", "pixel_"),
    "elementwise": ("aten::add", "aten::sub", "aten::mul", "aten::div", "aten::exp", "aten::neg", "aten::mean"),
}


class Products:
    """The four matrix products of a layer at the rows of a whole batch, each as often as it takes a while."""

    def __init__(self, case: Case, precision: Precision, batch: int) -> None:
        import torch

        dtype, device = autocast_dtype(precision) or torch.float32, case.device
        tokens, _ = costs.tokens_of(list(case.image_shape), case.patch)
        width = case.channels
        self.device, self.rows = device, tokens * batch
        self.flops, self.products = 0.0, []
        for inner, outer in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            a = torch.randn(self.rows, inner, device=device, dtype=dtype)
            b = torch.randn(outer, inner, device=device, dtype=dtype).t()
            self.products.append((a, b, torch.empty(self.rows, outer, device=device, dtype=dtype)))
            self.flops += 2.0 * self.rows * inner * outer

    def rate(self) -> float:
        """FLOP/s over all four, each at its best of several; so they are weighted by their FLOPs."""
        import torch

        seconds = 0.0
        with torch.inference_mode():
            for a, b, out in self.products:
                taken: list[float] = []
                until = time.perf_counter() + 0.05
                while len(taken) < 4 or time.perf_counter() < until:
                    _wait(self.device)
                    started = time.perf_counter()
                    torch.mm(a, b, out=out)
                    _wait(self.device)
                    taken.append(time.perf_counter() - started)
                seconds += min(taken[1:])
        return self.flops / seconds


def profile(way: Way) -> dict[str, float]:
    """Shares of a batch's time by kind of work, `KINDS` and the rest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    on_gpu = way.coupling.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profiled(activities=activities) as found:
        for _ in range(2):
            way.encode(way.batch)
    shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in found.key_averages():
        if not event.key.startswith(("aten::", "mkldnn::")):
            continue  # on a GPU kernels are listed once more by themselves
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "the rest")
        shares[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(shares.values()) or 1.0
    return {kind: round(share / total, 4) for kind, share in shares.items()}


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
