"""Checks the names of files that a user gives: the ending must fit the contents."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfm.storage.files import atomic

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's format for each ending and how to save it. JPEG's default settings would blur the edges of small images.
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}
PICTURE = tuple(_FORMATS)
JSON = (".json",)
_DESCRIPTION = 0x010E  # ImageDescription, of EXIF


def check_ending(path: Path, endings: Collection[str]) -> None:
    """Raises ValueError unless the file name ends in one of these, in upper or lower case."""
    if path.suffix.lower() not in endings:
        *rest, last = endings
        allowed = f"{', '.join(rest)} or {last}" if rest else last
        shown = f"its ending is {path.suffix}" if path.suffix else "it has no ending"
        raise ValueError(f"{path}: {shown}, and the ending says what is written: name a file in {allowed}")


def write_picture(path: Path, picture: Image, description: str = "") -> None:
    """Writes an RGB picture in the format of the file's ending. `description` goes into its metadata."""
    from PIL.Image import Exif
    from PIL.PngImagePlugin import PngInfo

    check_ending(path, PICTURE)
    form, options = _FORMATS[path.suffix.lower()]
    said: dict[str, Any] = {}
    if description and form == "PNG":
        said["pnginfo"] = PngInfo()
        said["pnginfo"].add_text("Description", description)
    elif description:
        said["exif"] = Exif()
        said["exif"][_DESCRIPTION] = description
    data = io.BytesIO()
    picture.convert("RGB").save(data, form, **options, **said)
    atomic.write_bytes(path, data.getvalue())
