"""Text for arrays on Slurm: scripts, their options and dependencies. Nothing here writes or submits.

A submission has three kinds of jobs: `prepare` writes the worklist, arrays do what is on it, and `seal` seals the store
of pairs, or `finish` ends the stage of data or latents.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nfm.stages.base import Unfit
from nfm.stages.executors.slurm import PAIRS
from nfm.storage.files.paths import is_url

PLAIN = re.compile(r"[\w./:=%@+,-]*")  # allowed in a `#SBATCH` line without quotes
FIXED = {  # what the scripts decide, and what to use instead
    "array": "--tasks, --max-array and --at-once",
    "dependency": "--after JOB; the jobs of one submission wait for each other already",
    "wrap": "--before for lines of your own",
    "output": "nothing: logs are in the submission's folder",
}


SUBMISSIONS = "submissions"  # the folder of worklists, among the artifacts
# Every node has its own, which its tasks share.
_OWN_SCRATCH = 'export NFM_SCRATCH="${NFM_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/nfm-scratch-$(id -u)}"'
CHAINED = "--kill-on-invalid-dep=yes"  # of jobs that wait for others
# Sets $nodes, and $head to the address of the first one: its name need not be known to the name service.
HEAD = """\
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
name=$(scontrol show node "${nodes[0]}" --oneliner | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
head=$(getent ahostsv4 "$name" | awk '{print $1; exit}') || { echo "$name: no such host" >&2; exit 1; }"""


@dataclass(frozen=True)
class Submission:
    """What all scripts of one submission have in common. Paths are absolute; `artifacts` may be a URL.

    `nfm` is the command as arguments. `config` is the copy of the config in `folder`. `before` are the user's own lines
    that prepare the environment (`module load cuda`). `compute` and `sealing` are the user's `sbatch` options for the
    jobs that compute and for the one that seals. `after` are numbers of jobs that must have succeeded before.
    """

    folder: Path
    work: Path
    artifacts: str
    nfm: tuple[str, ...]
    config: Path
    sets: tuple[str, ...] = ()
    threads: int = 1
    before: tuple[str, ...] = ()
    compute: tuple[str, ...] = ()
    sealing: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def worklist(self) -> str:
        """Among the artifacts: so tasks find it wherever these are, and gc knows which store they complete."""
        return f"{self.artifacts}/{SUBMISSIONS}/{self.folder.name}/worklist.json"

    @property
    def variables(self) -> list[str]:
        """Lines of bash that say where artifacts are, and where a node computes that shares only a bucket."""
        lines = [f"export NFM_ARTIFACTS={shlex.quote(self.artifacts)}"]
        return [*lines, _OWN_SCRATCH] if is_url(self.artifacts) else lines

    @property
    def logs(self) -> Path:
        return self.folder / "logs"


@dataclass(frozen=True)
class Script:
    """One job: its script, and what it waits for, by kind (afterok, afterany): names in its submission, or numbers."""

    name: str
    text: str
    waits: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def sbatch(self, folder: Path, ids: Mapping[str, str]) -> list[str]:
        """The command that submits it. `ids` are the numbers of its submission's jobs by name."""
        waits = [":".join([kind, *(ids.get(job, job) for job in jobs)]) for kind, jobs in self.waits.items() if jobs]
        dependency = [f"--dependency={','.join(waits)}"] if waits else []
        return ["sbatch", "--parsable", *dependency, str(folder / f"{self.name}.sbatch")]


def array_jobs(submission: Submission, tasks: int, limit: int, at_once: int = 0, stage: str = PAIRS) -> list[Script]:
    """The prepare job, one array for every `limit` tasks, and the job that ends the stage when all of these have ended
    in any way.
    """
    parts = [(start, min(limit, tasks - start)) for start in range(0, tasks, limit)]
    names = [f"array-{number}" for number in range(len(parts))]
    arrays = [
        Script(name, _array(submission, stage, name, start, count, tasks, at_once), {"afterok": ["prepare"]})
        for name, (start, count) in zip(names, parts)
    ]
    last = "seal" if stage == PAIRS else "finish"
    end = Script(last, _end(submission, stage, last), {"afterok": ["prepare"], "afterany": names})
    return [Script("prepare", _prepare(submission, stage), {"afterok": submission.after}), *arrays, end]


def _prepare(submission: Submission, stage: str) -> str:
    return script(
        submission,
        job_options(submission, "prepare", "%j", submission.compute, CHAINED, f"--cpus-per-task={submission.threads}"),
        "# Makes what the stage needs where it is missing, and freezes the list of what is to be made.",
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
        f"exec {nfm(submission, 'worklist', stage, '-o', submission.worklist, config=True)}",
    )


def _array(submission: Submission, stage: str, name: str, start: int, count: int, tasks: int, at_once: int) -> str:
    throttle = f"%{at_once}" if at_once else ""
    return script(
        submission,
        job_options(
            submission,
            name,
            "%A_%a",
            submission.compute,
            CHAINED,
            f"--array=0-{count - 1}{throttle}",
            f"--cpus-per-task={submission.threads}",
            "--signal=B:USR1@120",
        ),
        f"# Tasks {start} to {start + count - 1} of {tasks}: task i makes the shards whose number mod {tasks} is i.",
        "# SIGUSR1, 120 s before the time limit, finishes the shard in hand; SIGTERM (scancel, preemption) drops it.",
        f"# Last bits may depend on the number of threads: it is {stage}.threads, whatever else the job was given.",
        f"export OMP_NUM_THREADS={submission.threads}",
        f"task=$((SLURM_ARRAY_TASK_ID + {start}))",
        f'exec {nfm(submission, "work", submission.worklist)} --task "$task" --of {tasks}',
    )


def _end(submission: Submission, stage: str, name: str) -> str:
    return script(
        submission,
        job_options(submission, name, "%j", submission.sealing, CHAINED),
        "# Ends the stage when nothing is missing; otherwise says what is, and ends with exit code 1.",
        f"exec {nfm(submission, 'run', stage, config=True, sets=(f'{stage}.executor=slurm',))}",
    )


def script(submission: Submission, options: Sequence[str], *lines: str) -> str:
    """A whole script: its options, the user's own lines, the folders, then `lines`."""
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "set -eo pipefail",
            *submission.before,
            f"cd -- {shlex.quote(str(submission.work))}",
            *submission.variables,
            *lines,
            "",
        ]
    )


def job_options(submission: Submission, name: str, log: str, own: Sequence[str], *fixed: str) -> list[str]:
    """The options of a job: ours, then the user's. If an option is given twice, `sbatch` uses the last.

    `log` is what sbatch puts into the name of the log, `fixed` are the options of this kind of job.
    """
    logs = str(submission.logs).replace("%", "%%")
    ours = [
        f"--job-name=nfm-{name}",
        f"--output={logs}/{name}-{log}.log",
        "--open-mode=append",
        "--requeue",
        *fixed,
    ]
    return [directive(option) for option in [*ours, *own]]


def directive(option: str) -> str:
    """An `sbatch` option as a `#SBATCH` line. Raises StageError for options that the scripts decide."""
    name, sign, value = option.partition("=")
    if "\n" in option or not option.startswith("-"):
        raise Unfit(f"--sbatch {option!r}: write one option of sbatch, for instance --sbatch=--time=04:00:00")
    if not sign or PLAIN.fullmatch(value):
        return option
    if value[:1] in "\"'" and value[-1:] == value[:1]:
        return option  # already quoted
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'


def user_options(options: Sequence[str]) -> tuple[str, ...]:
    """The user's options. Those that the scripts decide are refused, with what to use instead."""
    for option in options:
        directive(option)
        if fixed := _fixed(option):
            raise Unfit(f"--sbatch {option}: use {FIXED[fixed]}")
    return tuple(options)


def _fixed(option: str) -> str | None:
    """The entry of FIXED that an option sets. sbatch also accepts `-a0-3` for `--array=0-3`, and shortened
    long names.
    """
    if not option.startswith("--"):
        return {"a": "array", "d": "dependency", "o": "output"}.get(option[1:2])
    name = re.split(r"[=\s]", option[2:], maxsplit=1)[0]
    return next((fixed for fixed in FIXED if len(name) > 1 and fixed.startswith(name)), None)


def nfm(submission: Submission, *arguments: object, config: bool = False, sets: Sequence[str] = ()) -> str:
    """An `nfm` command as a shell line, with the config and overrides of the run if it needs them."""
    words = [*submission.nfm, *map(str, arguments)]
    if config:
        words += ["-c", str(submission.config)]
        words += [word for text in (*submission.sets, *sets) for word in ("--set", text)]
    return shlex.join(words)
