"""The tutorial's cells run in their order, on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from nfm.storage import PairStore
from tests.support.lab import Lab

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/tutorial.ipynb"


def test_the_tutorial_runs_from_the_images_to_samples_of_a_student(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its cell of parameters is left out, for a config and a number of steps of this test's."""
    monkeypatch.setenv("NFM_ARTIFACTS", str(lab.artifacts))
    monkeypatch.chdir(lab.folder)
    monkeypatch.setitem(mpl.rcParams, "backend", "agg")
    lab.drop("pairs", "student", "evaluate", "report")  # data and teacher stay: training takes seconds
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    [parameters] = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    values: dict[str, Any] = {"config": str(lab.config), "settings": ("pairs.draws=1",), "steps": 20}
    stated: dict[str, Any] = {}
    monkeypatch.setattr("os.chdir", lambda folder: None)
    exec("".join(parameters["source"]), stated)
    assert set(values) < set(stated)
    try:
        for cell in cells:
            if cell is not parameters:
                exec("".join(cell["source"]), values)
    finally:
        pictures = plt.get_fignums()
        plt.close("all")
    assert len(pictures) == 2
    assert PairStore.open(values["artifact"].path).spec.rows == 256
    assert 0 < values["loss"].item() < 3
    assert values["x"].isfinite().all()
