"""The shards of a store as pieces for the tasks of an array, see executors/slurm.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nfm.stages.base import Inputs, Reporter
from nfm.stages.executors import slurm
from nfm.stages.executors.jobs import Outcome, jobs_of
from nfm.stages.pairs import production as making
from nfm.stages.pairs import stage
from nfm.stages.pairs.config import PairsConfig
from nfm.storage.format.spec import read_spec


def pieces_left(config: PairsConfig, inputs: Inputs, out: Path, report: Reporter) -> list[str]:
    """The names of the shards without a commit."""
    return making.pending(out, read_spec(out), config.draws)


def make_pieces(
    config: Mapping[str, Any], inputs: Inputs, out: Path, mine: Sequence[str], left: Sequence[str], report: Reporter
) -> list[Outcome]:
    """Encodes the shards `left` of those that are a task's. Returns the failures."""
    spec = read_spec(out)
    setting = stage.setup(PairsConfig(**config), inputs, out)
    stage.announce(spec, setting, report)
    outcomes = slurm.run(setting, jobs_of(left), 1, report)
    total = making.records_of(spec, mine)
    done = total - making.records_of(spec, left)
    return making.produce(out, outcomes, setting.batch_size, report, done, total)
