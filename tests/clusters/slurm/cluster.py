"""A real Slurm of one node in a folder: its own munge key, ports and state, and nothing left when it ends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.patience import PATIENCE

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "setpriv")
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}


def absent() -> str:
    """Why no cluster can be started here; empty when one can."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"no {', '.join(missing)}: install Slurm and munge (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "a Slurm of the test's own is started as root, and this is another user"


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


@dataclass
class Cluster:
    """The daemons of one cluster; commands find it by SLURM_CONF."""

    folder: Path
    settings: dict[str, object] = field(default_factory=dict)
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def start(self) -> None:
        """Start everything; returns when the node is idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.conf.write_text(self._configuration())
        at = str(self.folder)
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={at}/munge.sock", f"--key-file={key}",
            f"--pid-file={at}/munge.pid", f"--seed-file={at}/munge.seed", f"--log-file={at}/munge.log",
        )  # fmt: skip
        self.until(lambda: (self.folder / "munge.sock").exists(), 20)
        self._daemon("slurmctld", "-D", "-c", "-f", str(self.conf))
        self._daemon("slurmd", "-D", "-c", "-N", "node0", "-f", str(self.conf))
        self.until(lambda: self.ask("sinfo", "-h", "-o", "%T").strip() == "idle", 60)

    def stop(self) -> None:
        """Cancel every job, end the daemons, and then whatever still runs by this cluster's configuration."""
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            self.ask("scancel", "--user=root")
            self.until(lambda: not self.active(), 20)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Processes that were started with this cluster's SLURM_CONF, by their number; ours is not among them."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        told = subprocess.run(command, capture_output=True, text=True, env=self._environment(), timeout=PATIENCE)
        return told.stdout

    def states(self) -> dict[str, str]:
        """The state of every job so far, each task of an array by itself: `12` or `12_3`."""
        rows = re.findall(r"^(\S+) (\S+)$", self.ask("squeue", "-h", "-a", "-r", "-t", "all", "-o", "%i %T"), re.M)
        return dict(rows)

    def active(self) -> list[str]:
        return [job for job, state in self.states().items() if state in ACTIVE]

    def exit_code(self, job: str) -> int:
        """The exit code of an ended job or task."""
        match = re.search(r"ExitCode=(\d+):", self.ask("scontrol", "show", "job", job))
        assert match, f"no such job {job}"
        return int(match[1])

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Wait until `condition()` is true; fail when a daemon ends or time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not ended, f"{ended}: {[path.read_text()[-2000:] for path in self.folder.glob('*.log')]}"
            assert time.monotonic() < deadline, f"waited in vain: {self.states()}"
            time.sleep(0.05)

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            # Should the tests be killed, no daemon outlives them; Ctrl-C leaves them to `stop`.
            command = ["setpriv", "--pdeathsig", "TERM", str(_program(name)), *arguments]
            self.daemons.append(
                subprocess.Popen(command, stdout=out, stderr=out, env=self._environment(), start_new_session=True)
            )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def _configuration(self) -> str:
        at, host = self.folder, socket.gethostname().partition(".")[0]
        controller, node = _free_ports(2)
        lines = {
            "ClusterName": "nfm", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmUser": "root", "SlurmdUser": "root",
            # A requeued job waits until its credential has expired, two minutes by default.
            "AuthType": "auth/munge", "AuthInfo": f"socket={at}/munge.sock,cred_expire=5",
            "SlurmctldPort": controller, "SlurmdPort": node, "StateSaveLocation": f"{at}/state",
            "SlurmdSpoolDir": f"{at}/spool", "SlurmctldPidFile": f"{at}/slurmctld.pid",
            "SlurmdPidFile": f"{at}/slurmd.pid", "SlurmctldLogFile": f"{at}/slurmctld.log",
            "SlurmdLogFile": f"{at}/slurmd.log", "ProctrackType": "proctrack/pgid", "TaskPlugin": "task/none",
            "MpiDefault": "none", "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "batch_sched_delay=1,sched_interval=2,bf_interval=2",
            "JobAcctGatherType": "jobacct_gather/none", "AccountingStorageType": "accounting_storage/none",
            "JobCompType": "jobcomp/filetxt", "JobCompLoc": f"{at}/jobs.txt", "ReturnToService": 2, "KillWait": 10,
            "MinJobAge": 3600, "MaxArraySize": 1001, "SlurmdParameters": "config_overrides", **self.settings,
        }  # fmt: skip
        text = [f"{key}={value}" for key, value in lines.items()]
        text += [f"NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN"]
        text += ["PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]
        return "\n".join(text) + "\n"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]
