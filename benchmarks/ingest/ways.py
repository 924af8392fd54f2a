"""The ways to make squares of JPEGs: the sources of the data stage, and what others use for it.

A way is a function of a scratch folder that gives how many images it made.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nfm.stages.base import Result
from nfm.stages.data import stage
from nfm.stages.data.config import DataConfig

Way = Callable[[Path], int]


class Silent:
    """A reporter that tells nobody."""

    stopping = ending = False

    def check_lock(self) -> None: ...
    def progress(self, *_: Any, **__: Any) -> None: ...
    def say(self, text: str) -> None: ...
    def log(self, kind: str, **_: Any) -> None: ...


def ways(root: Path, side: int) -> dict[str, Way]:
    """Every way by its name, over the layouts in `root`."""
    files, tars, parquet = (root / name for name in ("files", "tars", "parquet"))
    return {
        "a plain loop of Pillow": pillow(files, side),
        "source images": ours("images", files, side),
        "source webdataset": ours("webdataset", tars, side),
        "source parquet": ours("parquet", parquet, side),
        'source webdataset, crop "adm"': ours("webdataset", tars, side, "adm"),
        "WebDataset's own decoder": webdataset(tars, side),
        "img2dataset's Resizer": img2dataset(files, side),
        "torchvision's ImageFolder": torchvision(files, side),
    }


def ours(source: str, path: Path, side: int, crop: str = "centre") -> Way:
    """A source of the data stage: listed, hashed, decoded in a random order."""

    def run(scratch: Path) -> int:
        config = {"source": source, "path": str(path), "image_size": side, "crop": crop, "threads": 1}
        opened = stage.open_source(DataConfig.model_validate(config))
        opened.digest()
        loaded = opened.load(np.random.default_rng(0).permutation(len(opened.keys)), scratch, Silent())
        return len(loaded.images) - len(loaded.rejected)

    return run


def whole_stage(path: Path, side: int) -> Way:
    """The data stage itself over tars, with all that it writes: shards, tables and digests."""

    def run(scratch: Path) -> int:
        config = {"source": "webdataset", "path": str(path), "image_size": side, "crop": "centre"}
        found: Result = stage.run(
            DataConfig.model_validate(config | {"threads": 1, "executor": "serial"}), {}, scratch, Silent()
        )
        return int(found.metrics["images"] + found.metrics["heldout"])

    return run


def square(image: Image.Image, side: int) -> np.ndarray:
    """The central square, resized: what a plain loop does with a decoded image."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    cut = image.crop((left, top, left + edge, top + edge))
    return np.asarray(cut.resize((side, side), Image.Resampling.BICUBIC))


def pillow(path: Path, side: int) -> Way:
    def run(scratch: Path) -> int:
        return sum(square(Image.open(file).convert("RGB"), side).shape == (side, side, 3) for file in path.glob("*/*"))

    return run


def webdataset(path: Path, side: int) -> Way:
    def run(scratch: Path) -> int:
        import webdataset as wds

        tars = [str(file) for file in sorted(path.iterdir())]
        samples = wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
        return sum(square(image, side).shape == (side, side, 3) for image, _ in samples)

    return run


def img2dataset(path: Path, side: int) -> Way:
    """Its resizer as its workers call it: with OpenCV, and written as JPEG again, as it stores them."""

    def run(scratch: Path) -> int:
        # Its file alone: the package's face imports the downloader and all that this needs.
        package = importlib.util.find_spec("img2dataset")
        if package is None or package.origin is None:
            raise ImportError("No module named 'img2dataset'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = Path(package.origin).with_name("resizer.py")
            spec = importlib.util.spec_from_file_location("_resizer", file)
            assert spec is not None
            assert spec.loader is not None
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        resize = module.Resizer(side, "center_crop", False)
        made = (resize(io.BytesIO(file.read_bytes())) for file in path.glob("*/*"))
        return sum(error is None and len(content) > 0 for content, *_, error in made)

    return run


def torchvision(path: Path, side: int) -> Way:
    """Its folder and its transforms of Pillow images, which are Python and call none of its compiled operators."""

    def run(scratch: Path) -> int:
        _declare_operators()
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

        cut = Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop(side), np.asarray])
        return sum(image.shape == (side, side, 3) for image, _ in ImageFolder(str(path), cut))

    return run


_declared: list[Any] = []


def _declare_operators() -> None:
    """Where torchvision was built for another torch, its import fails for two operators that it cannot load."""
    import torch

    if not _declared and not hasattr(torch.ops.torchvision, "nms"):
        _declared.append(library := torch.library.Library("torchvision", "FRAGMENT"))
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
