"""`nfm pairs head`: a picture of the first pairs of a store, of the values of z, and of the records with
the worst nll.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Unfit
from nfm.stages.display.axes import density, density_span, make_log, noise_edges, normal
from nfm.stages.display.endings import write_picture
from nfm.stages.display.pictures import FALSE_COLOURS, as_pixels, in_false_colours
from nfm.stages.display.points import are_points, coordinates, panel
from nfm.stages.display.tables import aligned
from nfm.stages.pairs.recipe import content
from nfm.storage import PairStore
from nfm.storage.errors import by
from nfm.storage.format import codecs, convert

if TYPE_CHECKING:
    from PIL.Image import Image

HISTOGRAM_VALUES = 4_000_000
NOISE_SHOWN = 3.0  # noise from -3 to 3 becomes black to white
INK, SOFT, LINE = "#1c2430", "#5d6876", "#dde2e9"
BLUE, ORANGE, GREEN, RED = "#2566d8", "#d4711c", "#1d8f61", "#c0396b"
Array = np.ndarray


@dataclass(frozen=True)
class Head:
    """What is shown: arrays over n records, images in model space. `decoded` is None without a teacher."""

    image: Array  # float32 [n, C, H, W]
    noise: Array
    decoded: Array | None
    columns: dict[str, list[Any]]  # of the index: key, label, nll, flip


def teacher_of(where: str | Path) -> str | None:
    """The content digest of the teacher that made the store's noise; None for couplings without a teacher."""
    return PairStore.open(where).spec.teacher


def draw(where: str | Path, count: int, draw: int, teacher: Path | None, output: Path) -> str:
    """Writes the picture to `output` and returns a small table of the same records.

    The first slots of a draw are a sample, because slots are in a seeded random order. `teacher` is the folder of the
    store's own teacher, which decodes sigma_f z. Raises Unfit for another teacher.
    """
    store = PairStore.open(where)
    if draw >= store.draws:
        raise Unfit(f"--draw {draw}: generation {store.generation} of {where} has draws 0 to {store.draws - 1}")
    table = store.index(["key", "slot", "label", "nll", "flip"], draw=draw)
    columns = {name: table[name].to_pylist() for name in ("key", "label", "flip")}
    nll, slots = table["nll"].to_numpy(), table["slot"].to_numpy()
    decode = _decoder(store, teacher) if teacher is not None else None
    first = _records(store, draw, slots, np.arange(min(count, len(slots))), columns, nll, decode)
    order = np.argsort(np.where(np.isfinite(nll), -nll, np.inf), kind="stable")[:count]
    worst = _records(store, draw, slots, order[np.isfinite(nll[order])], columns, nll, decode)
    values = _noise(store, draw, slots[: max(1, HISTOGRAM_VALUES // first.noise[0].size)])
    points = are_points(store.spec.image_shape)
    picture = _plane(store, draw, first, worst, values) if points else _picture(store, draw, first, worst, values)
    write_picture(output, picture)
    return _table(store, draw, first, worst)


def _records(
    store: PairStore, draw: int, slots: Array, rows: Array, columns: dict[str, list[Any]], nll: Array, decode: Any
) -> Head:
    """The records at some rows of a draw's index; `slots` are their slots."""
    stored = store.gather(draw, slots[rows])
    image = convert.to_float32(stored["image"], store.value_range)
    noise = codecs.unpack(stored["noise"], store.spec.noise_step)
    own = {name: [values[row] for row in rows.tolist()] for name, values in columns.items()}
    decoded = decode(noise, np.array(own["label"], np.int64)) if decode is not None and len(rows) else None
    return Head(image, noise, decoded, own | {"nll": nll[rows].tolist()})


def _noise(store: PairStore, draw: int, slots: Array) -> Array:
    out = {"noise": np.empty((len(slots), *store.spec.image_shape), store.spec.field("noise").dtype)}
    return codecs.unpack(store.gather(draw, slots, out)["noise"], store.spec.noise_step)


def _decoder(store: PairStore, folder: Path) -> Any:
    import torch

    from nfm.stages.trained import teacher
    from nfm.stages.trained.foreign import own

    given = content(folder)
    if given != store.spec.teacher:
        made_by = f"was made by {store.spec.teacher[:12]}" if store.spec.teacher else "has no teacher"
        raise Unfit(f"{folder}: teacher {given[:12]}, but the store {made_by}; name its own, or --teacher none")
    if own.recorded(folder, "teacher"):
        raise Unfit(f"{folder}: this teacher is code of its user's own, which is not run to look; give --teacher none")
    model, _ = teacher.load(folder)
    sigma_f = store.spec.sigma_f or 1.0

    def decode(noise: Array, labels: Array) -> Array:
        return model.decode(torch.from_numpy(noise) * sigma_f, torch.from_numpy(labels)).numpy()

    return decode


def _table(store: PairStore, draw: int, first: Head, worst: Head) -> str:
    def rows(head: Head) -> list[list[Any]]:
        flat = head.noise.reshape(len(head.noise), -1)
        errors = _decode_errors(head) if head.decoded is not None else [None] * len(flat)
        lines = zip(head.columns["key"], head.columns["label"], head.columns["flip"], head.columns["nll"], flat, errors)
        return [
            [key, label if label >= 0 else None, "flipped" if flip else None, _number(nll),
             f"{z.mean():+.3f}", f"{z.var():.3f}", error if error is None else f"{error:.3f}"]
            for key, label, flip, nll, z, error in lines
        ]  # fmt: skip

    header = ["key", "label", "flip", "nll", "mean z", "var z", "decoded - image"]
    text = f"the first {len(first.image)} pairs of draw {draw}\n{aligned(header, rows(first))}"
    if len(worst.image):
        text += f"\n\nthe {len(worst.image)} worst nll of draw {draw} (nats per dimension, without the constant)\n"
        text += aligned(header, rows(worst))
    if first.decoded is not None:
        text += f"\n\ndecoded - image is the RMS over a record; eta eps' alone gives {store.spec.eta:g}"
    return text


def _decode_errors(head: Head) -> Array:
    assert head.decoded is not None
    return np.sqrt(np.square(head.decoded - head.image).reshape(len(head.image), -1).mean(axis=1))


def _number(nll: float) -> str | None:
    return f"{nll:.4f}" if np.isfinite(nll) else None


def _picture(store: PairStore, draw: int, first: Head, worst: Head, values: Array) -> Image:
    """Pairs in columns, with the histogram and the worst records below."""
    from matplotlib.figure import Figure

    rows = 2 + (first.decoded is not None)
    columns = max(len(first.image), 6)
    width, strip = max(9.0, min(1.15 * columns + 1.4, 22.0)), 3.0
    cell = (width - 1.4) / columns
    worst_rows = -(-len(worst.image) // max(1, columns // 2)) if len(worst.image) else 0
    strip = max(strip, 1.25 * cell * worst_rows + 0.7)
    sheet = Figure(figsize=(width, 1.0 + rows * cell * 1.02 + strip), facecolor="white", layout="constrained")
    parts: Any = sheet.subfigures(2, 1, height_ratios=[0.55 + rows * cell * 1.02, strip])
    top, bottom = parts
    spec = store.spec
    title = _title(store, draw)
    image_dtype = spec.field("image").dtype
    if in_false_colours(image_dtype, spec.image_shape[0]):
        title += f"\n{FALSE_COLOURS}"
    top.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    _draw_pairs(top, first, columns, image_dtype, spec.eta)
    if len(worst.image):
        left, right = bottom.subfigures(1, 2, width_ratios=[1.1, 1.0])
        _draw_worst(right, worst, columns // 2, image_dtype)
    else:
        left = bottom
    _draw_histogram(left, values, draw, store.manifest["moments"])
    return _drawn(sheet)


def _plane(store: PairStore, draw: int, first: Head, worst: Head, values: Array) -> Image:
    """Pairs of points: images and noises in one plane, connected by lines, with the histogram beside it."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(13.0, 5.0), facecolor="white", layout="constrained")
    sheet.suptitle(_title(store, draw), fontsize=10, color=INK, x=0.01, ha="left")
    parts: Any = sheet.subfigures(1, 2, width_ratios=[1.0, 1.2])
    left, right = parts
    axes = left.subplots()
    image, noise = coordinates(first.image), coordinates(first.noise)
    sets = {"image": image, "noise z": noise}
    if first.decoded is not None:
        sets[f"z decoded = image + {store.spec.eta:g} eps'"] = coordinates(first.decoded)
    if len(worst.image):
        sets["image of worst nll"] = coordinates(worst.image)
    panel(axes, sets, (BLUE, ORANGE, GREEN, RED))
    if len(image) == len(noise):
        for (x, y), (to_x, to_y) in zip(image, noise):
            axes.plot([x, to_x], [y, to_y], color=SOFT, lw=0.6, alpha=0.7, zorder=0)
    axes.grid(color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    _draw_histogram(right, values, draw, store.manifest["moments"])
    return _drawn(sheet)


def _title(store: PairStore, draw: int) -> str:
    spec = store.spec
    size = by(spec.image_shape)
    what = "points of the plane" if are_points(spec.image_shape) else f"records of {size}"
    title = f"{spec.coupling} pairs, draw {draw} of {store.draws}, {len(store.slots(draw)):,} {what}"
    return f"{title}, noise in {spec.codec}, layout {spec.layout}"


def _drawn(sheet: Any) -> Image:
    from PIL import Image

    data = io.BytesIO()
    sheet.savefig(data, format="png", dpi=110)
    return Image.open(data)


def _draw_pairs(sheet: Any, head: Head, columns: int, image_dtype: str, eta: float | None) -> None:
    count = len(head.image)
    both = head.image if head.decoded is None else np.concatenate([head.image, head.decoded])
    shown = as_pixels(both, image_dtype)  # one scale for image and decoded noise
    lines = [("image", shown[:count]), ("noise z", _grey(head.noise))]
    if head.decoded is not None:
        lines.append((f"z decoded\n= image\n+ {eta:g} eps'", shown[count:]))
    grid = sheet.subplots(len(lines), columns, squeeze=False)
    for (name, pictures), line in zip(lines, grid):
        for number, axes in enumerate(line):
            _bare(axes)
            if number < count:
                _show(axes, pictures[number])
        line[0].set_ylabel(name, fontsize=9, color=INK, rotation=0, ha="right", va="center", labelpad=8)
    for number, axes in enumerate(grid[0][:count]):
        axes.set_title(_caption(head, number), fontsize=7.5, color=SOFT, pad=3)


def _draw_worst(sheet: Any, worst: Head, columns: int, image_dtype: str) -> None:
    sheet.suptitle("worst nll (nats per dimension)", fontsize=9, color=INK)
    rows = -(-len(worst.image) // max(columns, 1))
    grid = sheet.subplots(rows, max(columns, 1), squeeze=False).reshape(-1)
    for axes in grid:
        _bare(axes)
    for number, (axes, picture) in enumerate(zip(grid, as_pixels(worst.image, image_dtype))):
        _show(axes, picture)
        axes.set_title(f"{worst.columns['nll'][number]:.3f}", fontsize=8, color=INK, pad=2)
        axes.set_xlabel(_caption(worst, number, nll=False), fontsize=6.5, color=SOFT, labelpad=2)


def _draw_histogram(sheet: Any, values: Array, draw: int, moments: dict[str, Any]) -> None:
    linear, logarithmic = sheet.subplots(1, 2)
    extremes = [np.array([moments[key]]) for key in ("min", "max") if moments.get(key) is not None]
    edges = noise_edges(values, *extremes)
    at = (edges[1:] + edges[:-1]) / 2
    found = density(values, edges)
    for axes, scale in ((linear, "linear"), (logarithmic, "log")):
        shown = np.where(found > 0, found, np.nan) if scale == "log" else found
        axes.stairs(shown, edges, color=BLUE, lw=1.3, label="z", fill=scale == "linear", alpha=0.75)
        axes.plot(at, normal(at), color=ORANGE, lw=1.3, ls="--", label="N(0, 1)")
        axes.set_xlabel("value of z", fontsize=8, color=SOFT)
        axes.set_ylabel(f"density ({scale})", fontsize=8, color=SOFT)
        axes.tick_params(labelsize=7, colors=SOFT)
        axes.grid(color=LINE, lw=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    make_log(logarithmic.yaxis, density_span(values, edges))
    linear.legend(frameon=False, fontsize=8, labelcolor=INK)
    mean, var, kurtosis = (moments[key] for key in ("mean", "var", "kurtosis"))
    figures = f"mean {mean:+.4f}, variance {var:.4f}, kurtosis {kurtosis or 0:.3f}"
    said = f"bars: draw {draw}; all draws: {figures}\n(a Gaussian's: 0, 1, 3)"
    sheet.suptitle(said, fontsize=9, color=INK)


def _caption(head: Head, number: int, nll: bool = True) -> str:
    label, value = head.columns["label"][number], head.columns["nll"][number]
    words = [f"label {label}"] if label >= 0 else []
    words += ["flipped"] if head.columns["flip"][number] else []
    text = head.columns["key"][number] + (f"\n{', '.join(words)}" if words else "")
    return text + (f"\nnll {value:.3f}" if nll and np.isfinite(value) else "")


def _grey(noise: Array) -> Array:
    shown = noise[:, :3] if noise.shape[1] >= 3 else noise[:, :1]
    return np.clip((shown / NOISE_SHOWN + 1) * 127.5, 0, 255).astype(np.uint8)


def _show(axes: Any, picture: Array) -> None:
    if len(picture) == 1:
        axes.imshow(picture[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest")


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
