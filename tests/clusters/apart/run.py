"""From images in a bucket to a student's samples, on machines that share nothing else; one is killed on the way.

Data and pairs are made on a Ray of two machines; a third one, which has only the bucket, trains and samples.

`python -m tests.clusters.apart.run -o results/bucket/two-machines.txt` writes what was typed and said, without ports,
and after it the counts. Exit 1 if a pair is lost or made twice, or if an audit finds anything.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nfm.storage import PairStore
from nfm.storage.files.paths import as_path, names_in
from tests.clusters.apart.machines import HUB, Machine, alone, refused
from tests.support.buckets.s3server import S3, serving
from tests.support.lab import CONFIG
from tests.support.patience import PATIENCE

OUTPUT = "results/bucket/two-machines.txt"
URL = "s3://shared/run"
DRAWS, BEFORE = 1, 3  # of 32 shards each; so many are committed by either machine before one is killed
RAY_PORT, STORE_BYTES = 6379, 80 * 2**20
# On a busy machine Ray's processes would starve, or be taken for dead.
BUSY = {
    "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "60", "RAY_health_check_failure_threshold": "20",
}  # fmt: skip
STARTS = 20  # of a Ray, which gives itself up where its helpers come too late
LONG = 3 * PATIENCE  # a whole command
SETS = (
    *("pairs.rows_per_shard=8", "pairs.rows_per_block=8", "pairs.batch_size=8", f"pairs.draws={DRAWS}"),
    *("pairs.report=false", "student.pairs=1024"),
)
IMAGES, TARS = 320, 4
DATA = """[data]
source = "webdataset"
path = "s3://images"
channels = 1
"""


class Command:
    """A command at work, whose lines are told as they come."""

    def __init__(self, process: subprocess.Popen[str], say: Callable[[str], None]) -> None:
        self.process = process
        self._thread = threading.Thread(target=self._tell, args=(say,), daemon=True)
        self._thread.start()

    def _tell(self, say: Callable[[str], None]) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            say(line.rstrip("\n"))

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        self.process.wait(timeout=LONG)
        self._thread.join(timeout=PATIENCE)
        if self.process.returncode:
            raise click.ClickException(f"exit {self.process.returncode} of the last command above")


class Session:
    """What is typed on the machines, and what they answer."""

    def __init__(self, folder: Path, s3: S3, output: Path) -> None:
        self.folder, self.s3, self.output = folder, s3, output
        self.lines: list[str] = []
        self.machines: list[Machine] = []
        self.environment = {
            **s3.environment(), "NFM_ARTIFACTS": URL, "NFM_SCRATCH": f"{folder}/scratch",
            "NFM_CACHE": f"{folder}/cache", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "",
            **BUSY,
        }  # fmt: skip

    def machine(self, name: str) -> Machine:
        """A new one, whose disk holds only the config."""
        made = Machine(name, len(self.machines) + 1, self.folder)
        self.machines.append(made)
        (made.disk / "work" / "tiny.toml").write_text(CONFIG.replace('[data]\nsource = "digits"\n', DATA))
        self.say(f"# machine {name} is switched on: its disk is empty but for tiny.toml")
        return made

    def ray(self, machine: Machine, cpus: int, head: Machine) -> None:
        """Makes a machine a node of the cluster of `head`."""
        joins = (f"--address={head.address}:{RAY_PORT}",)
        where = ("--head", f"--port={RAY_PORT}", "--include-dashboard=false") if machine is head else joins
        self.say(f"{machine.name}$ ray start {' '.join(where)} --num-cpus={cpus}")
        words = [
            *("ray", "start", *where, f"--num-cpus={cpus}", f"--node-ip-address={machine.address}"),
            *(f"--object-store-memory={STORE_BYTES}", f"--temp-dir={self.folder}/ray"),
        ]
        for _ in range(STARTS):
            started = machine.start(words, self.environment)
            told = started.communicate(timeout=LONG)[0]
            if not started.returncode:
                return
            machine.start(["ray", "stop", "--force"], self.environment).communicate(timeout=LONG)
        raise click.ClickException(told)

    def begin(self, machine: Machine, *arguments: str, **more: str) -> Command:
        own = "".join(f"{name}={value} " for name, value in more.items())
        self.say(f"{machine.name}$ {own}nfm {' '.join(arguments)}")
        return Command(machine.start(["nfm", *arguments], {**self.environment, **more}), self.say)

    def nfm(self, machine: Machine, *arguments: str) -> None:
        """A command, until its end."""
        self.begin(machine, *arguments).end()

    def kill(self, machine: Machine) -> None:
        machine.kill()
        self.say(f"# machine {machine.name} is switched off; its disk is gone")

    def say(self, *lines: str) -> None:
        for line in lines:
            plain = line.replace(str(self.folder), "/disk")
            plain = re.sub(r"((?:\d+\.){3}\d+):\d+|(/session)_[-_\d]+", r"\1\2", plain)
            self.lines.append(plain)
            print(plain, flush=True)


def committed(machine: Machine) -> Counter[str]:
    """The shards that each address committed, by the events of the command that runs on `machine`."""
    workers: list[str] = []
    for path in machine.disk.glob("scratch/*/pairs/*/events/*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n") and (event := json.loads(line))["kind"] == "COMMIT":
                workers.append(event["worker"].partition("/")[0])
    return Counter(workers)


def counts(url: str) -> dict[str, int]:
    """Pairs of the one store of a run: expected, there, lost, twice."""
    (name,) = names_in(as_path(url) / "pairs")
    store = PairStore.open(f"{url}/pairs/{name}")
    seen = Counter(
        (draw, slot) for draw in range(DRAWS) for slot in store.index(["slot"], draw=draw)["slot"].to_pylist()
    )
    expected = DRAWS * store.spec.rows
    return {
        "pairs": expected,
        "lost": expected - len(seen),
        "twice": sum(seen.values()) - len(seen),
        "commits": len(names_in(as_path(store.root) / "commits")),
    }


def put_images(s3: Any) -> None:
    """scikit-learn's digits as WebDataset has them: tars of PNG files and their classes."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in range(TARS):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for row in range(number, IMAGES, TARS):
                picture = io.BytesIO()
                Image.fromarray((digits.images[row] * 15.9).astype("uint8")).save(picture, "PNG")
                label = str(digits.target[row]).encode()
                for ending, content in (("png", picture.getvalue()), ("cls", label)):
                    info = tarfile.TarInfo(f"{row:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        s3.pipe_file(f"images/{number}.tar", packed.getvalue())


def scenario(session: Session) -> dict[str, Any]:
    import fsspec

    os.environ |= session.environment
    s3 = fsspec.filesystem("s3")
    for name in ("shared", "images"):
        s3.mkdir(name)
    put_images(s3)
    session.say(f"# s3://images has {IMAGES} images in {TARS} tars, s3://shared has nothing; NFM_ARTIFACTS={URL}")
    one, two = session.machine("one"), session.machine("two")
    session.ray(one, 1, one)
    session.ray(two, 1, one)
    cluster = {"RAY_ADDRESS": f"{one.address}:{RAY_PORT}"}
    words = ("-c", "tiny.toml", *(word for text in SETS for word in ("--set", text)))
    making = session.begin(
        one, "run", "pairs", *words, "--set", "data.executor=ray", "--set", "pairs.executor=ray", **cluster
    )
    both = (one.address, two.address)
    while not (making.over or min(committed(one)[at] for at in both) >= BEFORE):
        time.sleep(0.05)
    session.kill(two)
    making.end()
    by = committed(one)
    session.kill(one)

    three = session.machine("three")
    session.nfm(three, "run", "student", *words)
    (student,) = names_in(as_path(URL) / "student")
    session.nfm(three, "sample", f"student/{student}", "-n", "16", "-o", "samples.png")
    session.nfm(three, "audit", f"student/{student}", "--deep")
    return {**counts(URL), "committed by one": by[one.address], "by two, before it was killed": by[two.address]}


@click.command()
@click.option(
    "-o", "--output", default="results/bucket/two-machines.txt", show_default=True, type=click.Path(path_type=Path)
)
@click.option("--inside", is_flag=True, hidden=True)
def main(output: Path, inside: bool) -> None:
    """Run it, and keep what was said."""
    if not inside:
        if why := refused():
            raise click.ClickException(why)
        sys.exit(subprocess.run([*alone("tests.clusters.apart.run"), "--inside", "-o", str(output)]).returncode)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="apart-") as folder, serving(HUB) as s3:
        session = Session(Path(folder), s3, output)
        try:
            found = scenario(session)
        finally:
            for machine in session.machines:
                machine.kill()
        session.say("", *(f"{name}: {number:,}" for name, number in found.items()))
    output.write_text("\n".join(session.lines) + "\n", encoding="utf-8")
    sys.exit(bool(found["lost"] or found["twice"]))


if __name__ == "__main__":
    main()
