"""The lines that a training writes, `metrics.jsonl`, and who else is told of them: TensorBoard, Weights & Biases.

`Lines` is the one place where a training's figures are written and sent on. After a resume it begins with the lines
that the last checkpoint knows of, and tells the others of them first.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from nfm.stages.base import Unfit, call
from nfm.stages.display.watching.grids import grids_of
from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic
from nfm.storage.files.small_files import read_bytes

METRICS = "metrics.jsonl"
MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # of the variable WANDB_MODE
EXTRA = "pip install 'nfm-pairs[watch]' brings it"
Watching = Literal["tensorboard", "wandb"]
Line = Mapping[str, float]


class Watcher(Protocol):
    """Somebody who is told of a training. Steps are examples seen; they only grow. Whatever it raises ends it alone."""

    def line(self, step: int, figures: Line) -> None: ...

    def picture(self, step: int, file: Path) -> None: ...

    def close(self) -> None: ...


class Known(NamedTuple):
    """How a watcher is called in messages, whether its package is there, and its maker, `module:function`."""

    title: str
    package: Callable[[], object]
    make: str  # (artifact's folder, config as values, say) -> Watcher


WATCHERS: dict[Watching, Known] = {
    "tensorboard": Known(
        "TensorBoard",
        lambda: importlib.util.find_spec("tensorboard"),
        "nfm.stages.display.watching.tensor_board:TensorBoard",
    ),
    "wandb": Known(
        "W&B", lambda: importlib.util.find_spec("wandb"), "nfm.stages.display.watching.weights_biases:WeightsBiases"
    ),
}


def check_watching(section: str, watch: Sequence[Watching]) -> None:
    """Raises Unfit where a package is missing that somebody who is to be told needs."""
    if "wandb" in watch and (mode := os.environ.get("WANDB_MODE", MODES[0])) not in MODES:
        raise Unfit(f"WANDB_MODE = {mode!r} is no mode of W&B: unset it, or set it to {', '.join(MODES)}")
    for name in watch:
        if not WATCHERS[name].package():
            raise Unfit(f"{section}.watch names {name!r}, and {name} is not installed: {EXTRA}")


class Lines:
    """The lines of a training that goes on from `seen` examples. Used by its first process, in a `with`."""

    def __init__(
        self, out: Path, unit: str, seen: int, watch: Sequence[Watching], config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._path, self._step, self._say = out / METRICS, f"{unit}_seen", say
        kept = self._keep(seen)
        self._watchers: dict[Watching, Watcher] = {}
        for name in watch:
            self._guarded(name, self._begin, name, out, config)
        told: list[tuple[int, str, Any]] = [(int(line[self._step]), "line", line) for line in kept]
        told += [(step, "picture", file) for step, file in grids_of(out).items() if step <= seen]
        for step, what, value in sorted(told, key=lambda one: one[:2]):
            self._tell(what, step, value)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._tell("close")

    def add(self, figures: Line) -> None:
        """Writes a line and sends it on."""
        line = {key: round(value, 6) for key, value in figures.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._tell("line", int(line[self._step]), line)

    def picture(self, step: int, file: Path) -> None:
        """Sends on a grid of samples that was drawn."""
        self._tell("picture", step, file)

    def _begin(self, name: Watching, out: Path, config: Mapping[str, Any]) -> None:
        self._watchers[name] = call(WATCHERS[name].make, out, config, self._say)

    def _tell(self, what: str, *arguments: Any) -> None:
        for name, watcher in list(self._watchers.items()):
            self._guarded(name, getattr(watcher, what), *arguments)

    def _guarded(self, name: Watching, do: Callable[..., None], *arguments: Any) -> None:
        """Somebody who looks on never ends a training: he is told nothing more, and the user once."""
        try:
            do(*arguments)
        except Exception as error:
            self._watchers.pop(name, None)
            self._say(
                f"{WATCHERS[name].title} is told nothing more of this training ({masked(f'{error}')}); "
                f"{METRICS} has everything, and the training goes on"
            )

    def _keep(self, seen: int) -> list[dict[str, Any]]:
        """Drops the lines that a killed run wrote after its last checkpoint: they are written again. Gives the rest."""
        lines = _parsed(self._path) if self._path.exists() else []
        kept = [line for line in lines if line.get(self._step, seen + 1) <= seen]
        atomic.write_bytes(self._path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
        return kept


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the steps of a training, with their loss, from its log; those of its samples are left out."""
    return [line for line in _parsed(path) if "loss" in line]


def _parsed(path: Path) -> list[dict[str, Any]]:
    """JSON lines; lines cut short by a kill are left out."""
    lines = []
    for text in read_bytes(path).decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
