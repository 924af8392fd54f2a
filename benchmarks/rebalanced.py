"""Does it help students of semidiscrete transport to see every image exactly once a draw?

`python -m benchmarks.rebalanced -c configs/glyphs.toml --seeds 0,1,2 --work SCRATCH -o FOLDER` takes the config's
semidiscrete-ot store, in which argmax gives some images several noises of a draw and others none, and changes as few
pairs as that needs, as AlignFlow does (the idea alone; the assignment is ours): an image keeps the nearest of its
noises, and the noises that are left go to the images that are left, per class and draw, at the least sum of squared
distances. Students of both stores differ in nothing else but the order in which they see their pairs.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import click
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from benchmarks.marginals import PACKAGES, by_nfe, evaluated, references, student_of
from benchmarks.told import command, machine, versions
from nfm.pipeline import builder, runner
from nfm.pipeline.cli import exits
from nfm.pipeline.cli.options import LOCAL_PATH, LocalPath, OutputFolder
from nfm.pipeline.config import load
from nfm.stages.display.tables import aligned
from nfm.stages.evaluation import compare
from nfm.stages.evaluation.table import distance_key
from nfm.storage import ImageDataset, PairStore, PairWriter, StoreSpec
from nfm.storage.files import atomic

COUPLING = "semidiscrete-ot"


def rebalanced(rows: np.ndarray, noise: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The row of each noise, each row once: `rows` [n] with as few changes as that needs.

    noise [n, D] are the noises of one class in one draw, images [n, D] those of the class, which `rows` numbers.
    """
    distance = np.square(noise - images[rows]).sum(axis=1)
    nearest_first = np.lexsort((distance, rows))
    keeps = nearest_first[np.r_[True, np.diff(rows[nearest_first]) > 0]]
    free = np.setdiff1d(np.arange(len(rows)), keeps)
    left = np.setdiff1d(np.arange(len(images)), rows)
    chosen, places = linear_sum_assignment(cdist(noise[free], images[left], "sqeuclidean"))
    balanced = rows.copy()
    balanced[free[chosen]] = left[places]
    return balanced


def write(store: PairStore, data: np.ndarray, labels: np.ndarray, path: Path) -> dict[str, float]:
    """The rebalanced store at `path`; the share of pairs that changed, and the cost |z - y|^2 / D before and after.

    data uint8 [N, C, H, W] and labels int64 [N] are the training images in the order of rows.
    """
    spec = StoreSpec.external(
        rows=store.spec.rows, image_shape=store.spec.image_shape, classes=store.spec.classes,
        origin=f"{COUPLING}, each image once a draw", codec=store.spec.codec,
    )  # fmt: skip
    changed, before, after = 0, 0.0, 0.0
    flat = data.reshape(len(data), -1) / 127.5 - 1
    with PairWriter(path, spec, draws=store.draws) as writer:
        for draw in range(store.draws):
            pairs = store.gather(draw, np.arange(store.spec.rows))
            noise = pairs["noise"].reshape(len(flat), -1).astype(np.float64)
            told = store.index(["slot", "row"], draw=draw)
            rows = np.empty(len(flat), np.int64)
            rows[told["slot"].to_numpy()] = told["row"].to_numpy()
            new = rows.copy()
            for label in np.unique(labels):
                members, own = np.flatnonzero(labels == label), np.flatnonzero(pairs["label"] == label)
                place = rebalanced(np.searchsorted(members, rows[own]), noise[own], flat[members])
                new[own] = members[place]
            assert len(np.unique(new)) == len(new), "each image once"
            changed += int((new != rows).sum())
            before += float(np.square(noise - flat[rows]).mean())
            after += float(np.square(noise - flat[new]).mean())
            order = np.argsort(new)  # a slot an image, since an external store has the same images in every draw
            left = np.arange(writer.next_slot(draw), len(new))
            writer.write(draw=draw, image=data[left], noise=pairs["noise"][order[left]], label=labels[left])
    draws = store.draws
    return {"changed": changed / (draws * len(flat)), "cost": before / draws, "cost_rebalanced": after / draws}


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


@click.command()
@click.option("-c", "--config", "config_path", required=True, type=LOCAL_PATH, metavar="F")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Repeatable.")
@click.option("--seeds", default="0", show_default=True, metavar="0,1,...", help="Each a student.")
@click.option("--work", required=True, type=LocalPath(file_okay=False), help="Scratch, kept for the next call.")
@click.option("-o", "--output", required=True, type=OutputFolder())
def main(config_path: Path, overrides: tuple[str, ...], seeds: str, work: Path, output: Path) -> None:
    """Students of semidiscrete transport with each image exactly once a draw, beside the plain ones."""
    numbers = [int(seed) for seed in seeds.split(",")]
    lists = (f'compare.couplings=["{COUPLING}"]', f"compare.seeds={numbers}")
    config = load(config_path, (*overrides, *lists))
    nodes = builder.build(config, target=compare.NAME)
    runner.run(nodes, compare.NAME)
    key, made = distance_key(config.evaluate), references(nodes[compare.NAME])
    first = nodes[f"student:{COUPLING}@{numbers[0]}"]
    plain = references(first)["pairs"]
    store = PairStore.open(plain)
    told, folder = work / "rebalanced.json", work / "store"
    if not told.exists():
        data = ImageDataset.open(references(nodes[f"evaluate:{COUPLING}@{numbers[0]}"])["data"])
        rows_of_data = np.arange(len(data))
        atomic.write_json(told, write(store, data.images(rows_of_data), data.labels(rows_of_data), folder))
    rows: dict[str, list[dict[str, float]]] = {COUPLING: [], "rebalanced": []}
    for seed in numbers:
        one, measure = nodes[f"student:{COUPLING}@{seed}"], nodes[f"evaluate:{COUPLING}@{seed}"]
        rows[COUPLING].append(by_nfe(made[measure.name], key))
        place = work / made[one.name].name
        own = student_of(one, {**references(one), "pairs": folder}, place)
        rows["rebalanced"].append(evaluated(measure, own, key, place))
    columns = list(rows[COUPLING][0])
    table = [[name, *(spread([one[nfe] for one in found]) for nfe in columns)] for name, found in rows.items()]
    text = aligned(["", *(f"NFE {nfe}" for nfe in columns)], table)
    figures = atomic.read_json(told)
    text += f"\n{figures['changed']:.3f} of the pairs changed; |z - y|^2 / D {figures['cost']:.4f}, then "
    text += f"{figures['cost_rebalanced']:.4f}"
    output.mkdir(parents=True, exist_ok=True)
    body = {"rows": rows, **figures, "machine": machine(), "versions": versions(*PACKAGES)}
    atomic.write_json(output / "rebalanced.json", body)
    atomic.write_bytes(output / "rebalanced.txt", f"{text}\n".encode())
    atomic.write_bytes(output / "command.txt", f"{command('benchmarks.rebalanced')}\n".encode())
    click.echo(text)


if __name__ == "__main__":
    exits.run(main)
