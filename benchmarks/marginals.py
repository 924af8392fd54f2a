"""Is it the marginals of a teacher's noise that cost its student distance? A student on noise made normal, dimension by
dimension.

`python -m benchmarks.marginals -c configs/fashion14.toml --work SCRATCH -o FOLDER` maps each dimension of the nfm
store's noise by its own quantiles to N(0, 1) (one layer of Gaussianization, Chen and Gopinath 2000), measures the
two-sample AUC before and after, trains the config's student on the mapped noise and evaluates it beside the plain one.
The map is fitted on other records than those that the AUC is measured on, but for those that two samples share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.told import command, machine, versions
from nfm.pipeline import builder, runner
from nfm.pipeline.cli import exits
from nfm.pipeline.cli.options import LOCAL_PATH, LocalPath, OutputFolder
from nfm.pipeline.config import load
from nfm.pipeline.graph import Node
from nfm.stages.display.tables import aligned
from nfm.stages.evaluation import compare, stage
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.evaluation.table import distance_key
from nfm.stages.pairs.coupling_sample import Sample, draw_sample
from nfm.stages.trained import student
from nfm.stages.trained.student import StudentConfig
from nfm.storage import PairStore
from nfm.storage.files import atomic
from nfm.trainers import flow_matching
from nfm.trainers.metrics.gaussianity import deviation
from nfm.trainers.metrics.two_sample import two_sample

QUANTILES, CELLS, FARTHEST = 1024, 1536, 6.0
PACKAGES = ("nfm-pairs", "numpy", "torch")
MOMENTS = ("kurtosis_rms", "transport_cost")


class Marginals:
    """z -> ndtri(F_d(z_d)) for each dimension d: linear between quantiles, of slope 1 beyond them, ending at +-6."""

    def __init__(self, noise: np.ndarray) -> None:
        """`noise` float32 [n, D] gives the quantiles."""
        levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
        normal = torch.special.ndtri(torch.from_numpy(levels)).numpy()
        at = np.linspace(-FARTHEST, FARTHEST, CELLS + 1)
        columns = [self._column(at, own, normal) for own in np.quantile(noise, levels, axis=0).T]
        self._table = torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))

    @staticmethod
    def _column(at: np.ndarray, own: np.ndarray, normal: np.ndarray) -> np.ndarray:
        beyond = np.minimum(at - own[0], 0) + np.maximum(at - own[-1], 0)
        return np.interp(at, own, normal) + beyond

    def __call__(self, noise: Tensor) -> Tensor:
        """float32 [B, ...] -> the same shape."""
        flat = noise.reshape(len(noise), -1)
        place = (flat.clamp(-FARTHEST, FARTHEST) + FARTHEST) * (CELLS / (2 * FARTHEST))
        cell = place.long().clamp_max(CELLS - 1)
        table = self._table.to(noise.device)
        low, high = (table.gather(0, cell + step) for step in (0, 1))
        return torch.lerp(low, high, place - cell).reshape(noise.shape)


class Said:
    """A stage's reporter that prints what it is told; nothing stops it."""

    stopping = ending = False

    def check_lock(self) -> None: ...
    def log(self, kind: str, **values: Any) -> None: ...

    def progress(self, done: int, total: int, unit: str, workers: Any = (), **figures: Any) -> None:
        if done == total:
            self.say(f"{done:,} {unit}, {figures}")

    def say(self, text: str) -> None:
        click.echo(text, err=True)


def figures_of(sample: Sample, noise: Tensor, store: PairStore) -> dict[str, float]:
    """AUC, kurtosis and transport cost of noises [n, D] beside the sample's images."""
    labels, shape = torch.from_numpy(sample.label), store.spec.image_shape
    found = two_sample(noise.reshape(-1, *shape), labels, store.spec.classes or 0, 0, "cpu", lambda: False)
    assert found is not None
    cost = float((noise - torch.from_numpy(sample.image)).square().mean())
    kurtosis = deviation(noise).kurtosis
    return {"auc": found.auc, "auc_error": found.error, "kurtosis_rms": kurtosis, "transport_cost": cost}


def trained(plain: Node, measure: Node, key: str, marginals: Marginals, work: Path) -> dict[str, float]:
    """Distances by NFE of the same student on mapped noise; made once, in `work`."""
    loss = flow_matching.loss

    def mapped(model: Any, image: Tensor, noise: Tensor, *rest: Any) -> Tensor:
        return loss(model, image, marginals(noise), *rest)

    with mock.patch.object(flow_matching, "loss", mapped):
        folder = student_of(plain, references(plain), work)
    return evaluated(measure, folder, key, work)


def student_of(plain: Node, inputs: Mapping[str, Path], work: Path) -> Path:
    """The node's student on these inputs; made once, in `work`."""
    assert isinstance(plain.config, StudentConfig)
    folder = work / "student"
    if not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        result = student.run(plain.config, inputs, folder, Said())
        atomic.write_json(folder / "manifest.json", {"metrics": result.metrics})
    return folder


def evaluated(measure: Node, folder: Path, key: str, work: Path) -> dict[str, float]:
    """Distances by NFE of the student in `folder`, measured as the node does it."""
    assert isinstance(measure.config, EvaluateConfig)
    measured = work / "evaluation"
    measured.mkdir(exist_ok=True)
    stage.run(measure.config, {**references(measure), "student": folder}, measured, Said())
    return by_nfe(measured, key)


def by_nfe(folder: Path, key: str) -> dict[str, float]:
    """The students' distances of an evaluation."""
    rows = atomic.read_json(folder / stage.TABLE)["rows"]
    return {str(row["nfe"]): row[key] for row in rows if row["model"] == "student"}


def references(node: Node) -> dict[str, Path]:
    """The finished inputs of a node, by role."""
    return {role: artifact.reference for role, artifact in (node.input_artifacts() or {}).items()}


@click.command()
@click.option("-c", "--config", "config_path", required=True, type=LOCAL_PATH, metavar="F")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option(
    "--work",
    required=True,
    type=LocalPath(file_okay=False),
    help="Scratch, kept for the next call: the student on mapped noise.",
)
@click.option("-o", "--output", required=True, type=OutputFolder())
def main(config_path: Path, overrides: tuple[str, ...], work: Path, output: Path) -> None:
    """A student on noise whose marginals were made normal, beside the plain one."""
    config = load(config_path, (*overrides, 'compare.couplings=["nfm"]', "compare.seeds=[0]"))
    nodes = builder.build(config, target=compare.NAME)
    runner.run(nodes, compare.NAME)
    key = distance_key(config.evaluate)
    plain, measure = nodes["student:nfm@0"], nodes["evaluate:nfm@0"]

    made = references(nodes[compare.NAME])

    store = PairStore.open(references(plain)["pairs"])
    sample = draw_sample(store, 0)
    marginals, noise = Marginals(draw_sample(store, 1).noise), torch.from_numpy(sample.noise)
    rows: dict[str, dict[str, Any]] = {
        "nfm": {**figures_of(sample, noise, store), "distance": by_nfe(made[measure.name], key)},
        "nfm, normal marginals": {
            **figures_of(sample, marginals(noise), store),
            "distance": trained(plain, measure, key, marginals, work / made[plain.name].name),
        },
    }
    header = ["", "AUC", "kurtosis - 3", "transport cost", *(f"NFE {nfe}" for nfe in rows["nfm"]["distance"])]
    shown = [
        [name, f"{row['auc']:.3f} ± {row['auc_error']:.3f}", *(f"{row[key]:.3f}" for key in MOMENTS)]
        + [f"{value:.3f}" for value in row["distance"].values()]
        for name, row in rows.items()
    ]
    text = aligned(header, shown)
    output.mkdir(parents=True, exist_ok=True)
    atomic.write_json(
        output / "marginals.json",
        {"rows": rows, "machine": machine(), "versions": versions(*PACKAGES)},
    )
    atomic.write_bytes(output / "marginals.txt", f"{text}\n".encode())
    atomic.write_bytes(output / "command.txt", f"{command('benchmarks.marginals')}\n".encode())
    click.echo(text)


if __name__ == "__main__":
    exits.run(main)
