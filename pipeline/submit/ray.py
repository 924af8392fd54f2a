"""Text for making pairs on Ray: a job for an existing cluster, or a cluster inside one Slurm allocation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from nfm.pipeline.submit.slurm import CHAINED, HEAD, Script, Submission, job_options, nfm, script

STOP_SECONDS = 15  # Ray's own 3 s may be too short for a driver whose actors finish a batch


def job_command(submission: Submission, address: str | None, name: str) -> list[str]:
    """`ray job submit` of `nfm run pairs`. The cluster must see the same files and have the same environment."""
    variables = {"NFM_ARTIFACTS": submission.artifacts, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    line = f"cd -- {shlex.quote(str(submission.work))} && exec {_run(submission)}"
    return [
        "ray",
        "job",
        "submit",
        *(["--address", address] if address else []),
        "--submission-id",
        name,
        "--runtime-env-json",
        json.dumps({"env_vars": variables}),
        "--no-wait",
        "--",
        "bash",
        "-c",
        "\n".join([*submission.before, line]),
    ]


def allocation(submission: Submission, nodes: int) -> Script:
    """One Slurm job of `nodes` nodes that starts, uses and ends its own Ray cluster."""
    tasks = (f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={submission.threads}")
    options = job_options(submission, "ray", "%j", submission.compute, *tasks, CHAINED, "--signal=B:USR1@120")
    text = (
        _CLUSTER.replace("@HEAD@", HEAD)
        .replace("@RAY@", shlex.join(_ray(submission)))
        .replace("@RUN@", _run(submission, "pairs.ray_address=", '"$address"'))
    )
    return Script("ray", script(submission, options, text.rstrip("\n")), {"afterok": submission.after})


def _run(submission: Submission, key: str = "", value: str = "") -> str:
    line = nfm(submission, "run", "pairs", config=True, sets=("pairs.executor=ray",))
    return f"{line} --set {key}{value}" if key else line


def _ray(submission: Submission) -> list[str]:
    """The `ray` command of the interpreter that runs `nfm`."""
    return [submission.nfm[0], "-m", "ray.scripts.scripts"]


def watch(name: str, address: str | None) -> Mapping[str, str]:
    """How to watch a Ray job and how to stop it."""
    at = f" --address {shlex.quote(address)}" if address else ""
    return {"watch": f"ray job logs{at} --follow {name}", "cancel": f"ray job stop{at} {name}"}


def ray_beside(python: str) -> str:
    """The `ray` command installed beside an interpreter, or the one on the path."""
    own = Path(python).parent / "ray"
    return str(own) if own.exists() else "ray"


_CLUSTER = """\
# A Ray cluster of this job alone. Its port and its folder come from the job's number, and it is ended by ending the
# `ray start --block` processes that this script began: `ray stop` would end other jobs' clusters on the same node.
@HEAD@
if [[ $head == 127.* ]]; then head=$(hostname -I | awk '{print $1}'); fi  # Ray takes no loopback address
port=$((20000 + SLURM_JOB_ID % 10000))
address=$head:$port
scratch=/tmp/nfm-ray-$SLURM_JOB_ID  # short: the names of sockets are
cpus=${SLURM_CPUS_PER_TASK:-1}
step=(srun --overlap --ntasks-per-node=1 --cpus-per-task="$cpus")
ray=(@RAY@)
export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness=0  # Ray adds 15, which makes workers starve where others use the node's cores too
# Whoever reaches a Ray cluster can run code on it: this one answers only to a secret that this job alone knows.
RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

"${step[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${ray[@]}" start --head --block --node-ip-address="$head" \\
  --port="$port" --num-cpus="$cpus" --temp-dir="$scratch" --include-dashboard=false --disable-usage-stats \\
  --ray-client-server-port=$((port + 10000)) --min-worker-port=0 --max-worker-port=0 &
began=($!)
end() {
  kill -TERM "${began[@]}" 2>/dev/null || true
  wait "${began[@]}" 2>/dev/null || true
  rm -rf -- "$scratch"
}
trap end EXIT
for _ in {1..120}; do
  if (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; then break; fi
  if ! kill -0 "${began[0]}" 2>/dev/null; then echo "ray did not start on ${nodes[0]}, see above" >&2; exit 1; fi
  sleep 1
done
others=$((${#nodes[@]} - 1))
if ((others > 0)); then
  "${step[@]}" --nodes="$others" --ntasks="$others" --exclude="${nodes[0]}" "${ray[@]}" start --block \\
    --address="$address" --num-cpus="$cpus" --disable-usage-stats --min-worker-port=0 --max-worker-port=0 &
  began+=($!)
fi

# The signals of time limits, preemption and scancel reach this script; they are for nfm.
@RUN@ &
run=$!
trap 'kill -TERM "$run" 2>/dev/null' TERM
trap 'kill -USR1 "$run" 2>/dev/null' USR1
wait "$run" || true
while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done
code=0
wait "$run" || code=$?
exit "$code"
"""
