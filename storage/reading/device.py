"""Batches as torch tensors: on the CPU they share memory with numpy arrays, other devices get copies ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.errors.arguments import WrongArgument, wrong
from nfm.storage.reading.pool import empty

Arrays = dict[str, npt.NDArray[Any]]


class Upload:
    """Copies arrays to a device as they are stored, and converts them there: this moves the fewest bytes.

    On CUDA the copy runs from page-locked memory on its own stream, in parallel with the consumer's kernels. It is
    complete when a call returns, so that memory may be filled again at once. The tensors have their own memory on the
    device.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self.device = _there(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def on_host(self) -> bool:
        """Whether tensors of this device share memory with numpy arrays."""
        return self.device.type == "cpu"

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array from which copies to the device are fastest: page-locked for CUDA."""
        import torch

        array = empty(shape, dtype)
        return array if self._stream is None else torch.from_numpy(array).pin_memory().numpy()

    def share(self, arrays: Arrays) -> dict[str, Any]:
        """CPU tensors that share the arrays' memory."""
        import torch

        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def __call__(self, arrays: Arrays, scales: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        """Tensors on the device, ready when this returns.

        Those in `scales` are float32 a v + b, others are unchanged.
        """
        import torch

        with torch.cuda.stream(self._stream):
            tensors = {
                name: tensor.to(self.device, non_blocking=self._stream is not None)
                for name, tensor in self.share(arrays).items()
            }
            for name, scale in scales.items():
                tensors[name] = tensors[name].float()
                if scale != (1.0, 0.0):
                    a, b = (float(np.float32(value)) for value in scale)
                    tensors[name] = tensors[name].mul_(a).add_(b)
        if self._stream is not None:
            self._stream.synchronize()
        return tensors

    def hand_over(self, tensors: dict[str, Any]) -> None:
        """Tells CUDA's allocator that the consumer's stream uses the tensors, so that their memory is not reused too
        early.
        """
        import torch

        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            for tensor in tensors.values():
                tensor.record_stream(stream)


def _there(device: Any) -> Any:
    """A device that this machine has and that can hold values. Raises WrongArgument."""
    import torch

    try:
        found = torch.device(device) if not isinstance(device, bool) else None
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type == "meta":
        raise wrong("device", device, "'cpu', 'cuda', 'cuda:1' or another device of torch's, or None for numpy arrays")
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise WrongArgument(
            "device",
            f"is {str(found)!r}, which torch cannot use here ({why}): pass device='cpu', or None for numpy arrays",
        ) from error
    return found
