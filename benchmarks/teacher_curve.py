"""Is the teacher good enough? Distance of the student against the two-sample AUC of its store, teacher by teacher.

`python -m benchmarks.teacher_curve -c configs/fashion14.toml --images 12000,24000,48000,120000,360000 -o FOLDER` trains
a teacher on each number of images, and compares a student on its noise with one on independent noise. The AUC is in the
coupling report of each store, so it is known before any student is trained. Everything is an artifact: stopped or
killed, the same command goes on, and runs of `nfm compare` with the same config share what they have in common.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from benchmarks.told import command, machine, versions
from nfm.pipeline import builder, runner
from nfm.pipeline.cli import exits
from nfm.pipeline.cli.options import LOCAL_PATH, OutputFolder
from nfm.pipeline.config import load
from nfm.stages.display.axes import compact
from nfm.stages.display.tables import aligned
from nfm.stages.evaluation import compare
from nfm.stages.evaluation.table import DISTANCE
from nfm.storage.files import atomic

BASELINE = "independent"
PACKAGES = ("nfm-pairs", "numpy", "torch")


def point(config_path: Path, overrides: tuple[str, ...], images: int, variant: str) -> dict[str, Any]:
    """One teacher: its likelihood, its store's AUC, the distances of itself, of its student and of the baseline's."""
    couplings = f'compare.couplings=["{BASELINE}", "{variant}"]'
    config = load(config_path, (*overrides, f"teacher.images={images}", couplings))
    nodes = builder.build(config, target=compare.NAME)
    body = atomic.read_json(runner.run(nodes, compare.NAME).path / compare.TABLE)
    teacher = nodes["teacher"].artifact()
    assert teacher is not None
    distance, store = body["distance"], body["stores"]["nfm"]
    return {
        "images": images,
        "heldout_bpd": teacher.manifest()["metrics"]["heldout_bpd"],
        "auc": store["auc"],
        "auc_error": store["auc_error"],
        "transport_cost": store["transport_cost"],
        "teacher": {row["sampler"]: row["metrics"][distance]["mean"] for row in body["teacher"] if not row["guidance"]},
        "student": _by_nfe(body, variant),
        BASELINE: _by_nfe(body, BASELINE),
        "floor": body["floor"]["metrics"][distance]["mean"],
        "distance": distance,
    }


def _by_nfe(body: Mapping[str, Any], variant: str) -> dict[str, float]:
    rows = [row for row in body["rows"] if row["variant"] == variant]
    return {str(row["nfe"]): row["metrics"][body["distance"]]["mean"] for row in rows}


def as_text(points: list[dict[str, Any]]) -> str:
    """A row a teacher, the distances at every NFE."""
    nfes = list(points[0]["student"])
    header = ["teacher images", "bits/dim", "AUC", "teacher", "+ score", *(f"NFE {nfe}" for nfe in nfes)]
    rows = [
        [f"{p['images']:,}", f"{p['heldout_bpd']:.3f}", f"{p['auc']:.3f} ± {p['auc_error']:.3f}"]
        + [f"{p['teacher'][sampler]:.2f}" for sampler in ("inverse", "inverse+score")]
        + [f"{p['student'][nfe]:.2f}" for nfe in nfes]
        for p in points
    ]
    rows.append([BASELINE, "", "", "", "", *(f"{points[0][BASELINE][nfe]:.2f}" for nfe in nfes)])
    even = [f"NFE {nfe} at AUC {auc:.2f}" for nfe in nfes if (auc := break_even(points, nfe)) is not None]
    lesson = f"\nBreak-even with {BASELINE}, interpolated between two teachers: {', '.join(even)}." if even else ""
    return f"{aligned(header, rows)}{lesson}\n"


def break_even(points: list[dict[str, Any]], nfe: str) -> float | None:
    """The AUC at which the student is as far as the baseline's, on the line between two teachers.

    None where no two teachers have it between them.
    """
    ordered = sorted(points, key=lambda p: p["auc"])
    for better, worse in pairwise(ordered):
        low, high = (p["student"][nfe] - p[BASELINE][nfe] for p in (better, worse))
        if low < 0 <= high:
            return float(better["auc"] + (worse["auc"] - better["auc"]) * -low / (high - low))
    return None


def draw(points: list[dict[str, Any]], title: str) -> bytes:
    """Distance against AUC: a line an NFE, the baseline dashed in its colour."""
    figure = Figure(figsize=(8.8, 4.4), layout="constrained")
    axes = figure.subplots()
    aucs = [p["auc"] for p in points]
    for nfe in points[0]["student"]:
        (line,) = axes.plot(aucs, [p["student"][nfe] for p in points], "o-", label=f"student, NFE {nfe}")
        axes.axhline(points[0][BASELINE][nfe], ls="--", lw=1, color=line.get_color(), label=f"{BASELINE}, NFE {nfe}")
    axes.plot(
        aucs,
        [p["teacher"]["inverse"] for p in points],
        "s:",
        color="0.5",
        label="teacher, and the images of its training",
    )
    for p in points:
        axes.annotate(compact(p["images"]), (p["auc"], p["teacher"]["inverse"]), xytext=(-6, 6), ha="right",
                      textcoords="offset points", fontsize=8, color="0.4")  # fmt: skip
    axes.set_xlabel("two-sample AUC of the store's noise (0.5 is perfect)")
    axes.set(ylabel=f"{DISTANCE[points[0]['distance']]} (lower is better)", title=title)
    # 0.5 and a perfect distance are what the points are held against; the numbers of images stand left of and above.
    axes.set_xlim(min(0.5, *aucs) - 0.06, max(1.0, *aucs) + 0.02)
    drawn = [value for p in points for value in (*p["student"].values(), p["teacher"]["inverse"])]
    axes.set_ylim(0, 1.12 * max(*drawn, *points[0][BASELINE].values()))
    axes.axvline(0.5, color="0.75", lw=0.8)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    png = io.BytesIO()
    figure.savefig(png, dpi=130)
    return png.getvalue()


@click.command()
@click.option("-c", "--config", "config_path", required=True, type=LOCAL_PATH, metavar="F")
@click.option("--images", required=True, metavar="N,N,...", help="Training images of each teacher.")
@click.option("--variant", default="nfm", show_default=True, help="Of coupling nfm, for instance nfm:soften=0.5.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option("-o", "--output", required=True, type=OutputFolder())
def main(config_path: Path, images: str, variant: str, overrides: tuple[str, ...], output: Path) -> None:
    """Distance against AUC over teachers of growing training."""
    points = [point(config_path, overrides, int(number), variant) for number in images.split(",")]
    text = as_text(points)
    output.mkdir(parents=True, exist_ok=True)
    even = {nfe: break_even(points, nfe) for nfe in points[0]["student"]}
    told = {"machine": machine(), "versions": versions(*PACKAGES)}
    body = {"points": points, "break_even_auc": even, "variant": variant, **told}
    atomic.write_json(output / "teacher_curve.json", body)
    atomic.write_bytes(output / "teacher_curve.txt", text.encode())
    atomic.write_bytes(output / "teacher_curve.png", draw(points, f"{config_path.stem}: is the teacher enough?"))
    atomic.write_bytes(output / "command.txt", f"{command('benchmarks.teacher_curve')}\n".encode())
    click.echo(text.rstrip())


if __name__ == "__main__":
    exits.run(main)
