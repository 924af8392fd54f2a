"""The HTML of the report: one self-contained page with pictures as data URIs, readable in light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from nfm.stages.display.classes import rows_of
from nfm.stages.display.pictures import data_uri

CELL_PIXELS = 56  # small images are enlarged by a whole factor to about this edge
GAP = 2
SIGNIFICANT, MOST_DECIMALS = 4, 6

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6876; --line: #dde2e9; --page: #fbfcfd;
  --card: #fff; --mark: #eaf1fd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #303846;
  --page: #12161c; --card: #191f28; --mark: #1d2b42; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; } h2 { font-size: 21px; margin: 52px 0 6px; }
h3 { font-size: 16px; margin: 26px 0 8px; }
p { max-width: 75ch; margin: 6px 0 12px; } .soft, figcaption { color: var(--soft); }
.lead { font-size: 18px; }
nav { margin: 16px 0 0; font-size: 14px; } nav a { color: inherit; margin-right: 16px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; } tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; } td.n, code { white-space: nowrap; } tr.best td { background: var(--mark); }
code, pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { overflow-x: auto; margin: 0; padding: 8px 0; }
details { margin: 8px 0; font-size: 14px; } summary { cursor: pointer; color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; margin: 12px 0; }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; max-width: 100%; }
figcaption { font-size: 14px; margin: 0 0 8px; } figcaption b { color: var(--ink); }
.classes { display: grid; grid-template-columns: max-content 1fr; gap: 2px 10px; align-items: center;
  font-size: 13px; color: var(--soft); }
img { display: block; max-width: 100%; height: auto; } img.pixels { image-rendering: pixelated; }
"""


def page(title: str, lead: Iterable[str], sections: Sequence[tuple[str, str]]) -> str:
    """The whole document. `sections` are (heading, html body) in order; the navigation lists them."""
    links = "".join(f'<a href="#{_anchor(heading)}">{escape(heading)}</a>' for heading, _ in sections)
    bodies = "\n".join(
        f'<section id="{_anchor(heading)}"><h2>{escape(heading)}</h2>\n{body}\n</section>' for heading, body in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n"
        + "".join(f'<p class="lead">{escape(text)}</p>\n' for text in lead)
        + f"<nav>{links}</nav>\n{bodies}\n</main></body></html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def row(figures: Iterable[str]) -> str:
    return f'<div class="row">{"".join(figures)}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], best: Iterable[int] = ()) -> str:
    """A table of cells. Numbers are aligned to the right, None is a dash, rows with numbers in `best` are tinted."""
    lines = [list(cells) for cells in rows]
    marked = set(best)
    numeric = [any(is_number(line[i]) for line in lines) for i in range(len(columns))]
    texts = [column_texts([line[i] for line in lines]) for i in range(len(columns))]

    def cell(tag: str, text: str, right: bool) -> str:
        return f"<{tag}{' class=n' if right else ''}>{text}</{tag}>"

    head = "".join(cell("th", escape(name), right) for name, right in zip(columns, numeric))
    body = "".join(
        f"<tr{' class=best' if i in marked else ''}>"
        + "".join(cell("td", text[i], right) for text, right in zip(texts, numeric))
        + "</tr>"
        for i in range(len(lines))
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def column_texts(cells: Sequence[Any]) -> list[str]:
    """The HTML of a column's cells. Fractions share the number of decimals that shows 4 digits of the largest."""
    floats = [abs(float(cell)) for cell in cells if is_number(cell) and np.isfinite(cell)]
    largest = max(floats, default=0.0)
    decimals = SIGNIFICANT - 1 - math.floor(math.log10(largest)) if largest else 0
    whole = all(isinstance(cell, int | np.integer) for cell in cells if is_number(cell))
    decimals = 0 if whole else min(max(decimals, 0), MOST_DECIMALS)
    if decimals:
        shown = [f"{cell:.{decimals}f}" for cell in cells if is_number(cell) and np.isfinite(cell)]
        spare = min(len(text) - len(text.rstrip("0")) for text in shown)
        decimals = max(decimals - spare, 0)

    def text(cell: Any) -> str:
        if cell is None:
            return "–"
        if is_number(cell):
            return f"{cell:,.{decimals}f}"
        return f"<code>{escape(cell)}</code>" if isinstance(cell, Code) else escape(str(cell))

    return [text(cell) for cell in cells]


def code(text: str) -> Code:
    return Code(text)


class Code(str):
    """A table cell in fixed width, such as a fingerprint."""


def folded(summary: str, text: str) -> str:
    """Text that opens on a click, such as a resolved config."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def figure(picture: str, bold: str, caption: str = "") -> str:
    rest = f" · {escape(caption)}" if caption else ""
    return f"<figure><figcaption><b>{escape(bold)}</b>{rest}</figcaption>{picture}</figure>"


def image_grid(
    images: np.ndarray, alt: str, columns: int = 8, labels: np.ndarray | None = None, names: Sequence[str] = ()
) -> str:
    """Images [n, C, H, W] uint8 as a sharp PNG in reading order; only the first channel unless C is 3.

    With labels there is a PNG for each row, after the class or classes that the row shows, by name if
    there are `names`.
    """
    rows = rows_of(labels, len(images), columns, names)
    if not any(title for title, _ in rows):
        return _raster(images, alt, columns)
    cells = (
        f"<span>{escape(title)}</span>{_raster(images[numbers], f'{alt}, {title}', len(numbers))}"
        for title, numbers in rows
    )
    return f'<div class="classes">{"".join(cells)}</div>'


def _raster(images: np.ndarray, alt: str, columns: int) -> str:
    from PIL import Image

    n, c, h, w = images.shape
    shown = np.broadcast_to(images if c == 3 else images[:, :1], (n, 3, h, w)).transpose(0, 2, 3, 1)
    factor = max(1, CELL_PIXELS // max(h, w))
    large = shown.repeat(factor, axis=1).repeat(factor, axis=2)
    h, w, rows = h * factor, w * factor, -(-n // columns)
    columns = min(columns, n)
    # The gaps are transparent, so that the colour of the page shows between the images.
    sheet = np.zeros((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 4), np.uint8)
    for i, image in enumerate(large):
        top, left = i // columns * (h + GAP), i % columns * (w + GAP)
        sheet[top : top + h, left : left + w, :3] = image
        sheet[top : top + h, left : left + w, 3] = 255
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    size = f'width="{sheet.shape[1]}" height="{sheet.shape[0]}"'
    return f'<img class="pixels" {size} src="{data_uri("image/png", file.getvalue())}" alt="{escape(alt)}">'


def number(value: float, digits: int = 4) -> str:
    """A readable number: whole ones with separators, others with `digits` significant figures."""
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _anchor(heading: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in heading.lower())
