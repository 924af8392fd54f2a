"""Checkpoints of TarFlow as its authors save it (apple/ml-tarflow), and the same flow as weights of ours.

Ours computes the same z and log-determinant: a comparison of the two codes agreed to 1e-15 in float64.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEAD_SIZE = 64  # of every published checkpoint; no tensor's shape tells it
_SOME = 3  # names in a message
_NAME = re.compile(r"_model_(\d+)_(\d+)_(\d+)_(\d+)_(\d+\.\d+|uniform)\.\w+")
# Theirs -> ours, within a block. The causal mask is a buffer there, which ours has no need of.
_BLOCK = {
    "proj_in.weight": "embed.weight", "proj_in.bias": "embed.bias", "pos_embed": "positions", "class_embed": "classes",
    "proj_out.weight": "head.weight", "proj_out.bias": "head.bias",
}  # fmt: skip
_LAYER = {
    "attention.norm": "attention_norm", "attention.qkv": "qkv", "attention.proj": "project", "mlp.norm": "mlp_norm",
    "mlp.main.0": "expand", "mlp.main.2": "contract",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What the tensors of a checkpoint tell; `classes` is 0 without classes, `volume_preserving` has no log-scales."""

    tokens: int
    features: int
    classes: int
    channels: int
    blocks: int
    layers: int
    volume_preserving: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of such a checkpoint by name, but for `var` and the masks."""
        c, d, out = self.channels, self.features, self.features * (1 if self.volume_preserving else 2)
        block: dict[str, tuple[int, ...]] = {
            "proj_in.weight": (c, d), "proj_in.bias": (c,), "pos_embed": (self.tokens, c), "proj_out.weight": (out, c),
            "proj_out.bias": (out,),
        }  # fmt: skip
        if self.classes:
            block["class_embed"] = (self.classes, 1, c)
        rows = {"attention.norm": (c,), "attention.qkv": (3 * c, c), "attention.proj": (c, c), "mlp.norm": (c,),
                "mlp.main.0": (4 * c, c), "mlp.main.2": (c, 4 * c)}  # fmt: skip
        for layer in range(self.layers):
            for name, shape in rows.items():
                block[f"attn_blocks.{layer}.{name}.weight"] = shape
                block[f"attn_blocks.{layer}.{name}.bias"] = shape[:1]
        return {f"blocks.{number}.{name}": shape for number in range(self.blocks) for name, shape in block.items()}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped where its format allows; no code of the file runs.

    Raises ValueError for what is none, or holds more than named tensors.
    """
    try:
        # Read a part at a time where the format allows: a published file has gigabytes.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ValueError(
                "holds Python objects beside tensors, and to load them would run its code: save the model's "
                "state_dict() alone, as the authors' training does"
            ) from error
        raise ValueError("no file of torch.save; name the checkpoint of the model (..._model_....pth)") from error
    except OSError:
        raise
    except Exception as error:  # whatever torch makes of other bytes
        raise ValueError("no file of torch.save; name the checkpoint of the model (..._model_....pth)") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(
            "holds more than named tensors: save the model's state_dict() alone; the optimizer's file "
            "(..._opt_....pth) is another one"
        )
    return state


def sizes_of(state: Mapping[str, Tensor]) -> Sizes:
    """The sizes that the tensors tell. Raises ValueError where names are missing, left over, or of another shape."""
    first = {name: tuple(state[f"blocks.0.{name}"].shape) for name in _BLOCK if f"blocks.0.{name}" in state}
    if missing := [name for name in _BLOCK if name not in first and name != "class_embed"]:
        raise ValueError(f"no TarFlow as its authors save it: it has no tensor blocks.0.{missing[0]}")
    if any(len(first[name]) != 2 for name in ("proj_in.weight", "pos_embed", "proj_out.weight")):
        raise ValueError(f"no TarFlow as its authors save it: blocks.0 has tensors of shapes {first}")
    (channels, features), tokens = first["proj_in.weight"], first["pos_embed"][0]
    sizes = Sizes(
        tokens, features, first.get("class_embed", (0,))[0], channels, _count(state, r"blocks\.(\d+)\."),
        _count(state, r"blocks\.0\.attn_blocks\.(\d+)\."), first["proj_out.weight"][0] == features,
    )  # fmt: skip
    _check_names(state, sizes)
    return sizes


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _check_names(state: Mapping[str, Tensor], sizes: Sizes) -> None:
    expected = sizes.shapes()
    masks = {f"blocks.{number}.attn_mask": (sizes.tokens, sizes.tokens) for number in range(sizes.blocks)}
    possible = {**expected, **masks, "var": (sizes.tokens, sizes.features)}
    if missing := [name for name in expected if name not in state]:
        raise ValueError(f"{len(missing)} of its tensors are missing: {_listed(missing)}; copy the file once more")
    if unknown := [name for name in state if name not in possible]:
        raise ValueError(f"{len(unknown)} tensors that no TarFlow of its authors has: {_listed(unknown)}")
    for name, value in state.items():
        if tuple(value.shape) != possible[name]:
            raise ValueError(
                f"{name} is {_by(value.shape)}, beside its other tensors it would be {_by(possible[name])}"
            )
        if not value.is_floating_point() and name not in masks:
            raise ValueError(f"{name} is of {value.dtype}, weights are floats")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SOME]) + (", ..." if len(names) > _SOME else "")


def architecture(sizes: Sizes, image_shape: Sequence[int], head_size: int = HEAD_SIZE) -> dict[str, Any]:
    """The arguments of our TarFlow, but for `prior`. Raises ValueError where it is not one of such images."""
    image_channels, height, width = image_shape
    patch = math.isqrt(sizes.features // image_channels) or 1
    if image_channels * patch**2 != sizes.features or (height // patch) * (width // patch) != sizes.tokens:
        told = f", for instance images {' or '.join(fitting)}" if (fitting := _fitting(sizes, image_channels)) else ""
        raise ValueError(
            f"a flow of {sizes.tokens} patches of {sizes.features} values{told}; the data's images are "
            f"{image_channels}x{height}x{width}: name the config of the data that it was trained on"
        )
    return {
        "image_shape": list(image_shape), "classes": sizes.classes, "patch": patch, "channels": sizes.channels,
        "blocks": sizes.blocks, "layers": sizes.layers, "head_size": head_size,
    }  # fmt: skip


def _fitting(sizes: Sizes, image_channels: int) -> list[str]:
    """Shapes of square images that a flow may be of, of so many channels where there is one."""
    side, shapes = math.isqrt(sizes.tokens), {}
    for channels in (1, 3, 4):
        patch = math.isqrt(sizes.features // channels)
        if side**2 == sizes.tokens and channels * patch**2 == sizes.features:
            shapes[channels] = f"{channels}x{side * patch}x{side * patch}"
    return [shapes[image_channels]] if image_channels in shapes else list(shapes.values())


def convert(state: Mapping[str, Tensor], sizes: Sizes) -> tuple[dict[str, Tensor], bool]:
    """(The weights of our TarFlow in float32, whether it has a `prior`).

    A volume-preserving flow has log-scales of zero, D rows of zeros before its head, and noise of the variance `var`
    there. Raises ValueError for values that no flow has.
    """
    weights = {}
    for name in sizes.shapes():
        _, number, rest = name.split(".", 2)
        value = state[name].float()
        if not value.isfinite().all():
            raise ValueError(f"{name} has values that are not finite: its training went wrong, take another checkpoint")
        if rest == "class_embed":
            value = value[:, 0]
        if rest.startswith("proj_out") and sizes.volume_preserving:
            value = torch.cat([torch.zeros_like(value), value])
        weights[f"blocks.{number}.{_ours(rest)}"] = value
    for block in range(sizes.blocks):
        _check_mask(f"blocks.{block}.attn_mask", state)
    variance = state["var"].float() if "var" in state else torch.ones(())
    if not ((variance > 0) & variance.isfinite()).all():
        raise ValueError("var has values that are no variance; they are above 0")
    prior = bool((variance != 1).any())
    return {**weights, **({"variance": variance} if prior else {})}, prior


def _ours(name: str) -> str:
    if name in _BLOCK:
        return _BLOCK[name]
    _, layer, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"layers.{layer}.{_LAYER[part]}.{kind}"


def _check_mask(name: str, state: Mapping[str, Tensor]) -> None:
    if name in state and not torch.equal(state[name].bool(), torch.ones_like(state[name]).tril().bool()):
        raise ValueError(f"{name} is not the causal mask, which every TarFlow of its authors has")


def eta_of(file: str, sizes: Sizes) -> float | None:
    """The noise's standard deviation, which the authors' training writes into the file's name; None for other names.

    `imagenet_model_2_768_8_8_0.05.pth` is patch 2, 768 channels, 8 blocks of 8 layers, eta 0.05. Raises ValueError for
    a name of other sizes than the tensors have, and for noise that is not Gaussian.
    """
    if (found := _NAME.search(file)) is None:
        return None
    said, inside = [int(part) for part in found.groups()[1:4]], [sizes.channels, sizes.blocks, sizes.layers]
    if said != inside or sizes.features % int(found[1]) ** 2:
        raise ValueError(
            f"its name says patch, channels, blocks and layers {', '.join(found.groups()[:4])}, its tensors have "
            f"channels, blocks and layers {', '.join(map(str, inside))}: give --eta, then the name is not read"
        )
    if found[5] == "uniform" or not float(found[5]):
        raise ValueError(
            f"by its name it was trained with noise {found[5]}, not with Gaussian noise: give --eta, the deviation of "
            "the noise that pairs are made with"
        )
    return float(found[5])


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
