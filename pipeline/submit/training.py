"""A training on a Slurm cluster as text: one job whose tasks train together, as torchrun's processes do."""

from __future__ import annotations

from nfm.pipeline.submit.slurm import CHAINED, HEAD, Script, Submission, job_options, nfm, script


def training_job(submission: Submission, stage: str, nodes: int, per_node: int) -> Script:
    """One job of `nodes` x `per_node` processes that run `nfm run STAGE`: the first leads, the others take part."""
    tasks = (f"--nodes={nodes}", f"--ntasks-per-node={per_node}", f"--cpus-per-task={submission.threads}")
    return Script(
        stage,
        script(
            submission,
            job_options(submission, stage, "%j", submission.compute, *tasks, CHAINED, "--signal=TERM@120"),
            "# SIGTERM, 120 s before the time limit, reaches every process: all save and stop at the same step.",
            HEAD,
            "export MASTER_ADDR=$head MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))",
            f"export OMP_NUM_THREADS={submission.threads}",
            f"exec srun --kill-on-bad-exit=1 --cpus-per-task={submission.threads} bash -c \\",
            "  'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec \"$@\"' task \\",
            f"  {nfm(submission, 'run', stage, config=True)}",
        ),
        {"afterok": submission.after},
    )
