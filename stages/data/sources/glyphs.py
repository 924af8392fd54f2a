"""Letters of the fonts inside matplotlib, turned, scaled and shifted by a seed: as many images as wanted, no download.

Each letter is drawn once in each font and brought to one size. An image is such a drawing behind a random affine map,
sampled at several points a pixel, whose mean is the pixel's grey. The map is made of sums, products and quotients of
float64, which are the same on every machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Reporter, StageError, Stopped, Unfit
from nfm.stages.data.source import Loaded, box_average, scratch_array
from nfm.storage.files.atomic import canonical_json
from nfm.storage.format import philox

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

GENERATOR = 1  # increased when the same settings give other images

FONTS = tuple(
    f"{name}.ttf"
    for name in (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
        *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
        *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    )
)
ABSENT = "\uffff"  # Unicode's noncharacter, which fonts draw as their sign for what they do not have

TURN = 0.13  # tangent of half the largest angle, 15 degrees to either side
SCALES = (0.65, 0.95)  # the longer side of the letter as a share of the image
SHIFT = 0.06  # of the image's side, either way
POINTS = 64  # sampled along a side of the image, or somewhat more
FEWEST = 3  # along a side of a pixel
CHUNK_POINTS = 1 << 20  # drawn at a time


class Glyphs:
    """Grey letters as uint8 [count, 1, size, size]. Row i depends only on (letters, size, seed, i)."""

    name = "glyphs"
    licence = "made by this program"
    origin = "letters of the fonts DejaVu and STIX, made from data.seed by nfm.stages.data.sources.glyphs"

    def __init__(self, letters: str, size: int, count: int, seed: int):
        _check_letters(letters)
        self.letters, self.size, self.count, self.seed = letters, size, count, seed
        self.finer = max(FEWEST, -(-POINTS // size))  # points along a side of a pixel
        self.drawings = _drawings(letters, size * self.finer)
        self.classes = list(letters)
        self.labels = np.arange(count) % len(letters)
        self.keys = [f"glyphs/{row:07d}" for row in range(count)]
        self.test = np.zeros(count, bool)

    @staticmethod
    def shape_of(config: Any) -> tuple[int, int, int]:
        return 1, config.size, config.size

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        images = scratch_array(scratch, (len(rows), 1, self.size, self.size))
        chunk = max(1, CHUNK_POINTS // (self.size * self.finer) ** 2)
        report.progress(0, len(rows), "images drawn")
        for start in range(0, len(rows), chunk):
            if report.stopping:
                raise Stopped
            images[start : start + chunk] = self._drawn(rows[start : start + chunk])
            report.progress(min(start + chunk, len(rows)), len(rows), "images drawn")
        return Loaded(images)

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        # Of the drawings in place of the font files: another version of FreeType may draw the same file differently.
        recipe = {
            "name": self.name, "generator": GENERATOR, "letters": self.letters, "size": self.size,
            "count": self.count, "seed": self.seed, "drawings": hashlib.sha256(self.drawings.tobytes()).hexdigest(),
        }  # fmt: skip
        return {"digest": hashlib.sha256(canonical_json(recipe)).hexdigest(), "files": 0, "bytes": 0}

    def _drawn(self, rows: np.ndarray) -> np.ndarray:
        """The images of these rows, uint8 [n, 1, size, size]."""
        uniform = (philox.words(self.seed, 0, rows, 5, self.name) >> np.uint64(11)) * 2.0**-53  # [n, 5] in [0, 1)
        font = np.floor(uniform[:, 0] * len(FONTS)).astype(np.int64)
        half = TURN * (2 * uniform[:, 1] - 1)  # tan(angle / 2): sine and cosine without a library function
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * uniform[:, 2]
        shift = SHIFT * (2 * uniform[:, 3:] - 1)
        cosine, sine = (1 - half * half) / (1 + half * half) / scale, 2 * half / (1 + half * half) / scale
        side = self.size * self.finer
        points = (np.arange(side) + 0.5) / side - 0.5  # the image is the square from -1/2 to 1/2, and so is the drawing
        x, y = points - shift[:, :1], points - shift[:, 1:]  # [n, side]
        across = self._pixel((cosine[:, None] * x)[:, None, :] + (sine[:, None] * y)[:, :, None])
        down = self._pixel((cosine[:, None] * y)[:, :, None] - (sine[:, None] * x)[:, None, :])
        which = self.labels[rows] * len(FONTS) + font
        return box_average(self.drawings[which[:, None, None], down, across][:, None], self.finer)

    def _pixel(self, place: np.ndarray) -> np.ndarray:
        """The pixel of a drawing at a coordinate; the empty pixels around the drawing are whatever lies beyond."""
        inside = self.drawings.shape[-1] - 2
        return np.clip(np.floor((place + 0.5) * inside).astype(np.int64) + 1, 0, inside + 1)


def _check_letters(letters: str) -> None:
    if not letters:
        raise Unfit('data.letters = "" names no letter: write the letters to draw, as in "ABCDEF"')
    for place, letter in enumerate(letters):
        if letters.index(letter) < place:
            raise Unfit(f"data.letters = {letters!r} names {letter!r} twice: each letter is a class, write it once")
        if unicodedata.category(letter)[0] not in "LNPS":
            raise Unfit(f"data.letters = {letters!r}: {letter!r} draws nothing by itself: write letters, digits, signs")


def _drawings(letters: str, side: int) -> np.ndarray:
    """Each letter in each font, its longer side `side` pixels: uint8 [letters * fonts, side + 2, side + 2].

    Around it is one empty pixel.
    """
    from PIL import Image, ImageDraw, ImageFont

    def drawn(letter: str, font: FreeTypeFont) -> Image.Image:
        left, top, right, bottom = (int(edge) for edge in font.getbbox(letter))
        longer = max(right - left, bottom - top, 1)
        canvas = Image.new("L", (longer, longer))
        where = ((longer - (right - left)) // 2 - left, (longer - (bottom - top)) // 2 - top)
        ImageDraw.Draw(canvas).text(where, letter, 255, font)
        return canvas

    folder, out = _folder(), np.zeros((len(letters), len(FONTS), side + 2, side + 2), np.uint8)
    for column, name in enumerate(FONTS):
        try:
            # Larger than needed, so that hinting to whole pixels changes little; without Raqm, which few builds have.
            # From bytes: in place of a file that is missing, Pillow takes one of that name from the system's folders.
            file = io.BytesIO((folder / name).read_bytes())
            font = ImageFont.truetype(file, 2 * side, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            raise StageError(
                f"{folder / name}: a font of matplotlib that cannot be read ({error}): "
                "pip install --force-reinstall matplotlib"
            ) from error
        absent = drawn(ABSENT, font).tobytes()
        for row, letter in enumerate(letters):
            image = drawn(letter, font)
            if image.tobytes() == absent:
                raise Unfit(f"data.letters = {letters!r}: {letter!r} is not in the font {name}: leave it out")
            out[row, column, 1:-1, 1:-1] = np.asarray(image.resize((side, side), Image.Resampling.BOX))
    return out.reshape(-1, side + 2, side + 2)


def _folder() -> Path:
    # Found without importing matplotlib, which would take longer than everything else here.
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise Unfit(
            "data.source = \"glyphs\" draws with the fonts inside matplotlib: pip install 'nfm-pairs[train,report]'"
        )
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
