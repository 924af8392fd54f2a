"""The base install is enough to read a store: every package that only an extra brings is kept from being imported."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE

READ = """
import json, sys

class Absent:
    names = set(json.loads(sys.argv[2]))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from nfm.storage import PairStore

store = PairStore.open(sys.argv[1])
for shuffle in ("full", "windowed"):
    print(sum(len(batch.image) for batch in store.batches(50, epochs=2, shuffle=shuffle, filter=[("label", "<", 5)])))
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str, found: set[str]) -> set[str]:
    """Names of a distribution and of all that it requires without extras, gathered in `found`."""
    if normal(name) not in found:
        found.add(normal(name))
        for requirement in importlib.metadata.distribution(name).requires or []:
            match = re.match(r"[\w.-]+", requirement)
            if match is not None and "extra ==" not in requirement and ";" not in requirement:
                needed(match[0], found)
    return found


@pytest.mark.parametrize("layout", ["blocks", "samples", "zarr"])
def test_a_base_install_reads_every_layout(layout: str, store: Callable[[str], Path]) -> None:
    base = needed("nfm-pairs", set())
    assert base >= {
        "nfm-pairs",
        "numpy",
        "pyarrow",
        "fsspec",
        "click",
        "pydantic",
        "universal-pathlib",
        "google-crc32c",
    }
    absent = [
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if module != "nfm" and not base & {normal(owner) for owner in owners}
    ]
    assert {"torch", "zarr", "webdataset", "s3fs"} <= set(absent)
    command = [sys.executable, "-c", READ, str(store(layout)), json.dumps(absent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("600\n600\n", "")
