"""The cluster of the Ray executor: connects to one or starts one, and says how many actors fit."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from nfm.stages.base import StageError, Unfit
from nfm.stages.executors import Executor
from nfm.stages.executors.ray_messages import logs, shortened
from nfm.stages.trained.devices.where import check_address

ANSWER_SECONDS = 5.0
STORE_BYTES = 80 * 2**20  # small, because images never enter Ray's object store
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Share:
    """The resources that one actor takes of a node."""

    cpus: int
    gpus: int
    section: str = "pairs"  # of the config, for messages

    def __str__(self) -> str:
        cpus = f"{self.cpus} CPU{'s' * (self.cpus > 1)}"
        return f"1 GPU and {cpus}" if self.gpus else cpus

    @property
    def remedy(self) -> str:
        """What to do if no node has so much."""
        device = f"{self.section}.device = 'cpu'" if self.gpus else f"fewer {self.section}.threads"
        return f"set {device}, or add a node that has {self}"

    def fits(self, resources: Mapping[str, float]) -> int:
        """How many such shares fit into these resources."""
        counts = [resources.get("CPU", 0) // self.cpus]
        if self.gpus:
            counts.append(resources.get("GPU", 0) // self.gpus)
        return int(min(counts))

    def free(self) -> dict[str, float]:
        """The free resources of the whole cluster."""
        import ray

        return ray.available_resources()

    def left(self) -> str:
        """The free part of all resources, for messages: `1 of 8 CPUs free`."""
        import ray

        free, whole = ray.available_resources(), ray.cluster_resources()
        kinds = ["GPU", "CPU"] if self.gpus else ["CPU"]
        return ", ".join(f"{free.get(kind, 0):g} of {whole.get(kind, 0):g} {kind}s" for kind in kinds) + " free"


def carried(share: Share) -> int:
    """How many shares fit on the nodes of the cluster, used or free."""
    import ray

    return sum(share.fits(node["Resources"]) for node in ray.nodes() if node["Alive"])


def address_of(stated: str | None) -> str:
    """The address of the cluster: the given one, else RAY_ADDRESS, else `local`, which starts one.

    Raises Unfit for a RAY_ADDRESS that is none.
    """
    address = stated or os.environ.get("RAY_ADDRESS") or "local"
    try:
        return check_address(address)
    except ValueError as error:
        raise Unfit(f"{'ray_address' if stated else 'RAY_ADDRESS'} = {address!r}: {error}") from None


def elsewhere(executor: Executor, stated: str | None) -> bool:
    """Whether an executor works on other machines, of whose devices this one knows nothing."""
    return executor.later or (executor.cluster and address_of(stated) != "local")


@contextmanager
def cluster(address: str | None, workers: int, threads: int, device: str, section: str = "pairs") -> Iterator[Share]:
    """Connects to a cluster, or starts a local one that ends with this process. Yields the share of one actor.

    It uses a Ray that is already initialised, else the one at `address` or RAY_ADDRESS. The caller's signal handlers
    are kept. Raises StageError if no cluster answers.
    """
    import ray

    address = address_of(address)
    if ray.is_initialized():
        yield _share(threads, device, section)
        return
    with shortened():
        with _interruptible():
            if address == "local":
                _make(workers, threads, device, section)
            else:
                _connect(address)
        try:
            yield _share(threads, device, section)
        finally:
            ray.shutdown()


def _share(threads: int, device: str, section: str) -> Share:
    import ray

    gpus = device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    return Share(threads, int(gpus), section)


def _make(workers: int, threads: int, device: str, section: str) -> None:
    """Starts a local cluster, with CPUs for the requested workers or else all cores, and the GPUs that torch sees."""
    gpus = 0
    if device == "auto" or device.startswith("cuda"):
        import torch

        gpus = torch.cuda.device_count()
    if not workers:
        workers = gpus or max(1, len(os.sched_getaffinity(0)) // threads)
    try:
        start_local(workers * threads, gpus)
    except Exception as error:  # Ray raises that itself where one of its processes ends during the start
        raise StageError(
            f"a local Ray cannot start: {_first_line(error)}; see the logs in {logs()}, or do "
            f"without it: --set {section}.executor=serial"
        ) from error


def start_local(cpus: int, gpus: int = 0) -> None:
    """Starts a Ray for this process. It listens only on the loopback address and needs no network.

    Its workers have the niceness of this process. Ray's default adds 15, which makes them starve on a busy machine.
    """
    import ray

    with _loopback_allowed(), _own_process_groups():
        ray.init(
            address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, object_store_memory=STORE_BYTES,
            _node_ip_address=LOOPBACK, _system_config={"worker_niceness": 0}, **_quiet(),
        )  # fmt: skip


@contextmanager
def _loopback_allowed() -> Iterator[None]:
    """Makes Ray keep the loopback address of its node, by telling it that it makes no clusters here.

    Otherwise Ray replaces this address by the host's. All its processes bind to the address of their node, and to every
    interface if that is not a loopback address.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_process_groups() -> Iterator[None]:
    """A signal to this process's whole group, as `timeout` sends it, must not end Ray before we have stopped."""
    from ray._private import services as module

    services: Any = module
    before = services.ConsolePopen
    services.ConsolePopen = partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


REMEDY = "start one with `ray start --head`, or leave ray_address and RAY_ADDRESS out for a local one"


def check_reachable(
    address: str | None, who: str = 'pairs.executor = "ray"', without: str = "--set pairs.executor=serial"
) -> None:
    """Raises StageError if Ray is not installed, or if nothing answers at the address. It takes seconds at most.

    `who` is the setting that needs Ray, and `without` is how to avoid it.
    """
    if importlib.util.find_spec("ray") is None:
        raise Unfit(
            f"{who} needs Ray, which is not installed: pip install 'nfm-pairs[ray]', or do without it: {without}"
        )
    address = address_of(address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # Ray itself would try for minutes and ignore signals
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise StageError(f"no Ray cluster answers at {address!r} ({error}); {REMEDY}") from error


def _connect(address: str) -> None:
    import ray

    check_reachable(address)
    try:
        ray.init(address=address, **_quiet())
    except Exception as error:  # of no kind of its own
        raise StageError(f"cannot connect to the Ray cluster at {address!r}: {_first_line(error)}; {REMEDY}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "configure_logging": False, "namespace": "nfm"}


@contextmanager
def _interruptible() -> Iterator[None]:
    """Makes a stop end Ray's start, which takes seconds and ignores signals.

    The caller's handlers still run, and stay.
    """
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
