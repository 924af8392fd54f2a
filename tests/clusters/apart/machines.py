"""Machines on this one that share a network and nothing else: each has namespaces of its own, a disk in memory, and all
else read-only. They end with the process that started them. Linux, as root.

They hang on a private network (10.77.0.0/16) which this process is in too, once it called `alone`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

HUB = "10.77.0.1"  # this process, as the machines see it
_BOOT = """
set -e
mount -o remount,ro,bind /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$1"
mkdir "$1/work"
hostname "$2"
ip link set lo up
echo ready
read -r ended || true
"""
_THERE = 'cd "$1" && shift && exec "$@"'
_INSIDE = 'ip link set lo up; ip addr add {hub}/32 dev lo; echo 1 > /proc/sys/net/ipv4/ip_forward; exec "$@"'


def refused() -> str:
    """Why machines cannot be made here; empty if they can."""
    if lacking := [name for name in ("unshare", "nsenter", "ip", "hostname") if shutil.which(name) is None]:
        return f"needs {', '.join(lacking)}"
    if os.geteuid():
        return "needs root, for namespaces of mounts and networks"
    trial = "ip link add m0 type veth peer name m1 && mount -o remount,ro,bind /"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "sh", "-c", trial], capture_output=True)
    return f"no namespaces are allowed here: {tried.stderr.decode().strip()}" if tried.returncode else ""


def alone(module: str, *arguments: str) -> list[str]:
    """The command that runs a module at the hub of a network of its own."""
    inside = _INSIDE.format(hub=HUB)
    return ["unshare", "--net", "sh", "-c", inside, "sh", sys.executable, "-m", module, *arguments]


class Machine:
    """One machine with its own network, processes, name and disk, which is `folder` on all of them."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name, self.folder, self.address = name, folder, f"10.77.{number}.2"
        self._unshare = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", _BOOT, "sh", str(folder), name),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._unshare.stdout
        assert self._unshare.stdout.readline() == "ready\n"
        pid = self._unshare.pid
        (self._first,) = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        end = f"m{number}-{pid}"[:15]
        _ip(f"link add {end} type veth peer name eth0 netns {self._first}")
        _ip(f"addr add 10.77.{number}.1/24 dev {end}")
        _ip(f"link set {end} up")
        for line in (
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via 10.77.{number}.1",
        ):
            subprocess.run([*self._enter("--net"), "ip", *line.split()], check=True)

    def start(self, words: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """A command in the working directory of this machine; both streams are in its stdout."""
        scripts, disk = sysconfig.get_path("scripts"), str(self.folder)
        own = {"HOME": disk, "TMPDIR": disk, "PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [*self._enter("--net", "--mount", "--uts", "--pid"), "sh", "-c", _THERE, "sh", f"{disk}/work", *words],
            env={**os.environ, **own, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    @property
    def disk(self) -> Path:
        """Its disk as this process sees it, while the machine runs."""
        return Path(f"/proc/{self._first}/root{self.folder}")

    def kill(self) -> None:
        """Ends all of its processes at once, as a power cut would; its disk is gone."""
        self._unshare.kill()
        self._unshare.communicate()

    def _enter(self, *spaces: str) -> list[str]:
        return ["nsenter", f"--target={self._first}", *spaces]


def _ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)
