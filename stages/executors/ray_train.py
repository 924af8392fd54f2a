"""A training on the workers of a Ray cluster, by Ray Train's TorchTrainer.

Ray Train starts the processes, and all of them again when one dies: they go on from the newest checkpoint, which lies
in the artifact. This process shows what the first of them tells, and tells it when to stop. If the artifact is in a
bucket, each process works in a folder of its own; the first one brings what is made to the bucket, this one fetches it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nfm.stages.base import Inputs, Reporter, StageError, Stopped
from nfm.stages.couplings.custom import called_beside
from nfm.stages.executors.ray_cluster import cluster
from nfm.stages.trained.devices import launched
from nfm.stages.trained.devices.launched import Silent
from nfm.stages.trained.training import left_files, train_here
from nfm.stages.trained.training.checkpoints import CHECKPOINTS, newest_checkpoint
from nfm.storage.files import atomic, remote
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import as_path, is_remote, is_url, remove_below

LOOKS_EVERY = 0.5  # seconds between two looks at the training
UNSEEN = 30.0  # seconds without a look after which nothing more is written: somebody else may have taken over
STARTS = 5  # in a row that may end before a new checkpoint
FAILED_STARTS = 40  # of a whole training that may end before its processes meet; Ray waits a minute for a node

News = list[tuple[str, tuple[Any, ...], dict[str, Any]]]  # calls of a reporter: method, arguments, figures


class Line:
    """Between a training and the process that watches it: an actor that keeps what each has to tell the other."""

    def __init__(self) -> None:
        self._news: News = []
        self._stop = False
        self._looked = time.monotonic()
        self._outcome: Exception | None = None
        self._starts: list[int] = []
        self._files: list[dict[str, Any]] = []

    def begin(self, seen: int) -> bool:
        """Whether the processes may begin, which have a checkpoint of `seen` examples."""
        again = bool(self._starts)
        self._starts = [*(before for before in self._starts if before == seen), seen]
        if len(self._starts) > STARTS and self._outcome is None:
            self._outcome = StageError(
                f"training was begun {STARTS} times in a row from the checkpoint of {seen:,} examples, and each time a "
                "worker died before the next one; see the Ray logs for the reason (out of memory is the usual one: set "
                "microbatch, recompute or sharding), or save more often; checkpoints stay, run the same command again"
            )
        elif again:
            self._news.append(("say", (f"a worker died; training begins again from {seen:,} examples",), {}))
        return self._outcome is None

    def tell(self, news: News) -> bool:
        """Takes news from the training, and says whether it is to stop."""
        self._news += news
        return self._stop

    def end(self, outcome: Exception) -> None:
        """The training ended otherwise than with its last step; what is told first counts."""
        self._outcome = self._outcome or outcome

    def leave(self, files: list[dict[str, Any]]) -> None:
        """Takes what the training left in the bucket: path, sha256 and bytes of each file."""
        self._files = files

    def left(self) -> list[dict[str, Any]]:
        return self._files

    def unseen(self) -> float:
        """Seconds since the watching process looked last."""
        return time.monotonic() - self._looked

    def look(self, stop: bool) -> News:
        """Gives the news since the last look."""
        self._looked, self._stop = time.monotonic(), stop
        news, self._news = self._news, []
        return news

    def outcome(self) -> Exception | None:
        return self._outcome


class Reports:
    """The reporter of the first process: all that it is told goes down the line, a few times a second."""

    ending = False

    def __init__(self, line: Any) -> None:
        self.stopping = False
        self._line = line
        self._news: News = []
        self._asked: Any = None
        self._sent = 0.0

    def progress(self, done: int, total: int, unit: str, workers: Any = (), **figures: Any) -> None:
        self._news = [item for item in self._news if item[0] != "progress"]
        self._add("progress", (done, total, unit, workers), figures)

    def say(self, text: str) -> None:
        self._add("say", (text,), {})

    def log(self, kind: str, **values: Any) -> None:
        self._add("log", (kind,), values)

    def check_lock(self) -> None:
        import ray

        unseen = ray.get(self._line.unseen.remote())
        if unseen > UNSEEN:
            raise StageError(
                f"the process that watches the training has not been seen for {unseen:.0f} s: nothing more is written, "
                "since another one may have taken the work over"
            )

    def flush(self) -> None:
        import ray

        ray.get(self._line.tell.remote(self._news))

    def _add(self, what: str, arguments: tuple[Any, ...], figures: dict[str, Any]) -> None:
        import ray

        self._news.append((what, arguments, figures))
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            self.stopping, self._asked = ray.get(self._asked), None
        if self._asked is None and time.monotonic() - self._sent >= LOOKS_EVERY:
            self._asked = self._line.tell.remote(self._news)
            self._news, self._sent = [], time.monotonic()


def fit(make: Any, config: Any, inputs: Inputs, out: Path, report: Reporter) -> None:
    """Train on `config.workers` processes of the cluster until done; what dies begins again from the last checkpoint.

    Raises Stopped when the reporter is stopping, and StageError when training cannot go on.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    threads = max(1, len(os.sched_getaffinity(0)) // config.workers)
    made = mirror.origin(out)
    work = (make, config, launched.sent(inputs), made, Path.cwd())
    with cluster(config.ray_address, config.workers, threads, config.device) as share, _notes(made) as notes:
        # On this process's own node: on another one it would be lost with that node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        line: Any = ray.remote(Line).options(num_cpus=0, scheduling_strategy=here).remote()
        report.say(f"training on {config.workers} workers, {share} each; the cluster has {share.left()}")
        if is_url(made) and "tensorboard" in config.watch:
            report.say("TensorBoard's files stay with the workers and go with them: the artifact is in a bucket")
        failed: list[BaseException] = []
        thread = threading.Thread(
            target=_train, args=(work, line, share, notes, failed), name="nfm-ray-train", daemon=True
        )
        thread.start()
        while True:
            thread.join(LOOKS_EVERY)
            over = not thread.is_alive()
            report.check_lock()
            for what, arguments, figures in ray.get(line.look.remote(report.stopping)):
                getattr(report, what)(*arguments, **figures)
            if over:
                break
        if outcome := ray.get(line.outcome.remote()):
            raise outcome
        left = ray.get(line.left.remote())
    if failed:
        raise StageError(f"training on Ray failed: {_last_line(failed[0])}") from failed[0]
    if is_url(made):
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # of an earlier start without workers
        for file in left:
            mirror.fetch(as_path(made), out, file)


@contextlib.contextmanager
def _notes(made: str) -> Iterator[dict[str, Any]]:
    """Where Ray Train keeps notes of its own, as its RunConfig says it: beside our checkpoints, for all nodes."""
    folder = as_path(made) / "ray-train"
    remove_below(folder)
    before = os.environ.get("RAY_CHDIR_TO_TRIAL_DIR")
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths in configs count from where the command was given
    try:
        yield _place(folder)
    finally:
        if before is None:
            del os.environ["RAY_CHDIR_TO_TRIAL_DIR"]
        else:
            os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = before
        remove_below(folder)


def _place(folder: Path) -> dict[str, Any]:
    if not is_remote(folder):
        return {"storage_path": str(folder)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    there: Any = folder
    return {"storage_path": there.path, "storage_filesystem": PyFileSystem(FSSpecHandler(remote.file_system(folder)))}


def _train(work: tuple[Any, ...], line: Any, share: Any, notes: dict[str, Any], failed: list[BaseException]) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    needs = {"CPU": share.cpus, **({"GPU": 1} if share.gpus else {})}
    try:
        TorchTrainer(
            _worker,
            train_loop_config={"work": work, "line": line},
            scaling_config=ScalingConfig(
                num_workers=work[1].workers, use_gpu=bool(share.gpus), resources_per_worker=needs
            ),
            run_config=RunConfig(
                name="training",
                **notes,
                failure_config=FailureConfig(  # of Ray Train's second version, which its types do not know
                    max_failures=-1,
                    controller_failure_limit=FAILED_STARTS,  # type: ignore[call-arg]
                ),
            ),
        ).fit()
    except BaseException as error:  # raised by the thread that waits
        failed.append(error)


def _worker(given: dict[str, Any]) -> None:
    """One process of the training, on whatever node it is. A process that dies makes Ray Train begin all of them again;
    an error of ours ends the training, since it would come again."""
    import ray
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    (make, config, places, made, beside), line = given["work"], given["line"]
    first = ray.train.get_context().get_world_rank() == 0
    begins = [ray.get(line.begin.remote(newest_checkpoint(as_path(made)))) if first else None]
    dist.broadcast_object_list(begins, src=0)
    if not begins[0]:
        return
    report = Reports(line) if first else Silent()
    try:
        inputs, device = launched.received(places), str(ray.train.torch.get_device())
        with mirror.beside(made) as out:
            called_beside(beside, train_here, make, config, inputs, out, report, device)
            if first and is_url(made):
                ray.get(line.leave.remote(_hand_over(out, made, report)))
    except Stopped as stopped:  # of all processes at the same step
        ray.get(line.end.remote(stopped))
    except StageError as error:
        ray.get(line.end.remote(error))
        raise
    finally:
        if isinstance(report, Reports):
            report.flush()


def _hand_over(out: Path, made: str, report: Any) -> list[dict[str, Any]]:
    """Brings what a training left to the bucket, where its watching process finds it. Lists it as manifests do."""
    digests = {name: atomic.hash_file(out / name) for name in left_files(out)}
    mirror.push(as_path(made), out, digests, report.check_lock)
    return [{"path": name, "sha256": sha256, "bytes": size} for name, (sha256, size) in digests.items()]


def _last_line(error: BaseException) -> str:
    lines = [text for text in str(error).splitlines() if text.strip()]
    return lines[-1].strip() if lines else type(error).__name__
