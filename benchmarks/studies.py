"""One setting varied, everything else equal: what does it do to the students of some couplings?

`python -m benchmarks.studies -c configs/glyphs.toml --vary pairs.draws=1,2,4,8 --couplings nfm --seeds 0,1,2 -o FOLDER`
compares the couplings once for each value, and puts one table, one figure and the JSON of both into FOLDER. Everything
is an artifact: stopped or killed, the same command goes on, and runs of `nfm compare` with the same settings share what
they have in common. Distances are comparable between the values as long as the setting is none of [data] or [features].
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from benchmarks.told import command, machine, versions
from nfm.pipeline import builder, runner
from nfm.pipeline.cli import exits
from nfm.pipeline.cli.options import LOCAL_PATH, OutputFolder
from nfm.pipeline.config import RunConfig, load
from nfm.stages.display.axes import make_log
from nfm.stages.display.tables import aligned
from nfm.stages.evaluation import compare
from nfm.stages.evaluation.table import DISTANCE
from nfm.storage.files import atomic

PACKAGES = ("nfm-pairs", "numpy", "torch")
WIDTH = 4.4  # inches a panel


def varied(text: str) -> tuple[str, list[str]]:
    """The setting of `--vary` and its values; a comma in brackets is of a value, as in logit-normal(-0.2,1)."""
    setting, _, listed = text.partition("=")
    return setting, re.split(r",(?![^(]*\))", listed)


def point(config: RunConfig, couplings: list[str]) -> dict[str, Any]:
    """One value of the setting: the rows of `nfm compare`, by coupling, and what the stores' reports say."""
    nodes = builder.build(config, target=compare.NAME)
    body = atomic.read_json(runner.run(nodes, compare.NAME).path / compare.TABLE)
    distance = body["distance"]
    curvature = {row["variant"]: row["value"] for row in body["curvature"]}
    return {
        "distance": distance,
        "floor": body["floor"]["metrics"][distance],
        "couplings": {
            coupling: {
                "distances": {
                    f"{row['nfe']} {row['sampler']}": row["metrics"][distance]
                    for row in body["rows"]
                    if row["variant"] == coupling
                },
                "curvature": curvature[coupling],
                "store": body["stores"].get(coupling.split(":")[0], {}),
            }
            for coupling in couplings
        },
    }


def as_text(setting: str, points: dict[str, dict[str, Any]]) -> str:
    """A row a value and coupling: distances by NFE and sampler, the curvature, the AUC of the store."""
    first = next(iter(points.values()))
    columns = list(next(iter(first["couplings"].values()))["distances"])
    rows = []
    for value, made in points.items():
        for coupling, told in made["couplings"].items():
            auc = told["store"].get("auc")
            rows.append(
                [
                    *(value, coupling),
                    *(_spread(told["distances"][column]) for column in columns),
                    *(_spread(told["curvature"], 4), "" if auc is None else f"{auc:.3f}"),
                ]
            )
    floor = _spread(first["floor"])
    what = f"{DISTANCE[first['distance']]} by NFE and sampler, mean ± standard deviation over seeds"
    return f"{what}; the floor is {floor}\n{aligned([setting, 'coupling', *columns, 'curvature', 'AUC of z'], rows)}\n"


def _spread(told: dict[str, Any], digits: int = 3) -> str:
    spread = told["spread"]
    return f"{told['mean']:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def draw(setting: str, points: dict[str, dict[str, Any]], title: str) -> bytes:
    """A panel a coupling: distance against NFE, a line a value of the setting."""
    first = next(iter(points.values()))
    couplings = list(first["couplings"])
    figure = Figure(figsize=(WIDTH * len(couplings) + 1.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(couplings), sharey=True, squeeze=False)[0]
    for axes, coupling in zip(panels, couplings, strict=True):
        for shade, (value, made) in enumerate(points.items()):
            told = made["couplings"][coupling]["distances"]
            nfes = [int(column.split()[0]) for column in told]
            means = [metric["mean"] for metric in told.values()]
            errors = [metric["spread"] or 0.0 for metric in told.values()]
            colour = f"C{shade}"
            axes.errorbar(nfes, means, errors, marker="o", capsize=3, color=colour, label=f"{setting} = {value}")
        axes.axhline(first["floor"]["mean"], ls="--", lw=1, color="0.5", label="floor")
        axes.set(title=coupling, xlabel="NFE", xscale="log")
        axes.set_xticks(nfes, [str(nfe) for nfe in nfes])
        axes.minorticks_off()
        make_log(axes.yaxis, _ends(points))
    panels[0].set_ylabel(f"{DISTANCE[first['distance']]} (lower is better)")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, dpi=130)
    return png.getvalue()


def _ends(points: dict[str, dict[str, Any]]) -> list[float]:
    """The values that the axis of distances has to show, with their spread."""
    told = [
        metric for made in points.values() for one in made["couplings"].values() for metric in one["distances"].values()
    ]
    ends = [metric["mean"] + sign * (metric["spread"] or 0.0) for metric in told for sign in (-1, 1)]
    return [*ends, *(made["floor"]["mean"] for made in points.values())]


@click.command()
@click.option("-c", "--config", "config_path", required=True, type=LOCAL_PATH, metavar="F")
@click.option("--vary", required=True, metavar="SECTION.KEY=V,V,...", help="The setting and its values.")
@click.option("--couplings", required=True, metavar="A,B,...", help="As of `nfm compare`.")
@click.option("--seeds", default="0", show_default=True, metavar="0,1,...", help="Each a student.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Of every run. Repeatable.")
@click.option("-o", "--output", required=True, type=OutputFolder())
def main(
    config_path: Path, vary: str, couplings: str, seeds: str, overrides: tuple[str, ...], output: Path
) -> None:  # fmt: skip
    """The students of some couplings, once for each value of one setting."""
    setting, values = varied(vary)
    if not all(values) or len(set(values)) < len(values):
        raise click.UsageError(f"--vary {vary}: give a setting and its values, each once: pairs.draws=1,2,4")
    file = output / "study.json"
    if file.exists() and (other := atomic.read_json(file).get("setting")) != setting:
        raise click.UsageError(f"-o {output}: holds the study of {other}; give another folder")
    lists = (f"compare.couplings={json.dumps(couplings.split(','))}", f"compare.seeds=[{seeds}]")
    # All of them first: a wrong value is told before anything runs.
    configs = {value: load(config_path, (*overrides, f"{setting}={value}", *lists)) for value in values}
    points = {value: point(config, couplings.split(",")) for value, config in configs.items()}
    text = as_text(setting, points)
    output.mkdir(parents=True, exist_ok=True)
    body = {"setting": setting, "points": points, "machine": machine(), "versions": versions(*PACKAGES)}
    atomic.write_json(file, body)
    atomic.write_bytes(output / "study.txt", text.encode())
    atomic.write_bytes(output / "study.png", draw(setting, points, f"{config_path.stem}: {setting}"))
    atomic.write_bytes(output / "command.txt", f"{command('benchmarks.studies')}\n".encode())
    click.echo(text.rstrip())


if __name__ == "__main__":
    exits.run(main)
