"""A folder of class folders of images, optionally inside a training and a held-out folder. Pillow decodes them.

docs/data.md says what is read, what is not, and why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from nfm.stages.base import Reporter, StageError, Unfit
from nfm.stages.data.reading.decoding import Crop, Cut, Decoder, own_limit, shape_of, size_of
from nfm.stages.data.reading.tree import SPLITS, Skipped, Tree
from nfm.stages.data.source import Encoded, Loaded, Places, Stopping, check_texts, digest_files, keys_of

UNUSED = "a validation folder beside a test folder, which is the one held out"
BESIDE = "a folder without an image beside the training folder"


def _colour(value: Any) -> Any:
    """One spelling for each colour, so that the fingerprint does not depend on the spelling."""
    text = str(value).lower()
    if text not in ("white", "black") and not re.fullmatch("#[0-9a-f]{6}", text):
        raise ValueError('no colour: write "white", "black" or six hexadecimal digits like "#80ff00"')
    return {"#ffffff": "white", "#000000": "black"}.get(text, text)


Colour = Annotated[str, BeforeValidator(_colour)]


class ImageFolder(Encoded):
    """Image files by class. Keys are paths below the folder; labels are the positions of the classes in sorted order.

    With `image_size`, every image is cut to a square of this edge length, as `crop` says. Without it, images keep their
    pixels, and all must have the most frequent shape.
    """

    name, seeks = "images", True

    def __init__(
        self,
        path: str | None,
        image_size: int | None = None,
        channels: int = 3,
        average: int = 1,
        classes: Sequence[str] | None = None,
        threads: int = 0,
        background: str = "white",
        crop: Crop = "centre",
    ):
        self.root = _root(path)
        self.cut = Cut(image_size, channels, average, background, crop, threads)
        with own_limit():
            files_of, heldout, self.skipped = _listed(self.root, classes or ())
        # The digest is of files, so a folder without any must not count.
        found = sorted({os.path.basename(folder) for folder, files in files_of.items() if files})
        class_of = dict(zip(found, keys_of(self.root, found)))
        check_texts(f"{self.root}: the name of a class folder", class_of.values() if classes is None else ())
        self.classes = sorted(class_of.values()) if classes is None else list(classes)
        if unknown := sorted(set(class_of.values()) - set(self.classes)):
            raise Unfit(f"{self.root}: class folders {unknown[:5]} are not in data.classes: name every class")
        names: list[str] = []
        labels: list[int] = []
        tests: list[bool] = []
        for folder, files in files_of.items():
            names += files
            labels += [self.classes.index(class_of[os.path.basename(folder)])] * len(files) if files else []
            tests += [folder in heldout] * len(files)
        self.keys, self.paths = keys_of(self.root, names), [self.root / name for name in names]
        self.labels, self.test = np.array(labels, np.int64), np.array(tests, bool)

    @staticmethod
    def shape_of(config: Any) -> tuple[int, int, int] | None:
        return shape_of(config)

    def look(self, report: Reporter) -> tuple[int, int]:
        with own_limit():
            return size_of(self.cut, lambda step: self.paths[::step], len(self.paths))

    def about(self) -> dict[str, Any]:
        return {}

    def places(self, rows: np.ndarray) -> Places:
        return {"path": [os.fsencode(self.paths[row].relative_to(self.root)) for row in rows.tolist()]}

    def decode(
        self, places: Places, about: Mapping[str, Any], size: Sequence[int], scratch: Path, stopping: Stopping
    ) -> Loaded:
        names = places["path"]
        with own_limit():
            decoder = Decoder(self.cut, (size[0], size[1]), len(names), scratch, stopping, self.root)
            decoder.decode(range(len(names)), lambda position: self.root / os.fsdecode(names[position]))
        return decoder.loaded()

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        return digest_files(zip(self.keys, self.paths), known=known)


def _root(path: str | None) -> Path:
    if path is None:
        raise Unfit('data.source = "images" needs data.path, a folder of class folders')
    if not Path(path).is_dir():
        raise Unfit(f"data.path = {path!r} is no folder: name one that holds a folder for each class")
    return Path(path)


def _listed(root: Path, classes: Collection[str]) -> tuple[dict[str, list[str]], set[str], Skipped]:
    """The image files of every class folder, the set of held-out folders, and what was skipped."""
    tree = Tree(root)
    top = tree.folders()
    train, heldout = _splits(tree, top, classes)
    folders = {part: tree.folders(part) for part in (train, heldout) if part is not None} or {"": top}
    files_of = tree.images([folder for part in folders.values() for folder in part])
    for part, inside in folders.items():
        if not any(files_of[folder] for folder in inside):
            raise StageError(_nothing(root, part, part == heldout, tree.skipped))
    for folder in files_of:
        _refuse_splits(root, folder, tree.inner[folder])
    if train is not None and not set(names := [os.path.basename(folder) for folder in folders[train]]) <= set(classes):
        _refuse_splits(root, train, names)
    return files_of, set(folders.get(heldout, ()) if heldout else ()), tree.skipped


def _splits(tree: Tree, top: Sequence[str], classes: Collection[str]) -> tuple[str | None, str | None]:
    """The training and the held-out folder among the top folders; (None, None) if all are classes."""
    role_of = {name: SPLITS.get(name.casefold()) for name in top}
    if not any(role_of.values()) or (set(top) <= set(classes) and not all(role_of.values())):
        _refuse_near_splits(tree.root, top, classes)
        return None, None
    parts: dict[str, str] = {}
    for name, role in role_of.items():
        if role and role in parts:
            raise StageError(f"{tree.root}: {parts[role]}/ and {name}/ are both a {role} folder: keep one of them")
        if role:
            parts[role] = name
    others = [name for name, role in role_of.items() if not role]
    if "training" not in parts or (found := [name for name in others if _has_image(tree.root, name)]):
        held = ", ".join(f"{name}/" for name in parts.values())
        beside = ", ".join(f"{name}/" for name in (others if "training" not in parts else found)[:5])
        raise Unfit(
            f"{tree.root}: {held} cannot be told from a class"
            + (f" beside {beside}" if beside else " without a training folder (train/) beside")
            + ": a training and a held-out folder hold class folders and stand alone; move away what is neither, or, "
            "if all of these are classes, name every one in data.classes"
        )
    for name in others:
        tree.skipped.add(BESIDE, f"{name}/")
    if "test" in parts and "validation" in parts:
        tree.skipped.add(UNUSED, f"{parts['validation']}/")
    return parts["training"], parts.get("test", parts.get("validation"))


def _has_image(root: Path, name: str) -> bool:
    return any(Tree(root).images([name]).values())


def _refuse_near_splits(root: Path, names: Sequence[str], classes: Collection[str]) -> None:
    """Refuses names such as train2017 or test_a: they are not split names, and probably not classes."""
    near = [name for name in names if "".join(filter(str.isalpha, name.casefold())) in SPLITS and name not in classes]
    if near:
        raise Unfit(
            f"{root}: {', '.join(f'{name}/' for name in near[:5])} may be a training or held-out folder, or a class: "
            "rename it to train or test, or name every class in data.classes"
        )


def _refuse_splits(root: Path, folder: str, inside: Sequence[str]) -> None:
    roles = {SPLITS.get(name.casefold()) for name in inside}
    if "training" in roles and roles & {"test", "validation"}:
        held = ", ".join(f"{name}/" for name in inside if name.casefold() in SPLITS)
        raise Unfit(
            f"{root / folder}: holds {held}, and would be one class of what is trained on and held out: "
            "training and held-out folders stand at the top of data.path, with the class folders in them"
        )


def _nothing(root: Path, part: str, heldout: bool, skipped: Skipped) -> str:
    expected = f"expected {part}/CLASS/IMAGE.png" if part else "expected CLASS/IMAGE.png"
    what = "a held-out folder without classes: " if heldout else ""
    remedy = "; sort its images into class folders, or move it out of data.path" if heldout else ""
    seen = f"; not taken: {'; '.join(skipped.lines())}" if skipped.reasons else ""
    return f"{root / part}: {what}no image file in a class folder here ({expected}){remedy}{seen}"
