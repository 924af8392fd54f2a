"""One rule for files that a user names: the ending says what is inside, and one that says something else is refused."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfm.storage.files import atomic

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's name of the format by ending, and how it is saved: small images have edges that JPEG's usual settings blur.
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
    """Raises ValueError unless the file's name ends in one of these, in either case."""
    if path.suffix.lower() not in endings:
        *rest, last = endings
        allowed = f"{', '.join(rest)} or {last}" if rest else last
        shown = f"its ending is {path.suffix}" if path.suffix else "it has no ending"
        raise ValueError(f"{path}: {shown}, and the ending says what is written: name a file in {allowed}")


def write_picture(path: Path, picture: Image, description: str = "") -> None:
    """Write an RGB picture in the format of the file's ending; what the picture shows goes into its metadata."""
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
