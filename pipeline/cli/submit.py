"""`nfm submit`: prints the jobs that make data, latents or pairs, or train, on a cluster; submits them with --go."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nfm.pipeline.artifacts.artifact import artifacts_root
from nfm.pipeline.cli.options import Whole, config_option, set_option
from nfm.pipeline.submit.slurm import SUBMISSIONS
from nfm.stages.base import StageError
from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic
from nfm.storage.files.paths import is_remote, names_in

if TYPE_CHECKING:
    from nfm.pipeline.config import RunConfig
    from nfm.pipeline.submit.slurm import Script, Submission

ARRAY_LIMIT = 1000  # if Slurm does not say; its own default is 1001


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
    before: tuple[str, ...],
) -> None:  # fmt: skip
    """Make pairs on a cluster: --slurm, --ray, or both for a Ray cluster inside one Slurm job.

    All nodes must see the same files under the same paths, including this environment. Committed shards are kept:
    submit again to make only what is missing.
    """
    from nfm.pipeline.config import load
    from nfm.pipeline.submit import ray as submit_ray
    from nfm.pipeline.submit.slurm import array_jobs, user_options

    if not (slurm or ray):
        raise click.UsageError("say where: --slurm, --ray, or both for a Ray cluster inside one Slurm job")
    config = load(config_path, overrides)
    _check(config, "pairs")
    submission = _submission(
        config, overrides, config.pairs.threads, before, user_options(sbatch), user_options(sbatch_seal)
    )
    if not slurm:
        _ray_job(submission, config_path, address, go)
        return
    scripts = (
        [submit_ray.allocation(submission, nodes)]
        if ray
        else array_jobs(submission, tasks, max_array or _array_limit(), at_once)
    )
    _print_or_submit(submission, config_path, scripts, go)


def _in_pieces(stage: str, what: str) -> click.Command:
    """`nfm submit STAGE` of a stage whose pieces the tasks of an array make."""

    @click.command(stage, help=f"{what} in an array of Slurm tasks. Submit again to make only what is missing.")
    @config_option
    @set_option
    @click.option("--slurm", is_flag=True, help="As an array of Slurm tasks. On Ray: nfm run, with --ray-address.")
    @_array_options
    def submit_pieces(
        config_path: Path, overrides: tuple[str, ...], slurm: bool, go: bool, tasks: int, max_array: int | None,
        at_once: int, sbatch: tuple[str, ...], sbatch_seal: tuple[str, ...], before: tuple[str, ...],
    ) -> None:  # fmt: skip
        from nfm.pipeline.config import load
        from nfm.pipeline.submit.slurm import array_jobs, user_options
        from nfm.stages.data.stage import check_parts

        if not slurm:
            raise click.UsageError(f"say where: --slurm; on Ray, nfm run {stage} --set {stage}.executor=ray does it")
        config = load(config_path, overrides)
        _check(config, stage)
        if stage == "data":
            check_parts(config.data)
        threads = max(1, getattr(config, stage).threads)
        submission = _submission(config, overrides, threads, before, user_options(sbatch), user_options(sbatch_seal))
        scripts = array_jobs(submission, tasks, max_array or _array_limit(), at_once, stage)
        _print_or_submit(submission, config_path, scripts, go)

    return submit_pieces


submit.add_command(_in_pieces("data", "Decode the images"))
submit.add_command(_in_pieces("latents", "Encode the images to latents"))


def _print_or_submit(submission: Submission, config_path: Path, scripts: Sequence[Script], go: bool) -> None:
    if go:
        _create(submission, config_path, scripts)
        _submit(submission, scripts)
        return
    for script in scripts:
        click.echo(masked(f"# {submission.folder / script.name}.sbatch\n{script.text}"))
    ids = {script.name: script.name.upper() for script in scripts}
    them = "these scripts are written and submitted, each waiting for the ones that it names"
    click.echo(f"# with --go {them if len(scripts) > 1 else 'this script is written and submitted'}:")
    click.echo(masked("\n".join(shlex.join(script.sbatch(submission.folder, ids)) for script in scripts)))
    if not shutil.which("sbatch"):
        click.echo("sbatch is not on this machine: --go needs it", err=True)


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
    @click.option(
        "--before", multiple=True, metavar="LINE", help="First in the script: 'module load cuda'. Repeatable."
    )
    @click.option("--go", is_flag=True, help="Submit; without it everything is printed and nothing is written.")
    def submit_training(
        config_path: Path, overrides: tuple[str, ...], slurm: bool, nodes: int, per_node: int, threads: int,
        sbatch: tuple[str, ...], before: tuple[str, ...], go: bool,
    ) -> None:  # fmt: skip
        from nfm.pipeline.config import load
        from nfm.pipeline.submit.slurm import user_options
        from nfm.pipeline.submit.training import training_job

        if not slurm:
            raise click.UsageError(f"say where: --slurm; on Ray, nfm run {stage} --set {stage}.workers=8 does it")
        config = load(config_path, overrides)
        _check(config, stage, nodes * per_node)
        submission = _submission(config, overrides, threads, before, user_options(sbatch))
        _print_or_submit(submission, config_path, [training_job(submission, stage, nodes, per_node)], go)

    return submit_training


for _stage in ("teacher", "student", "features"):
    submit.add_command(_training(_stage))


def _submission(
    config: RunConfig, overrides: tuple[str, ...], threads: int, before: tuple[str, ...], compute: tuple[str, ...],
    sealing: tuple[str, ...] = (),
) -> Submission:  # fmt: skip
    from nfm.pipeline.submit.slurm import Submission

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
    )


def _next_folder(root: Path, digest: str) -> Path:
    """`submissions/DIGEST-NUMBER` with the digest of the config and a number above all existing ones.

    It lies among the artifacts; if these are in a bucket, in the working directory, which the jobs must see.
    """
    here = (Path.cwd() if is_remote(root) else root.absolute()) / SUBMISSIONS
    names = {*names_in(here), *(names_in(root / SUBMISSIONS) if is_remote(root) else ())}
    taken = [int(match[1]) for name in names if (match := re.fullmatch(rf"{digest}-(\d+)", name))]
    return here / f"{digest}-{max(taken, default=0) + 1:03d}"


def _array_limit() -> int:
    """How many tasks one array may have here: indices below MaxArraySize."""
    if not shutil.which("scontrol"):
        return ARRAY_LIMIT
    told = subprocess.run(
        ["scontrol", "show", "config"], capture_output=True, encoding="utf-8", errors="backslashreplace"
    )
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", told.stdout, re.MULTILINE)
    if match and int(match[1]) == 0:
        raise StageError(
            "MaxArraySize = 0: this Slurm takes no arrays; use --slurm --ray, or ask the site to allow them"
        )
    return int(match[1]) if match else ARRAY_LIMIT


def _create(submission: Submission, config_path: Path, scripts: Sequence[Script]) -> None:
    """Writes the folder of the submission with its scripts and a copy of the config, so that queued jobs do
    not change.
    """
    if scripts and not shutil.which("sbatch"):
        raise StageError("sbatch: not found; submit from a node of the cluster, or leave --go out to see the scripts")
    try:
        submission.logs.mkdir(parents=True)
    except FileExistsError:
        raise StageError(f"{submission.folder}: another submission was made meanwhile; run this again") from None
    atomic.write_bytes(submission.config, config_path.read_bytes())
    for script in scripts:
        atomic.write_bytes(submission.folder / f"{script.name}.sbatch", script.text.encode())


def _submit(submission: Submission, scripts: Sequence[Script]) -> None:
    """Runs one `sbatch` for each script. If one is refused, the earlier jobs are cancelled."""
    ids: dict[str, str] = {}
    for script in scripts:
        command = script.sbatch(submission.folder, ids)
        told = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="backslashreplace", cwd=submission.work
        )
        if told.returncode:
            if ids:
                subprocess.run(["scancel", *ids.values()], capture_output=True)
            raise StageError(
                f"{shlex.join(command)}: refused: {told.stderr.strip() or told.stdout.strip()}\nNothing is queued"
                f"{', the jobs before it were cancelled' if ids else ''}; mend the option and submit again"
            )
        if told.stderr.strip():
            click.echo(told.stderr.strip(), err=True)
        ids[script.name] = told.stdout.strip().partition(";")[0]
    atomic.write_json(submission.folder / "jobs.json", {"jobs": ids})
    jobs = ",".join(ids.values())
    for name, job in ids.items():
        click.echo(f"{job}  {name}")
    click.echo(f"scripts and logs: {submission.folder}")
    click.echo(f"watch:  squeue --jobs={jobs}")
    click.echo(f"        nfm status {shlex.join(['-c', str(submission.config), *_sets(submission)])}")
    click.echo(f"cancel: scancel {jobs.replace(',', ' ')}   (what is committed stays)")


def _ray_job(submission: Submission, config_path: Path, address: str | None, go: bool) -> None:
    from nfm.pipeline.submit import ray as submit_ray

    name = f"nfm-{submission.folder.name}"
    command = submit_ray.job_command(submission, address, name)
    if not go:
        click.echo(masked(shlex.join(command)))
        return
    command[0] = submit_ray.ray_beside(sys.executable)
    if not shutil.which(command[0]):
        raise StageError("ray: not found; install the extra `ray`, or leave --go out to see the command")
    _create(submission, config_path, ())
    told = subprocess.run(command, encoding="utf-8", errors="backslashreplace", capture_output=True)
    if told.returncode:
        lines = (told.stderr.strip() or told.stdout.strip()).splitlines()
        raise StageError(f"ray job submit: refused: {lines[-1] if lines else 'no message'}; is --address right?")
    atomic.write_json(submission.folder / "jobs.json", {"jobs": {"ray": name}})
    later = submit_ray.watch(name, address)
    click.echo(masked(f"{name}\nwatch:  {later['watch']}\ncancel: {later['cancel']}   (what is committed stays)"))


def _sets(submission: Submission) -> list[str]:
    return [word for text in submission.sets for word in ("--set", text)]
