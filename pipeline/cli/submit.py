"""`nfm submit`: prints the jobs that make data, latents or pairs, or train, on a cluster; submits them with --go."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nfm.pipeline.artifacts.artifact import artifacts_root
from nfm.pipeline.cli.options import Whole, config_option, set_option
from nfm.pipeline.submit.send import array_limit, print_or_submit, ray_job
from nfm.pipeline.submit.slurm import SUBMISSIONS, Submission, array_jobs, user_options
from nfm.storage.files import atomic
from nfm.storage.files.paths import is_remote, names_in

if TYPE_CHECKING:
    from nfm.pipeline.config import RunConfig


_after = click.option(
    "--after",
    multiple=True,
    type=Whole(1, 2**32),
    metavar="JOB",
    help="Begin when this Slurm job has succeeded: --after 4711. Repeatable.",
)


@click.group()
def submit() -> None:
    """Send work to a cluster."""


def _array_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of what an array of tasks does."""
    for option in reversed((
        click.option("--go", is_flag=True, help="Submit; without it everything is printed and nothing is written."),
        click.option(
            "--tasks", default=8, type=Whole(1, 1_000_000), show_default=True, help="Tasks that share the shards."
        ),
        click.option(
            "--max-array", type=Whole(1, 1_000_000), help="Tasks an array may have. Default: what Slurm says."
        ),
        click.option(
            "--at-once", default=0, type=Whole(0, 1_000_000), help="Tasks that run at a time. [default: 0, all]"
        ),
        click.option(
            "--sbatch", multiple=True, metavar="OPTION",
            help="Of jobs that compute: --sbatch=--gres=gpu:1. Repeatable.",
        ),
        click.option(
            "--sbatch-seal", multiple=True, metavar="OPTION",
            help="Of the job that ends: --sbatch-seal=--mem=8G. Repeatable.",
        ),
        _after,
        click.option(
            "--before", multiple=True, metavar="LINE", help="First in a script: 'module load cuda'. Repeatable."
        ),
    )):  # fmt: skip
        command = option(command)
    return command


@submit.command()
@config_option
@set_option
@click.option("--slurm", is_flag=True, help="As an array of Slurm tasks; with --ray as a Ray cluster in one job.")
@click.option("--ray", is_flag=True, help="As a job of a Ray cluster that is running.")
@click.option("--nodes", default=1, type=Whole(1, 1_000_000), show_default=True, help="Of --slurm --ray.")
@click.option("--address", metavar="URL", help="Of --ray: http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS.")
@_array_options
def pairs(
    config_path: Path, overrides: tuple[str, ...], slurm: bool, ray: bool, nodes: int, address: str | None, go: bool,
    tasks: int, max_array: int | None, at_once: int, sbatch: tuple[str, ...], sbatch_seal: tuple[str, ...],
    after: tuple[int, ...], before: tuple[str, ...],
) -> None:  # fmt: skip
    """Make pairs on a cluster: --slurm, --ray, or both for a Ray cluster inside one Slurm job.

    All nodes must see the same files under the same paths, including this environment. Committed shards are kept:
    submit again to make only what is missing.
    """
    from nfm.pipeline.config import load
    from nfm.pipeline.submit.ray import allocation

    if not (slurm or ray):
        raise click.UsageError("say where: --slurm, --ray, or both for a Ray cluster inside one Slurm job")
    if after and not slurm:
        raise click.UsageError("--after: jobs of a Ray cluster do not wait for Slurm's; give --slurm too")
    config = load(config_path, overrides)
    _check(config, "pairs")
    submission = _submission(
        config, overrides, config.pairs.threads, before, after, user_options(sbatch), user_options(sbatch_seal)
    )
    if not slurm:
        ray_job(submission, config_path, address, go)
        return
    scripts = (
        [allocation(submission, nodes)] if ray else array_jobs(submission, tasks, max_array or array_limit(), at_once)
    )
    print_or_submit(submission, config_path, scripts, go)


def _in_pieces(stage: str, what: str) -> click.Command:
    """`nfm submit STAGE` of a stage whose pieces the tasks of an array make."""

    @click.command(stage, help=f"{what} in an array of Slurm tasks. Submit again to make only what is missing.")
    @config_option
    @set_option
    @click.option("--slurm", is_flag=True, help="As an array of Slurm tasks. On Ray: nfm run, with --ray-address.")
    @_array_options
    def submit_pieces(
        config_path: Path, overrides: tuple[str, ...], slurm: bool, go: bool, tasks: int, max_array: int | None,
        at_once: int, sbatch: tuple[str, ...], sbatch_seal: tuple[str, ...],
        after: tuple[int, ...], before: tuple[str, ...],
    ) -> None:  # fmt: skip
        from nfm.pipeline.config import load
        from nfm.stages.data.stage import check_parts

        if not slurm:
            raise click.UsageError(f"say where: --slurm; on Ray, nfm run {stage} --set {stage}.executor=ray does it")
        config = load(config_path, overrides)
        _check(config, stage)
        if stage == "data":
            check_parts(config.data)
        threads = max(1, getattr(config, stage).threads)
        submission = _submission(
            config, overrides, threads, before, after, user_options(sbatch), user_options(sbatch_seal)
        )
        scripts = array_jobs(submission, tasks, max_array or array_limit(), at_once, stage)
        print_or_submit(submission, config_path, scripts, go)

    return submit_pieces


submit.add_command(_in_pieces("data", "Decode the images"))
submit.add_command(_in_pieces("latents", "Encode the images to latents"))


def _check(config: RunConfig, stage: str, processes: int | None = None) -> None:
    """Raises Unfit for what a job would refuse at once, as far as the config alone tells. Writes nothing.

    All `processes` of a job train together, whatever `workers` says of Ray.
    """
    from nfm.pipeline import builder, prechecks
    from nfm.pipeline.config import image_shape
    from nfm.pipeline.graph import upstream
    from nfm.stages.trained.training.section import TrainingSection

    if processes is not None:
        trained = {name: section for name, section in config if isinstance(section, TrainingSection)}
        alone = {name: section.model_copy(update={"workers": processes}) for name, section in trained.items()}
        config = config.model_copy(update=alone)
    shape = image_shape(config.data)
    known = {} if shape is None else {"image_shape": list(shape)}
    nodes = builder.build(config, target=stage)
    prechecks.check_fits(upstream(nodes, stage), prechecks.Facts(nodes, known))


def _training(stage: str) -> click.Command:
    """`nfm submit STAGE` of a stage that trains."""

    @click.command(stage, help=f"Train the {stage} in one Slurm job of many processes, and make what it needs first.")
    @config_option
    @set_option
    @click.option("--slurm", is_flag=True, help="As one Slurm job. On Ray: nfm run, with workers and --ray-address.")
    @click.option("--nodes", default=1, type=Whole(1, 1_000_000), show_default=True, help="Nodes of the job.")
    @click.option("--per-node", default=1, type=Whole(1, 1024), show_default=True, help="Processes a node: its GPUs.")
    @click.option("--threads", default=1, type=Whole(1, 1024), show_default=True, help="CPU cores of each process.")
    @click.option(
        "--sbatch", multiple=True, metavar="OPTION", help="Of the job: --sbatch=--gpus-per-node=8. Repeatable."
    )
    @_after
    @click.option(
        "--before", multiple=True, metavar="LINE", help="First in the script: 'module load cuda'. Repeatable."
    )
    @click.option("--go", is_flag=True, help="Submit; without it everything is printed and nothing is written.")
    def submit_training(
        config_path: Path, overrides: tuple[str, ...], slurm: bool, nodes: int, per_node: int, threads: int,
        sbatch: tuple[str, ...], after: tuple[int, ...], before: tuple[str, ...], go: bool,
    ) -> None:  # fmt: skip
        from nfm.pipeline.config import load
        from nfm.pipeline.submit.training import training_job

        if not slurm:
            raise click.UsageError(f"say where: --slurm; on Ray, nfm run {stage} --set {stage}.workers=8 does it")
        config = load(config_path, overrides)
        _check(config, stage, nodes * per_node)
        submission = _submission(config, overrides, threads, before, after, user_options(sbatch))
        print_or_submit(submission, config_path, [training_job(submission, stage, nodes, per_node)], go)

    return submit_training


for _stage in ("teacher", "student", "features"):
    submit.add_command(_training(_stage))


def _submission(
    config: RunConfig, overrides: tuple[str, ...], threads: int, before: tuple[str, ...], after: tuple[int, ...],
    compute: tuple[str, ...], sealing: tuple[str, ...] = (),
) -> Submission:  # fmt: skip
    root = artifacts_root()
    folder = _next_folder(root, atomic.digest(atomic.canonical_json(config.model_dump(mode="json")))[:8])
    return Submission(
        folder=folder,
        work=Path.cwd(),
        artifacts=str(root if is_remote(root) else root.absolute()),
        nfm=(sys.executable, "-m", "nfm.pipeline.cli"),
        config=folder / "config.toml",
        sets=overrides,
        threads=threads,
        before=before,
        compute=compute,
        sealing=sealing,
        after=tuple(map(str, after)),
    )


def _next_folder(root: Path, digest: str) -> Path:
    """`submissions/DIGEST-NUMBER` with the digest of the config and a number above all existing ones.

    It lies among the artifacts; if these are in a bucket, in the working directory, which the jobs must see.
    """
    here = (Path.cwd() if is_remote(root) else root.absolute()) / SUBMISSIONS
    names = {*names_in(here), *(names_in(root / SUBMISSIONS) if is_remote(root) else ())}
    taken = [int(match[1]) for name in names if (match := re.fullmatch(rf"{digest}-(\d+)", name))]
    return here / f"{digest}-{max(taken, default=0) + 1:03d}"
