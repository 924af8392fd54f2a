"""The cluster of the Ray executor: connected to or made, what an actor takes of it, and how many it carries."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from nfm.stages.base import StageError, Unfit

ANSWER_SECONDS = 5.0
STORE_BYTES = 80 * 2**20  # images never enter Ray's object store
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Share:
    """What one actor takes of a node."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        cpus = f"{self.cpus} CPU{'s' * (self.cpus > 1)}"
        return f"1 GPU and {cpus}" if self.gpus else cpus

    @property
    def remedy(self) -> str:
        """What to do where no node has so much."""
        device = "pairs.device = 'cpu'" if self.gpus else "fewer pairs.threads"
        return f"set {device}, or add a node that has {self}"

    def fits(self, resources: Mapping[str, float]) -> int:
        """How many shares these resources are."""
        counts = [resources.get("CPU", 0) // self.cpus]
        if self.gpus:
            counts.append(resources.get("GPU", 0) // self.gpus)
        return int(min(counts))

    def free(self) -> dict[str, float]:
        """What nobody uses on the whole cluster now."""
        import ray

        return ray.available_resources()

    def left(self) -> str:
        """What is free of what there is, for people: `1 of 8 CPUs free`."""
        import ray

        free, whole = ray.available_resources(), ray.cluster_resources()
        kinds = ["GPU", "CPU"] if self.gpus else ["CPU"]
        return ", ".join(f"{free.get(kind, 0):g} of {whole.get(kind, 0):g} {kind}s" for kind in kinds) + " free"


def carried(share: Share) -> int:
    """How many shares the nodes of the cluster hold at present, whoever uses them."""
    import ray

    return sum(share.fits(node["Resources"]) for node in ray.nodes() if node["Alive"])


def address_of(stated: str | None) -> str:
    """Where the cluster is: the address that was stated, else RAY_ADDRESS, else `local` for one that is made."""
    return stated or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def cluster(address: str | None, workers: int, threads: int, device: str) -> Iterator[Share]:
    """Connect to a cluster, or make a local one that ends with us; yields what an actor takes of it.

    An initialised Ray is used as it is, else the one at `address` or RAY_ADDRESS. The caller's signal handlers stay.
    Raises StageError when no cluster answers.
    """
    import ray

    address = address_of(address)
    connected = ray.is_initialized()
    if not connected:
        with _interruptible():
            if address == "local":
                _make(workers, threads, device)
            else:
                _connect(address)
    try:
        gpus = device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
        yield Share(threads, int(gpus))
    finally:
        if not connected:
            ray.shutdown()


def _make(workers: int, threads: int, device: str) -> None:
    """A local cluster with CPUs for the workers asked for, else for all cores, and the GPUs that torch sees."""
    import torch

    gpus = torch.cuda.device_count() if device == "auto" or device.startswith("cuda") else 0
    if not workers:
        workers = gpus or max(1, len(os.sched_getaffinity(0)) // threads)
    try:
        start_local(workers * threads, gpus)
    except (OSError, RuntimeError, ValueError) as error:
        raise StageError(
            f"a local Ray cannot start: {_first_line(error)}; see the logs in {_logs()}, or do "
            "without it: --set pairs.executor=serial"
        ) from error


def _logs() -> str:
    """Where a Ray of this machine keeps what its processes say."""
    return os.path.join(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")), "ray", "session_latest", "logs")


def start_local(cpus: int, gpus: int = 0) -> None:
    """Start a Ray of this process's own; all of it listens on the loopback address alone, and needs no network.

    Its workers are as nice as this process. By Ray's default they are nicer by 15, and starve beside others' work.
    """
    import ray

    with _loopback_allowed():
        ray.init(
            address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, object_store_memory=STORE_BYTES,
            _node_ip_address=LOOPBACK, _system_config={"worker_niceness": 0}, **_quiet(),
        )  # fmt: skip


@contextmanager
def _loopback_allowed() -> Iterator[None]:
    """Ray replaces a loopback address of its node by the host's own, unless it holds that it makes no clusters here.

    All its processes bind to the address of their node, and to every interface where that is no loopback address.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


REMEDY = "start one with `ray start --head`, or leave ray_address and RAY_ADDRESS out for a local one"


def check_reachable(
    address: str | None, who: str = 'pairs.executor = "ray"', without: str = "--set pairs.executor=serial"
) -> None:
    """Raises StageError where Ray is not installed, or nobody listens at the address; asks for seconds at most.

    `who` wants it, and `without` is how to do without.
    """
    if importlib.util.find_spec("ray") is None:
        raise Unfit(
            f"{who} needs Ray, which is not installed: pip install 'nfm-pairs[ray]', or do without it: {without}"
        )
    address = address_of(address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # Ray itself would try for minutes, deaf to signals
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise StageError(f"no Ray cluster answers at {address!r} ({error}); {REMEDY}") from error


def _connect(address: str) -> None:
    import ray

    check_reachable(address)
    try:
        ray.init(address=address, **_quiet())
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # OSError: a ConnectionError, or no token where one is asked for
        raise StageError(f"cannot connect to the Ray cluster at {address!r}: {_first_line(error)}; {REMEDY}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "configure_logging": False, "namespace": "nfm"}


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray takes seconds to start and looks at nobody: a stop ends it here. The caller's handlers hear it and stay."""
    import ray

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def stop(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    finally:
        for number, handler in before.items():  # Ray sets its own
            if handler is not None:
                signal.signal(number, handler)
