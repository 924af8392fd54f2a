"""A training as a run of Weights & Biases, with the package's own settings (WANDB_PROJECT, WANDB_MODE, `wandb login`).

The artifact's `wandb.json` has the id of the run and the last steps that it was told. So a resumed training goes on
with the same run and says nothing twice. Without a login or a network the run is kept beside it, for `wandb sync`.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic

STATE = "wandb.json"
PROJECT = "nfm-pairs"
PATIENCE = 60.0  # seconds that a run's beginning, and sending the rest at its end, may take


class WeightsBiases:
    """The run of a training, begun or resumed."""

    def __init__(self, out: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        import wandb

        self._path, self._say = out / STATE, say
        known = atomic.read_json(self._path) if self._path.exists() else {}
        self._id = known.get("id") or secrets.token_hex(8)
        self._told: dict[str, int] = {"figures": -1, "pictures": -1, **known.get("told", {})}
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=PATIENCE)
        here = wandb.setup(settings=quiet)
        told: dict[str, Any] = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "dir": str(out), "settings": quiet,
                "id": self._id, "resume": "allow", "config": dict(config),
                "name": f"{out.parent.name}-{out.name}"}  # fmt: skip
        try:
            if here.settings.mode == "online" and not wandb.login(prompt=False):
                raise wandb.Error("no login: `wandb login` makes one")
            self._run = wandb.init(**told)
        except wandb.Error as error:
            self._run = wandb.init(**told, mode="offline")
            say(
                f"W&B cannot be reached ({masked(f'{error}')}); the run is kept in {out / 'wandb'}, "
                f"`wandb sync {out / 'wandb'}/offline-run-*` sends it later"
            )

    def line(self, step: int, figures: Mapping[str, float]) -> None:
        self._tell("figures", step, lambda: dict(figures))

    def picture(self, step: int, file: Path) -> None:
        import wandb

        self._tell("pictures", step, lambda: {"samples": wandb.Image(str(file))})

    def _tell(self, kind: str, step: int, make: Callable[[], dict[str, Any]]) -> None:
        if step > self._told[kind]:
            self._run.log(make(), step=step)
            self._told[kind] = step
            atomic.write_json(self._path, {"id": self._id, "told": self._told})

    def close(self) -> None:
        """Sends what is left; a network that is gone makes nobody wait for longer than PATIENCE."""
        finishing = threading.Thread(target=self._run.finish, name="nfm-wandb", daemon=True)
        finishing.start()
        finishing.join(PATIENCE)
        if finishing.is_alive():
            self._say("W&B has not taken everything yet; `wandb sync` of the folder `wandb` sends the rest")
