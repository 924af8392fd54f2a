"""Small image files of every kind, made byte by byte where Pillow does not write them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 900  # of pictures that take some time to decode
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6


def large_pictures(folder: Path, count: int) -> Path:
    """Pictures of two classes, some time to decode each; the last one."""
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((SIDE, SIDE, 3), number, np.uint8)).save(path, compress_level=1)
    return path


def raw_png(path: Path, rows: np.ndarray, bits: int, kind: int, transparent: bytes = b"", palette: bytes = b"") -> Path:
    """A PNG of these samples, [H, W] or [H, W, C], at any depth, with a tRNS chunk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    samples = rows.reshape(height, -1)
    if bits == 16:
        lines = [line.astype(">u2").tobytes() for line in samples]
    else:
        lines = [
            np.packbits(np.unpackbits(line.astype(np.uint8)[:, None], axis=1)[:, -bits:]).tobytes() for line in samples
        ]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", palette) if palette else b"")
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
        + chunk(b"IEND", b"")
    )
    return path


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def picture(path: Path, value: int = 100, size: int = 4) -> Path:
    """An RGB image of one grey."""
    return save(path, Image.new("RGB", (size, size), (value,) * 3))
