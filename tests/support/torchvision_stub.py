"""Makes torchvision importable if its build does not fit torch's (a CUDA build with a CPU build of torch).

torchmetrics and torch-fidelity import it for transforms that our tests do not use. Its operators are declared, not
defined: calling one still fails.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []


def make_importable() -> None:
    """Declare the operators that torchvision's own extension would have registered, when it cannot be loaded."""
    spec = importlib.util.find_spec("torchvision")
    if _declared or spec is None or spec.origin is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in sorted(set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', source))):
            library.define(f"{name}(Tensor x) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")
