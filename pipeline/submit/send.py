"""A submission is printed, or written to its folder and handed to Slurm or Ray."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from nfm.pipeline.submit import ray
from nfm.pipeline.submit.slurm import Script, Submission
from nfm.stages.base import StageError
from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic

ARRAY_LIMIT = 1000  # if Slurm does not say; its own default is 1001


def print_or_submit(submission: Submission, config_path: Path, scripts: Sequence[Script], go: bool) -> None:
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


def array_limit() -> int:
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
                f"{', the jobs before it were cancelled' if ids else ''}; mend what it says, an option or the way to "
                f"the cluster, and submit again; {submission.folder} keeps the scripts"
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


def ray_job(submission: Submission, config_path: Path, address: str | None, go: bool) -> None:
    name = f"nfm-{submission.folder.name}"
    command = ray.job_command(submission, address, name)
    if not go:
        click.echo(masked(shlex.join(command)))
        return
    command[0] = ray.ray_beside(sys.executable)
    if not shutil.which(command[0]):
        raise StageError("ray: not found; install the extra `ray`, or leave --go out to see the command")
    _create(submission, config_path, ())
    told = subprocess.run(command, encoding="utf-8", errors="backslashreplace", capture_output=True)
    if told.returncode:
        lines = (told.stderr.strip() or told.stdout.strip()).splitlines()
        raise StageError(f"ray job submit: refused: {lines[-1] if lines else 'no message'}; is --address right?")
    atomic.write_json(submission.folder / "jobs.json", {"jobs": {"ray": name}})
    later = ray.watch(name, address)
    click.echo(masked(f"{name}\nwatch:  {later['watch']}\ncancel: {later['cancel']}   (what is committed stays)"))


def _sets(submission: Submission) -> list[str]:
    return [word for text in submission.sets for word in ("--set", text)]
