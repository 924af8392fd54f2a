"""The IDX files of the MNIST family, plain or gzipped, from a folder or from a Debian package."""

from __future__ import annotations

import gzip
import math
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from nfm.stages.base import Reporter, StageError, Unfit
from nfm.stages.data.reading.labels import Labels
from nfm.stages.data.reading.values import Values
from nfm.stages.data.source import Loaded, box_average, check_unpacked, digest_files
from nfm.storage.errors import by

TRAIN, TEST = "train", "t10k"
# two zero bytes, the code of uint8, the number of dimensions
MAGIC = {"images-idx3": 0x00000803, "labels-idx1": 0x00000801}

KIND_OF = {MAGIC["images-idx3"]: "images", MAGIC["labels-idx1"]: "labels"}
VALUES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
GZIP = b"\x1f\x8b"


class Idx:
    """Images [N, 1, H, W] uint8 and labels of `train-*-ubyte[.gz]`; `t10k-*` is the test set if present."""

    name = "idx"

    def __init__(
        self,
        path: str | None,
        debian_package: str | None = None,
        average: int = 1,
        classes: Sequence[str] | None = None,
        first_label: int | None = None,
    ):
        self.average = average
        self.folder = _folder(path, debian_package)
        self.files = _files(self.folder)
        parts = [(part, *self._read(part)) for part in (TRAIN, TEST) if f"{part}-images-idx3" in self.files]
        self.counts = {part: len(images) for part, images, _ in parts}
        shapes = {part: images.shape[1:] for part, images, _ in parts}
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{part} {by(shape)}" for part, shape in shapes.items())
            raise StageError(f"{self.files[f'{TEST}-images-idx3']}: train and test images differ in shape: {told}")
        self.pixels = np.concatenate([images for _, images, _ in parts])
        values = np.concatenate([labels for _, _, labels in parts]).astype(np.int64)
        self.keys = [f"{part}/{row:07d}" for part, images, _ in parts for row in range(len(images))]
        self.given = Labels(values, self.keys, str(self.folder), first_label or 0, classes)
        self.labels, self.classes = self.given.counted, self.given.classes()
        self.test = np.concatenate([np.full(len(images), part == TEST) for part, images, _ in parts])

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        if f"{TEST}-labels-idx1" in self.files and f"{TEST}-images-idx3" not in self.files:
            raise StageError(f"{self.folder}: {TEST}-images-idx3-ubyte[.gz] is missing beside the labels: fetch it")
        for part, count in self.counts.items():
            if not count:
                raise StageError(
                    f"{self.files[f'{part}-images-idx3']}: holds no image: fetch the file anew, or take it away"
                )
        _refuse_differing_twins(self.folder)
        self.given.check(report)
        pixels, values = self.pixels[rows], Values()
        values.add(pixels)
        if told := values.remark("uint8"):
            report.say(f"{self.folder}: {told}")
        return Loaded(box_average(pixels, self.average), self.given.outside(rows, len(self.classes)))

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        # Of the unpacked content, so that plain and gzipped files give the same digest.
        return digest_files(self.files.items(), _open, known=known)

    def _read(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        images_path, labels_path = self.files[f"{part}-images-idx3"], self.files.get(f"{part}-labels-idx1")
        if labels_path is None:
            raise StageError(f"{images_path.parent}: {part}-labels-idx1-ubyte[.gz] is missing beside the images")
        images, labels = (
            read_idx(images_path, MAGIC["images-idx3"]),
            read_idx(labels_path, MAGIC["labels-idx1"]),
        )
        if len(images) != len(labels):
            raise StageError(f"{labels_path}: {len(labels)} labels for {len(images)} images: fetch both files anew")
        return images[:, None], labels


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The array of one IDX file: big-endian magic, one 32-bit size per dimension, then uint8 values."""
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    try:
        with _open(path) as file:
            raw = file.read(header)
            if len(raw) < header or raw[:4] != magic.to_bytes(4, "big"):
                raise StageError(f"{path}: {_other_content(raw, magic)}")
            promised = math.prod(np.frombuffer(raw[4:], ">u4").tolist())
            if isinstance(file, gzip.GzipFile):  # a plain file cannot return more than its size
                check_unpacked(path, path.stat().st_size, promised)
            raw += _at_most(file, promised + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise StageError(f"{path}: cannot be read ({error}): fetch the file anew") from error
    shape = tuple(np.frombuffer(raw[4:header], ">u4").astype(np.int64).tolist())
    if len(raw) - header != promised:
        held = len(raw) - header
        differs = "holds more than" if held > promised else f"is shorter than its header promises: {held:,} of"
        raise StageError(f"{path}: {differs} the {promised:,} bytes of values, {by(shape)}: fetch the file anew")
    if 0 in shape[1:]:
        raise StageError(f"{path}: its images, {by(shape)}, have no pixels: fetch the file anew")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _other_content(raw: bytes, magic: int) -> str:
    """What a file with an unexpected header contains, and what to do."""
    wanted = KIND_OF[magic]
    if len(raw) < 4 or (found := int.from_bytes(raw[:4], "big")) == magic:
        return f"only {len(raw)} bytes, an IDX file of {wanted} begins with more: fetch the file anew"
    told = f"magic 0x{found:08x}, expected 0x{magic:08x}"
    if found in KIND_OF:
        return f"{told}: these are {KIND_OF[found]} where {wanted} were expected; rename the files"
    if raw[:4][::-1] == magic.to_bytes(4, "big"):
        return f"{told}: its header is little-endian; write magic and sizes big-endian (astype('>u4'))"
    if raw[:2] == GZIP:
        return f"{told}: gzip data within gzip; unpack it once"
    if raw[:2] == b"\0\0" and raw[2] in VALUES:
        return (
            f"{told}: {VALUES[raw[2]]} values of {raw[3]} dimensions where {wanted} are uint8 of {magic & 0xFF}; "
            "save them so"
        )
    return f"{told}: this is not the IDX file that its name says; fetch the file anew"


def _at_most(file: IO[bytes], count: int) -> bytes:
    """Up to `count` bytes. If a header promises more than there is, no memory is wasted."""
    read = bytearray()
    while len(read) < count and (chunk := file.read(min(count - len(read), 1 << 20))):
        read += chunk
    return bytes(read)


def _open(path: Path, mode: str = "rb") -> IO[bytes]:
    """The unpacked content. The first bytes of the file, not its name, decide whether it is gzip data."""
    file = open(path, "rb")  # noqa: SIM115 - returned open
    packed = file.read(len(GZIP)) == GZIP
    file.seek(0)
    if not packed:
        return file
    file.close()
    return gzip.open(path, "rb")  # type: ignore[return-value]


def _folder(path: str | None, package: str | None) -> Path:
    if path is not None:
        if not Path(path).is_dir():
            raise Unfit(f"data.path = {path!r} is no folder: name the one that holds train-images-idx3-ubyte[.gz]")
        return Path(path)
    if package is None:
        raise Unfit('data.source = "idx" needs data.path, the folder that holds train-images-idx3-ubyte[.gz]')
    remedy = f"run `apt-get install {package}`, or set data.path to a folder with train-images-idx3-ubyte[.gz]"
    try:
        listing = subprocess.run(
            ["dpkg", "-L", package], capture_output=True, encoding="utf-8", errors="surrogateescape", check=True
        ).stdout
    except FileNotFoundError as error:
        raise Unfit(f"data.debian_package = {package!r}: this system has no dpkg: {remedy}") from error
    except subprocess.CalledProcessError as error:
        raise Unfit(f"data.debian_package = {package!r} is not installed: {remedy}") from error
    for line in listing.splitlines():
        if Path(line).name.startswith(f"{TRAIN}-images-idx3-ubyte") and Path(line).is_file():
            return Path(line).parent
    raise Unfit(f"data.debian_package = {package!r} holds no train-images-idx3-ubyte[.gz]: {remedy}")


def _twins(folder: Path) -> dict[str, list[Path]]:
    """The existing files of each part, the plain one first."""
    names = {f"{part}-{kind}": f"{part}-{kind}-ubyte" for part in (TRAIN, TEST) for kind in MAGIC}
    there = {
        key: [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()] for key, name in names.items()
    }
    return {key: paths for key, paths in there.items() if paths}


def _refuse_differing_twins(folder: Path) -> None:
    """Refuses a plain and a gzipped file of the same name with different contents, as only one of them is read."""
    for paths in _twins(folder).values():
        if len(paths) > 1 and len({digest_files([("", path)], _open)["digest"] for path in paths}) > 1:
            raise StageError(
                f"{folder}: {' and '.join(path.name for path in paths)} hold different content: take away one of them"
            )


def _files(folder: Path) -> dict[str, Path]:
    found = {key: paths[0] for key, paths in _twins(folder).items()}
    if f"{TRAIN}-images-idx3" not in found:
        others = sorted(file.name for file in folder.iterdir() if "idx" in file.name)[:4]
        instead = f", but {', '.join(others)}: rename them so, or" if others else ":"
        raise Unfit(
            f"{folder}: no train-images-idx3-ubyte[.gz] here{instead} set data.path to the folder that holds it"
        )
    return found
